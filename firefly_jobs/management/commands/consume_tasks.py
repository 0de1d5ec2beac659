"""``manage.py consume_tasks``: run due tasks until asked to stop."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import connections

from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.consumer import Consumer
from firefly_jobs.management.arguments import (
    add_database,
    database_alias,
    positive,
    positive_or_zero,
    queue_list,
)
from firefly_jobs.models import TaskModel


class Command(BaseCommand):
    """Parse, make a :class:`~firefly_jobs.consumer.Consumer`, run it."""

    help = "Run due tasks of one or more queues until stopped by SIGTERM or SIGINT."

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--queue",
            action="extend",
            type=queue_list,
            metavar="NAME",
            help="Queue to consume; repeatable or a comma list, in order of preference; "
            "'*' for all. Default: FIREFLY_JOBS['DEFAULT_QUEUE'].",
        )
        parser.add_argument("--burst", action="store_true", help="Exit when nothing is due.")
        parser.add_argument("--max-tasks", type=positive, metavar="N", help="Exit after N tasks.")
        parser.add_argument(
            "--shutdown-timeout",
            type=positive_or_zero,
            metavar="S",
            help="Seconds that running tasks get to finish after a stop was asked for. "
            "Default: FIREFLY_JOBS['SHUTDOWN_TIMEOUT'].",
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Run the consumer; exit 0 when asked to stop, 1 after an error."""
        using = database_alias(options)
        if TaskModel._meta.db_table not in connections[using].introspection.table_names():
            message = (
                f"Database {using!r} has no table of firefly_jobs. Run: manage.py migrate "
                f"--database {using}"
            )
            raise CommandError(message)
        _log_to_stderr(options["verbosity"])
        import_tasks()
        consumer = Consumer(
            options["queue"],
            using=using,
            burst=options["burst"],
            max_tasks=options["max_tasks"],
            shutdown_timeout=options["shutdown_timeout"],
        )
        code = consumer.run()
        if consumer.has_stuck_calls:
            # A call blocked in C code cannot be interrupted, and its thread would keep
            # the process alive; its row is released, its transaction dies with us.
            logging.shutdown()
            os._exit(code)
        if code:
            sys.exit(code)


def _log_to_stderr(verbosity: int) -> None:
    """Show the log of a project that has not configured where it goes."""
    logger = logging.getLogger("firefly_jobs")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
