"""Keep count, in a schedule's row, of what it has started: what runs, and how it ended.

Written in the transaction that writes the end, so the numbers are those of the rows.  The
row of the schedule is the last thing that such a transaction locks, and of several it locks
them by their ids.  ``active_count`` may be wrong only if rows are deleted by hand; a sweep
sets it anew.

Where the transactions of calls repeat reads, a row that has been moved on since the call's
first statement cannot be written any more: its end is counted right after its COMMIT, and
until then ``following`` knows of it, as of steps of workflows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from django.db import connections, transaction
from django.db.models import Case, F, QuerySet, Value, When

from . import databases, following
from .attempts import Ended, Settlement
from .databases import Completion
from .databases.functions import DatabaseNow, Isolation
from .models import ScheduleModel, TaskModel, WorkflowModel
from .schedule_models import Operation
from .states import Status, WorkflowStatus

_ACTIVE = [status for status in Status if not status.is_terminal]


class Tally(NamedTuple):
    """The end of one start of a schedule, or a retry."""

    schedule: int
    # Empty: a retry.
    status: str
    returned: str | None = None
    error: str = ""
    func_name: str = ""


def count_settled(settlements: Sequence[Settlement], *, using: str) -> None:
    """Count outcomes."""
    tallies = []
    for item in settlements:
        claim = item.claim
        if claim.schedule is not None and item.status.is_terminal:
            error = item.error or ""
            tallies.append(
                Tally(claim.schedule, item.status, item.returned, error, claim.func_name)
            )
        elif claim.schedule is not None and item.ended is Ended.RETRIED:
            tallies.append(Tally(claim.schedule, ""))
    count(tallies, using=using)


def count_completed(completions: Sequence[Completion], *, using: str) -> None:
    """Count calls that have returned, maybe in their own transaction."""
    found = [item for item in completions if item.schedule is not None]
    tallies = [
        Tally(item.schedule or 0, Status.COMPLETED, item.returned, "", item.func_name)
        for item in found
    ]
    if tallies and not count(tallies, using=using, unless_reads_repeat=True):
        ids = [item.id for item in found]
        following.postpone(ids, using=using)
        transaction.on_commit(partial(_count_later, ids, tallies, using=using), using)


def _count_later(ids: Sequence[int], tallies: Sequence[Tally], *, using: str) -> None:
    """Count what has been committed already, unless a sweep has."""
    with databases.of(using).own_transaction(connections[using]):
        ours = following.take(ids, using=using)
        count([t for pk, t in zip(ids, tallies, strict=True) if pk in ours], using=using)


def count(tallies: Iterable[Tally], *, using: str, unless_reads_repeat: bool = False) -> bool:
    """Count ends and retries, those of one schedule with one statement.

    Args:
        tallies: What is to be counted.
        using: Database alias.
        unless_reads_repeat: Whether to count nothing if the open transaction repeats reads.

    Returns:
        Whether all was counted; what belongs to a schedule that was deleted is not.
    """
    by_schedule: defaultdict[int, list[Tally]] = defaultdict(list)
    for tally in tallies:
        by_schedule[tally.schedule].append(tally)
    is_counted = True
    conditions = {}
    if unless_reads_repeat and connections[using].in_atomic_block:
        conditions = {"isolation": "read-committed"}
    for schedule, found in sorted(by_schedule.items()):
        row = ScheduleModel.objects.using(using).alias(isolation=Isolation())
        is_counted &= row.filter(pk=schedule, **conditions).update(**_counted(found)) == 1
    return is_counted


def _counted(found: Sequence[Tally]) -> dict[str, Any]:
    """Return what is written into the row of one schedule."""
    ends = [tally for tally in found if tally.status]
    retries = len(found) - len(ends)
    changes: dict[str, Any] = {"retry_count": F("retry_count") + retries} if retries else {}
    if not ends:
        return changes
    last, number = ends[-1], len(ends)
    # MySQL works them out in this order, each with the new values of those before it.
    return changes | {
        "operation": Case(
            When(active_count__gt=number, then=Value(Operation.RUNNING)),
            default=Value(Operation.IDLE),
        ),
        # A subtraction below zero is an error on MySQL, and refused elsewhere.
        "active_count": Case(
            When(active_count__gt=number, then=F("active_count") - number), default=Value(0)
        ),
        "success_count": F("success_count") + sum(t.status == Status.COMPLETED for t in ends),
        "failure_count": F("failure_count") + sum(t.status == Status.FAILED for t in ends),
        "last_ended": DatabaseNow(),
        "last_status": last.status,
        "raw_last_result": last.returned,
        "last_error": last.error,
        "last_func_name": last.func_name,
    }


def count_workflow(workflow: WorkflowModel, status: str, *, using: str) -> None:
    """Count the end of a run, if a schedule has started it."""
    if workflow.schedule_id is not None:
        count([Tally(workflow.schedule_id, status, error=workflow.error)], using=using)


def count_withdrawn(rows: QuerySet[TaskModel], reason: str, *, using: str) -> None:
    """Count rows that wait and are about to be cancelled, and lock them."""
    schedules = rows.filter(schedule__isnull=False).order_by("pk").select_for_update()
    count(
        [
            Tally(schedule or 0, Status.CANCELLED, error=reason)
            for schedule in schedules.values_list("schedule", flat=True)
        ],
        using=using,
    )


def count_revived(schedules: Iterable[int | None], *, using: str) -> None:
    """Count what runs again; one entry for each row or run, ``None`` without a schedule."""
    counts: defaultdict[int, int] = defaultdict(int)
    for schedule in schedules:
        if schedule is not None:
            counts[schedule] += 1
    for schedule, number in sorted(counts.items()):
        ScheduleModel.objects.using(using).filter(pk=schedule).update(
            active_count=F("active_count") + number, operation=Operation.RUNNING
        )


def sweep(*, using: str) -> None:
    """Set the numbers of what runs anew, for what was deleted past us."""
    rows = ScheduleModel.objects.using(using)
    busy = rows.filter(active_count__gt=0).order_by("pk").values_list("pk", "active_count")
    for schedule, number in list(busy):
        if active(schedule, using=using) < number:
            with databases.of(using).own_transaction(connections[using]):
                _count_what_was_missed(schedule, using)
                # Whoever starts or ends a call needs this lock, so what is counted now is true.
                list(rows.filter(pk=schedule).select_for_update().values_list("pk"))
                found = active(schedule, using=using)
                rows.filter(pk=schedule, active_count__gt=found).update(
                    operation=Operation.RUNNING if found else Operation.IDLE, active_count=found
                )


def _count_what_was_missed(schedule: int, using: str) -> None:
    """Count ends whose process ended before it could."""
    ended = TaskModel.objects.using(using).filter(schedule=schedule).exclude(status__in=_ACTIVE)
    ids = list(ended.filter(next_gate=following.NOT_FOLLOWED).values_list("pk", flat=True))
    ours = following.take(ids, using=using)
    columns = ("status", "raw_returned", "error", "func_name")
    found = ended.filter(pk__in=ours).order_by("pk").values_list(*columns)
    count([Tally(schedule, *values) for values in found], using=using)


def active(schedule: int, *, using: str) -> int:
    """Return how many starts of a schedule have not ended, by the rows."""
    rows = TaskModel.objects.using(using).filter(schedule=schedule, status__in=_ACTIVE)
    runs = WorkflowModel.objects.using(using).filter(
        schedule=schedule, status=WorkflowStatus.RUNNING
    )
    return rows.count() + runs.count()
