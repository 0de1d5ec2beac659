"""Walk ended rows in batches, for the commands that delete or revive them.

A batch is found by primary key, after the last one, and changed in a short transaction
of its own, so neither the number of rows nor their age decides how much memory is used
or how long a lock is held.  Rows that end while a command runs are left to the next one.
What is old enough is judged by the database's clock.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from django.core.management.base import BaseCommand, CommandError
from django.db import Error
from django.db.models import Max, QuerySet

from firefly_jobs import lifecycle, pruning
from firefly_jobs.consumer_options import ALL_QUEUES
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.exceptions import DELAY_SECONDS_MAX
from firefly_jobs.lifecycle import BATCH_SIZE
from firefly_jobs.models import TaskModel
from firefly_jobs.states import Status

from .arguments import add_database, age, database_alias, queue_list

_USAGE = 2


class EndedTasksCommand(BaseCommand):
    """Parse, walk, print; a command says which rows and what to do with a batch.

    Attributes:
        status: Which rows.
        moment: The column that tells since when they are in it.
        done: The verb's participle, for what is printed.
        reasons: Why some rows were not changed.
    """

    status: ClassVar[Status]
    moment: ClassVar[str]
    done: ClassVar[str]
    reasons: ClassVar[str] = "changed meanwhile, or were locked,"

    def change(self, ids: Sequence[int], *, using: str) -> int:
        """Change one batch in a transaction of its own; return how many rows changed."""
        raise NotImplementedError

    def follow_up(self, using: str, options: dict[str, Any]) -> None:
        """Do what follows once all batches are done."""

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--queue",
            action="extend",
            type=queue_list,
            metavar="NAME",
            help="Only tasks of this queue; repeatable or a comma list. Default: all queues.",
        )
        parser.add_argument(
            "--older-than",
            type=age,
            metavar="AGE",
            help=f"Only tasks that have {self.status} at least this long ago, such as 7d, 12h, "
            f"30m, 90s or 2w, by the database's clock. Default: of any age.",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Change nothing; print how many there are."
        )
        add_database(parser)

    def handle(self, **options: Any) -> None:
        """Run; exit 0 when done, 1 after an error of the database, 2 for a wrong option."""
        using = database_alias(options)
        try:
            rows = self._rows(using, options)
            if options["dry_run"]:
                self.stdout.write(f"{_tasks(rows.count(), self.status)} would be {self.done}.")
            else:
                self._change_all(rows, using, is_verbose=options["verbosity"] > 1)
            self.follow_up(using, options)
        except Error as error:
            message = f"Database {using!r}: {str(error).strip()}"
            raise CommandError(message) from error

    def _rows(self, using: str, options: dict[str, Any]) -> QuerySet[TaskModel]:
        rows = TaskModel.objects.using(using).filter(status=self.status)
        queues = options["queue"]
        if queues and ALL_QUEUES not in queues:
            rows = rows.filter(queue__in=queues)
        if options["older_than"] is not None:
            seconds = options["older_than"].total_seconds()
            if seconds > DELAY_SECONDS_MAX:
                message = "--older-than must be 100 years at most."
                raise CommandError(message, returncode=_USAGE)
            rows = rows.filter(**{f"{self.moment}__lt": SecondsFromNow(-seconds)})
        return rows

    def _change_all(self, rows: QuerySet[TaskModel], using: str, *, is_verbose: bool) -> None:
        found = changed = 0
        try:
            for ids in _batches(rows, BATCH_SIZE):
                found += len(ids)
                changed += self.change(ids, using=using)
                if is_verbose:
                    self.stdout.write(f"{changed:,} so far.")
        finally:
            # Said after an interruption as well: the batches so far are committed.
            self.stdout.write(f"{_tasks(changed, self.status)} {_were(changed)} {self.done}.")
        if changed < found:
            self.stdout.write(f"{found - changed:,} {self.reasons} and stay as they are.")


class DeletingCommand(EndedTasksCommand):
    """Delete tasks, and then the workflows that are empty."""

    done = "deleted"

    def change(self, ids: Sequence[int], *, using: str) -> int:
        """Delete one batch."""
        return lifecycle.delete(ids, using=using)

    def follow_up(self, using: str, options: dict[str, Any]) -> None:
        """Delete workflows that have ended and have no task left; say how many if there are any."""
        age = options["older_than"]
        seconds = None if age is None else age.total_seconds()
        empty = pruning.empty_workflows(using=using, older_than_seconds=seconds)
        if options["dry_run"]:
            if count := empty.count():
                self.stdout.write(f"{_workflows(count)} without tasks would be deleted.")
            return
        deleted = 0
        try:
            for ids in _batches(empty, pruning.BATCH_SIZE):
                deleted += pruning.delete_workflows(ids, using=using)
        finally:
            if deleted:
                self.stdout.write(f"{_workflows(deleted)} without tasks {_were(deleted)} deleted.")


def _batches(rows: QuerySet[Any], size: int) -> Iterator[list[int]]:
    last = rows.model.objects.using(rows.db).aggregate(last=Max("pk"))["last"] or 0
    after = 0
    while True:
        batch = rows.filter(pk__gt=after, pk__lte=last).order_by("pk")[:size]
        ids = list(batch.values_list("pk", flat=True))
        if not ids:
            return
        yield ids
        after = ids[-1]


def _tasks(count: int, status: Status) -> str:
    return f"{count:,} {status.value} task{'' if count == 1 else 's'}"


def _workflows(count: int) -> str:
    return f"{count:,} workflow{'' if count == 1 else 's'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
