"""Keep count, in a schedule's row, of what it has started: what runs, and how it ended.

Written in the transaction that writes the end, so the numbers are those of the rows.  The
row of the schedule is the last thing that such a transaction locks.  ``active_count`` may be
wrong only if rows are deleted by hand; a sweep sets it anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from django.db.models import Case, F, QuerySet, Value, When

from .attempts import Ended, Settlement
from .databases import Completion
from .databases.functions import DatabaseNow
from .models import ScheduleModel, TaskModel, WorkflowModel
from .schedule_models import Operation
from .states import Status, WorkflowStatus

_ACTIVE = [status for status in Status if not status.is_terminal]


class Tally(NamedTuple):
    """The end of one start of a schedule."""

    schedule: int
    status: str
    returned: str | None = None
    error: str = ""


def settled(settlements: Sequence[Settlement], *, using: str) -> None:
    """Count outcomes."""
    found = [item for item in settlements if item.claim.schedule is not None]
    ended(
        (
            Tally(item.claim.schedule or 0, item.status, item.returned, item.error or "")
            for item in found
            if item.status.is_terminal
        ),
        using=using,
    )
    retried: defaultdict[int, int] = defaultdict(int)
    for item in found:
        retried[item.claim.schedule or 0] += item.ended is Ended.RETRIED
    for schedule, count in sorted(retried.items()):
        if count:
            rows = ScheduleModel.objects.using(using).filter(pk=schedule)
            rows.update(retry_count=F("retry_count") + count)


def completed(completions: Sequence[Completion], *, using: str) -> None:
    """Count calls that have returned."""
    ended(
        (
            Tally(item.schedule, Status.COMPLETED, item.returned)
            for item in completions
            if item.schedule is not None
        ),
        using=using,
    )


def ended(tallies: Iterable[Tally], *, using: str) -> None:
    """Count ends, those of one schedule with one statement, in the order of their ids."""
    by_schedule: defaultdict[int, list[Tally]] = defaultdict(list)
    for tally in tallies:
        by_schedule[tally.schedule].append(tally)
    for schedule, found in sorted(by_schedule.items()):
        last, count = found[-1], len(found)
        # MySQL works them out in this order, each with the new values of those before it.
        ScheduleModel.objects.using(using).filter(pk=schedule).update(
            operation=Case(
                When(active_count__gt=count, then=Value(Operation.RUNNING)),
                default=Value(Operation.IDLE),
            ),
            # A subtraction below zero is an error on MySQL, and refused elsewhere.
            active_count=Case(
                When(active_count__gt=count, then=F("active_count") - count), default=Value(0)
            ),
            success_count=F("success_count") + sum(t.status == Status.COMPLETED for t in found),
            failure_count=F("failure_count") + sum(t.status == Status.FAILED for t in found),
            last_ended=DatabaseNow(),
            last_status=last.status,
            raw_last_result=last.returned,
            last_error=last.error,
        )


def workflow_ended(workflow: WorkflowModel, status: str, *, using: str) -> None:
    """Count the end of a run, if a schedule has started it."""
    if workflow.schedule_id is not None:
        ended([Tally(workflow.schedule_id, status, error=workflow.error)], using=using)


def workflow_revived(workflow: WorkflowModel, *, using: str) -> None:
    """Count a run that goes on after its end."""
    if workflow.schedule_id is not None:
        add(workflow.schedule_id, 1, using=using)


def revived(rows: QuerySet[TaskModel], *, using: str) -> None:
    """Count rows that are about to run again, and lock them."""
    for schedule, count in _by_schedule(rows):
        add(schedule, count, using=using)


def withdrawn(rows: QuerySet[TaskModel], reason: str, *, using: str) -> None:
    """Count rows that wait and are about to be cancelled."""
    for schedule, count in _by_schedule(rows):
        ended([Tally(schedule, Status.CANCELLED, error=reason)] * count, using=using)


def add(schedule: int, count: int, *, using: str) -> None:
    """Count what has begun."""
    ScheduleModel.objects.using(using).filter(pk=schedule).update(
        active_count=F("active_count") + count, operation=Operation.RUNNING
    )


def _by_schedule(rows: QuerySet[TaskModel]) -> list[tuple[int, int]]:
    locked = rows.filter(schedule__isnull=False).order_by("pk").select_for_update()
    counts: defaultdict[int, int] = defaultdict(int)
    for schedule in locked.values_list("schedule", flat=True):
        counts[schedule or 0] += 1
    return sorted(counts.items())


def sweep(*, using: str) -> None:
    """Set the numbers of what runs anew, for what was deleted past us."""
    busy = ScheduleModel.objects.using(using).filter(active_count__gt=0)
    for schedule, count in list(busy.values_list("pk", "active_count")):
        found = active(schedule, using=using)
        if found < count:
            # Unless somebody has counted meanwhile.
            busy.filter(pk=schedule, active_count=count).update(
                operation=Operation.RUNNING if found else Operation.IDLE, active_count=found
            )


def active(schedule: int, *, using: str) -> int:
    """Return how many starts of a schedule have not ended, by the rows."""
    rows = TaskModel.objects.using(using).filter(schedule=schedule, status__in=_ACTIVE)
    runs = WorkflowModel.objects.using(using).filter(
        schedule=schedule, status=WorkflowStatus.RUNNING
    )
    return rows.count() + runs.count()
