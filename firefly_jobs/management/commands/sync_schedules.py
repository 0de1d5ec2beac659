"""``manage.py sync_schedules``: make rows of what the code declares to recur."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import DEFAULT_DB_ALIAS

from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.conf import get_settings
from firefly_jobs.syncing import sync


class Command(BaseCommand):
    """Make rows of what the code declares to recur, as every consumer does when it starts."""

    help = "Write the schedules that the code declares, and retire those that it does not any more."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument(
            "--database", default=None, help="Alias; default FIREFLY_JOBS['DATABASE']."
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Synchronise, and print what has changed."""
        import_tasks()
        synced = sync(using=options["database"] or get_settings().DATABASE or DEFAULT_DB_ALIAS)
        for verb, names in synced._asdict().items():
            for name in names:
                self.stdout.write(f"{verb} {name}")
        if not any(synced):
            self.stdout.write("All schedules are in step with the code.")
