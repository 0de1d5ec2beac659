"""``manage.py list_schedules``: what recurs, when, and how it goes."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser

from firefly_jobs.conf import get_settings
from firefly_jobs.models import ScheduleModel
from firefly_jobs.recurrence import interval_in_words


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
        """Print.

        Raises:
            CommandError: At the end, if there was none of a name, or one that cannot be read.
        """
        using = options["database"] or get_settings().DATABASE
        rows = ScheduleModel.objects.using(using)
        wanted = set(options["name"])
        if wanted:
            rows = rows.filter(name__in=wanted)
        broken = []
        for row in rows:
            wanted.discard(row.name)
            if not self._print(row, options["count"]):
                broken.append(row.name)
        if wanted:
            message = f"There is no schedule {', '.join(map(repr, sorted(wanted)))}."
            raise CommandError(message)
        if broken:
            message = f"Cannot be read here: {', '.join(broken)}."
            raise CommandError(message)

    def _print(self, row: ScheduleModel, count: int) -> bool:
        """Print one; return whether it could be read."""
        self.stdout.write(f"{row.name}: {_when(row)}, calls {row.calls}")
        self.stdout.write(
            f"  {_state(row)}; runs {row.run_count}, succeeded {row.success_count}, "
            f"failed {row.failure_count}, retries {row.retry_count}"
        )
        if row.next_run is None and row.last_error:
            self.stdout.write(f"  {row.last_error}")
        try:
            lines = [_as_text(moment, row.zone) for moment in row.upcoming(count)]
        except (ValueError, ImproperlyConfigured) as error:
            # Those behind it are listed all the same.
            self.stdout.write(f"  cannot be read here: {error}")
            return False
        for line in lines:
            self.stdout.write(f"  {line}")
        return True


def _when(row: ScheduleModel) -> str:
    if row.cron:
        return f"cron {row.cron!r} in {row.timezone}"
    return "by hand" if row.every is None else f"every {interval_in_words(row.every)}"


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
