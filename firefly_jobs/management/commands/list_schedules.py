"""``manage.py list_schedules``: what recurs, when, and how it goes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandParser

from firefly_jobs.conf import get_settings
from firefly_jobs.models import ScheduleModel


class Command(BaseCommand):
    """Print each schedule with its next occurrences."""

    help = "List the schedules in the database, each with its next occurrences."

    def add_arguments(self, parser: CommandParser) -> None:
        """Add the options."""
        parser.add_argument("name", nargs="*", help="Only these schedules.")
        parser.add_argument(
            "--database", default=None, help="Alias; default FIREFLY_JOBS['DATABASE']."
        )
        parser.add_argument(
            "--count", type=int, default=10, help="How many occurrences; default 10."
        )

    def handle(self, *_args: Any, **options: Any) -> None:
        """Print."""
        using = options["database"] or get_settings().DATABASE
        rows = ScheduleModel.objects.using(using)
        if options["name"]:
            rows = rows.filter(name__in=options["name"])
        for row in rows:
            self._print(row, options["count"])

    def _print(self, row: ScheduleModel, count: int) -> None:
        self.stdout.write(f"{row.name}: {_when(row)}, calls {row.calls}")
        self.stdout.write(
            f"  {_state(row)}; runs {row.run_count}, succeeded {row.success_count}, "
            f"failed {row.failure_count}, retries {row.retry_count}"
        )
        try:
            lines = [_as_text(moment, row.zone) for moment in row.upcoming(count)]
        except (ValueError, ImproperlyConfigured) as error:
            # Those behind it are listed all the same.
            lines = [f"cannot be read here: {error}"]
        for line in lines:
            self.stdout.write(f"  {line}")


def _when(row: ScheduleModel) -> str:
    if row.cron:
        return f"cron {row.cron!r} in {row.timezone}"
    return "by hand" if row.every is None else f"every {row.every:g} s"


def _state(row: ScheduleModel) -> str:
    if row.is_retired:
        return "retired: its declaration has gone"
    if row.is_paused:
        return "paused"
    if row.next_run is None:
        return f"{row.operation}, no next run"
    return str(row.operation)


def _as_text(moment: datetime, zone: Any) -> str:
    return moment.astimezone(zone).isoformat(sep=" ", timespec="seconds")
