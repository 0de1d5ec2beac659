"""``manage.py celery_consume``: let Celery workers run due tasks, until asked to stop."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError
from django.db import Error

from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.management.arguments import (
    add_database,
    database_alias,
    positive,
    positive_or_zero,
    queue_list,
)
from firefly_jobs.reporting import log_to_stderr


class Command(BaseCommand):
    """Parse, then run one consumer whose slots are Celery workers."""

    help = "Claim due tasks and let Celery workers run them, until stopped by SIGTERM or SIGINT."

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
            "--max-in-flight",
            type=positive,
            metavar="N",
            help="Tasks that Celery may have at the same time. Default: 100.",
        )
        parser.add_argument(
            "--silence",
            type=positive,
            default=3600,
            metavar="S",
            help="Seconds after which a task that has not ended counts as lost: longer than any "
            "takes and waits in Celery's queue. Default: 3600.",
        )
        parser.add_argument(
            "--celery-queue",
            metavar="NAME",
            help="Celery's queue for the messages. Default: as Celery routes firefly_jobs.run.",
        )
        parser.add_argument(
            "--shutdown-timeout",
            type=positive_or_zero,
            metavar="S",
            help="Seconds that tasks in flight get to end after a stop was asked for. "
            "Default: FIREFLY_JOBS['SHUTDOWN_TIMEOUT'].",
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Run until the end."""
        log_to_stderr(options["verbosity"])
        using = database_alias(options)
        import_tasks()
        try:
            from firefly_jobs.contrib.celery import installed_app  # noqa: PLC0415 - needs its extra
            from firefly_jobs.contrib.celery.consume import CeleryConsumer  # noqa: PLC0415 - likewise

            app = installed_app()
        except (ImportError, ImproperlyConfigured) as error:
            raise CommandError(str(error)) from error
        consumer = CeleryConsumer(
            app,
            options["queue"],
            using=using,
            max_in_flight=options["max_in_flight"],
            silence=options["silence"],
            celery_queue=options["celery_queue"],
            shutdown_timeout=options["shutdown_timeout"],
        )
        try:
            consumer.run()
        except Error as error:
            message = f"Database {using!r} cannot be used: {str(error).strip()}"
            raise CommandError(message) from error
