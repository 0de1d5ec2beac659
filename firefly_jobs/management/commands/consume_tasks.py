"""``manage.py consume_tasks``: run due tasks until asked to stop."""

from __future__ import annotations

import logging
import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import Error, connections

from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.conf import SETTING, get_settings, problems
from firefly_jobs.consumer import Consumer
from firefly_jobs.databases import leave_pools
from firefly_jobs.management.arguments import (
    add_database,
    database_alias,
    positive,
    positive_or_zero,
    priorities_from,
    priority_bands,
    process_count,
    queue_list,
)
from firefly_jobs.models import TaskModel
from firefly_jobs.readiness import insist
from firefly_jobs.reporting import log_to_stderr
from firefly_jobs.supervised import Orders
from firefly_jobs.supervisor import Supervisor


class Command(BaseCommand):
    """Parse, then run one consumer here, or a supervisor of several."""

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
        parser.add_argument(
            "--queue-order",
            choices=["strict", "fair"],
            default="strict",
            help="strict: a later queue is served when the former have nothing due. fair: each "
            "claim starts with another queue. Default: strict.",
        )
        priorities = parser.add_mutually_exclusive_group()
        priorities.add_argument(
            "--priority",
            action="extend",
            type=priority_bands,
            metavar="BANDS",
            help="Priorities to serve: critical, high, normal, low, background, or numbers as in "
            "--priority=-50..100; repeatable or a comma list. Default: all.",
        )
        priorities.add_argument(
            "--min-priority",
            type=priorities_from,
            metavar="P",
            help="Serve this priority and all above it: one of the names, or a number.",
        )
        parser.add_argument(
            "--processes",
            type=process_count,
            metavar="N",
            help="Run N consumers in processes of their own under a supervisor; 'auto' for one per "
            "usable processor. Default: one consumer, in this process.",
        )
        parser.add_argument(
            "--threads",
            type=positive,
            default=1,
            metavar="N",
            help="Sync tasks that run at the same time, each with a connection of its own. "
            "Default: 1.",
        )
        parser.add_argument(
            "--async-slots",
            type=positive,
            metavar="N",
            help="Async tasks that run at the same time. Default: FIREFLY_JOBS['ASYNC_SLOTS'].",
        )
        parser.add_argument(
            "--async-connections",
            type=positive,
            metavar="N",
            help="Database connections that async tasks share. "
            "Default: FIREFLY_JOBS['ASYNC_CONNECTIONS'].",
        )
        parser.add_argument(
            "--group-commit",
            action="store_true",
            help="Run short tasks in groups, each in a savepoint, with one COMMIT per group.",
        )
        parser.add_argument("--burst", action="store_true", help="Exit when nothing is due.")
        parser.add_argument(
            "--max-tasks",
            type=positive,
            metavar="N",
            help="Exit after N tasks; with several processes, replace each after N tasks.",
        )
        parser.add_argument(
            "--max-memory",
            type=positive,
            metavar="MB",
            help="Exit once the process keeps more than MB megabytes; with several processes, "
            "replace the one that does.",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=positive_or_zero,
            metavar="S",
            help="Seconds that running tasks get to finish after a stop was asked for. "
            "Default: FIREFLY_JOBS['SHUTDOWN_TIMEOUT'].",
        )
        parser.add_argument(
            "--reload", action="store_true", help="For development: restart when code changes."
        )
        add_database(parser)

    def execute(self, *args: Any, **options: Any) -> Any:
        """Wait for the database before Django's own checks connect to it."""
        log_to_stderr(options["verbosity"])
        if options["reload"] and (options["processes"] or 1) > 1:
            message = (
                f"--reload runs one process, and --processes asks for {options['processes']}. "
                f"Leave one of them out."
            )
            raise CommandError(message, returncode=2)
        # With wrong settings there is nothing to wait for: the checks say what is wrong.
        if not problems(getattr(settings, SETTING, {})):
            using = database_alias(options)
            leave_pools()
            _reach(using)
        return super().execute(*args, **options)

    def handle(self, **options: Any) -> None:
        """Run until the end; exit 0 when asked to stop, 1 after an error."""
        using = database_alias(options)
        tables: list[str] = []
        _reach(using, lambda: tables.extend(connections[using].introspection.table_names()))
        if TaskModel._meta.db_table not in tables:
            message = (
                f"Database {using!r} has no table of firefly_jobs. Run: manage.py migrate "
                f"--database {using}"
            )
            raise CommandError(message)
        import_tasks()
        # Sent to other processes as they are, so plain values only.
        arguments: dict[str, Any] = {
            "queues": options["queue"],
            "burst": options["burst"],
            "max_tasks": options["max_tasks"],
            "max_memory_mb": options["max_memory"],
            "threads": options["threads"],
            "async_slots": options["async_slots"],
            "async_connections": options["async_connections"],
            "group_commit": options["group_commit"],
            "queue_order": options["queue_order"],
            "priorities": options["priority"] or options["min_priority"],
        }
        if options["processes"] or options["reload"]:
            code = _supervise(using, arguments, options)
        else:
            code = _consume(using, arguments, options)
        if code:
            sys.exit(code)


def _reach(using: str, step: Callable[[], object] | None = None) -> None:
    """Do one step of starting; a database that is away for long is an error of the command."""
    try:
        insist(using, step)
    except Error as error:
        message = f"Database {using!r} cannot be reached: {str(error).strip()}"
        raise CommandError(message) from error


def _consume(using: str, arguments: dict[str, Any], options: dict[str, Any]) -> int:
    consumer = Consumer(using=using, shutdown_timeout=options["shutdown_timeout"], **arguments)
    code = consumer.run()
    if consumer.has_stuck_calls:
        # A call blocked in C code cannot be interrupted, and its thread would keep
        # the process alive; its row is released, its transaction dies with us.
        logging.shutdown()
        os._exit(code)
    return code


def _supervise(using: str, arguments: dict[str, Any], options: dict[str, Any]) -> int:
    timeout = options["shutdown_timeout"]
    orders = Orders(
        using=using,
        consumer=arguments,
        shutdown_timeout=get_settings().SHUTDOWN_TIMEOUT if timeout is None else timeout,
        verbosity=options["verbosity"],
        reloads=options["reload"],
    )
    connections.close_all()
    processes = options["processes"] or 1
    supervisor = Supervisor(orders, processes=processes, burst=options["burst"])
    return supervisor.run()
