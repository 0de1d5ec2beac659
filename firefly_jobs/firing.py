"""Start what schedules are due for: move ``next_run`` and write the call, in one transaction.

There is no scheduler process.  Every consumer looks, and the lock on the schedule's row
decides which of them fires an occurrence.  Whoever is killed in between has moved nothing
and written nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import InterfaceError, OperationalError, connections, transaction
from django.db.models import F, Min, Q, QuerySet

from . import databases, enqueue
from .attempts import describe
from .checkpoints import reach
from .databases.functions import DatabaseNow
from .declarations import Misfire, Occurrence, Overlap, callee
from .exceptions import ScheduleError
from .jobs import Job
from .models import ScheduleModel, TaskModel, WorkflowModel
from .planning import call_of, locked
from .recurrence import Recurrence, due, jitter_seconds
from .schedule_models import Operation
from .states import Status

logger = logging.getLogger("firefly_jobs")

# One that queues behind what it has started is looked at so often.
QUEUED_LOOK_SECONDS = 1.0
# Schedules per transaction, and occurrences of one that are made up for in it.
BATCH_SIZE, OCCURRENCES_MAX = 100, 1_000


class Fired(NamedTuple):
    """What one look at the schedules has come to.

    Attributes:
        calls: How many calls were started.
        unknown: Schedules that are due, and of which this process does not know the call.
        is_all: Whether nothing else is due that this process could fire.
    """

    calls: int
    unknown: frozenset[int]
    is_all: bool


def seconds_until_next(*, using: str, besides: Collection[int] = ()) -> float | None:
    """Return when the next schedule is due, by the database's clock; ``None``: never."""
    rows = _planned(using, besides)
    found = rows.aggregate(
        next=Min("next_run", filter=~_QUEUES), queued=Min("next_run", filter=_QUEUES)
    )
    if found["next"] is found["queued"] is None:
        return None
    # Not in one statement with the others: an aggregate over no rows has no clock on MariaDB.
    now = rows.values_list(DatabaseNow(), flat=True)[0]
    moments = [(m - now).total_seconds() for m in (found["next"],) if m is not None]
    if found["queued"] is not None:
        moments.append(max((found["queued"] - now).total_seconds(), QUEUED_LOOK_SECONDS))
    return float(min(moments))


# Behind what it has started and what has not ended.
_QUEUES = Q(overlap=Overlap.QUEUE, active_count__gt=0)


def _planned(using: str, besides: Collection[int]) -> QuerySet[ScheduleModel]:
    return ScheduleModel.objects.using(using).filter(next_run__isnull=False).exclude(pk__in=besides)


def fire_due(*, using: str, besides: Collection[int] = ()) -> Fired:
    """Fire up to ``BATCH_SIZE`` schedules that are due and that nobody else is firing.

    Args:
        using: Database alias.
        besides: Schedules that are not looked at.
    """
    unknown: set[int] = set()
    with databases.of(using).own_transaction(connections[using]):
        rows = locked(using, skips=True).filter(next_run__lte=DatabaseNow()).exclude(_QUEUES)
        found = list(rows.exclude(pk__in=besides).order_by("next_run", "pk")[:BATCH_SIZE])
        calls, is_all = 0, len(found) < BATCH_SIZE
        for row in found:
            try:
                recurrence = _insist(row.recurrence)
            except (ValueError, ImproperlyConfigured) as error:
                # Another consumer may have what it takes to read it, such as cronsim.
                logger.error("Schedule %s cannot be read here: %s", row.name, error)  # noqa: TRY400 - it says all
                unknown.add(row.pk)
                continue
            try:
                call, problem = call_of(row), None
            except Exception as error:  # noqa: BLE001 - what a row says may be wrong in any way
                call, problem = None, error
            if call is None and problem is None:
                unknown.add(row.pk)
                continue
            starts, is_last = _fire(row, recurrence, call, problem, using)
            calls, is_all = calls + starts, is_all and is_last
        reach("firing")
    reach("fired")
    return Fired(calls, frozenset(unknown), is_all)


def _insist(recurrence: Recurrence | None) -> Recurrence:
    if recurrence is None:
        message = "It has a next run, and neither a cron expression nor an interval."
        raise ValueError(message)
    return recurrence


def _fire(
    row: Any, recurrence: Recurrence, call: Any, problem: Exception | None, using: str
) -> tuple[int, bool]:
    """Fire a schedule that is due and locked; return how often, and whether that is all for now."""
    misfire, limit = _policy(row)
    found = due(
        recurrence,
        next_run=row.next_run,
        now=row.now,
        misfire=misfire,
        ends=row.ends_at,
        limit=max(limit, 1),
    )
    moments = found.occurrences[:limit]
    starts = 0
    if problem is None:
        try:
            with transaction.atomic(using=using):
                starts = _start_all(row, call, moments, using)
        except (OperationalError, InterfaceError):
            raise
        except Exception as error:  # noqa: BLE001 - building a call runs the project's code
            problem = error
    if starts:
        _count(row.pk, starts, callee(call), using)
    if problem is not None and moments:
        _note_problem(row, problem, len(moments), using)
    next_run = found.next_run
    # What a taken unique key has left out is no run; what could not be written is a failed one.
    runs = starts if problem is None else len(moments)
    if row.max_runs is not None and _planned_runs(row) + runs >= row.max_runs:
        next_run = None
    rows = ScheduleModel.objects.using(using).filter(pk=row.pk, next_run=row.next_run)
    if rows.update(next_run=next_run) != 1:
        message = f"Schedule {row.name!r} was moved by somebody else, so nothing was started."
        raise ScheduleError(message)
    return starts, next_run is None or next_run > row.now


def _policy(row: Any) -> tuple[str, int]:
    """Return what becomes of missed occurrences, and how many may be started at most."""
    limit = OCCURRENCES_MAX
    if row.max_runs is not None:
        limit = max(row.max_runs - _planned_runs(row), 0)
    if row.overlap == Overlap.SKIP and row.active_count:
        return Misfire.SKIP, 0
    if row.overlap == Overlap.QUEUE:
        # The first is late because it had to wait, or because nobody was there.
        had_to_wait = row.last_ended is not None and row.last_ended >= row.next_run
        return (Misfire.ALL if had_to_wait else row.misfire), min(limit, 1)
    return row.misfire, min(limit, OCCURRENCES_MAX)


def _planned_runs(row: Any) -> int:
    return int(row.run_count - row.manual_count)


def _start_all(row: Any, call: Any, moments: Collection[datetime], using: str) -> int:
    occurrences = [Occurrence(row.pk, moment) for moment in moments]
    if not isinstance(call, Job):
        for occurrence in occurrences:
            call.start(occurrence)
        return len(occurrences)
    tasks = [_row(call, occurrence, row.jitter) for occurrence in occurrences]
    return len(_insert(tasks, using))


def _row(call: Job, occurrence: Occurrence, jitter: float) -> TaskModel:
    row = call.row()
    row.schedule_id, row.occurrence = occurrence.schedule, occurrence.moment
    row.is_manual = occurrence.is_manual
    if occurrence.moment is not None:
        row.not_before = occurrence.moment + timedelta(
            seconds=jitter_seconds(str(occurrence.schedule), occurrence.moment, jitter)
        )
    return row


def _insert(rows: list[TaskModel], using: str) -> list[TaskModel]:
    """Write those whose unique keys are free."""
    keys = {row.active_key for row in rows if row.active_key is not None}
    if keys:
        # Not by trying: who has one may be about to end, and waits for the schedule's row then.
        held = TaskModel.objects.using(using).filter(active_key__in=keys)
        taken = set(held.values_list("active_key", flat=True))
        free = []
        for row in rows:
            if row.active_key is None or row.active_key not in taken:
                free.append(row)
                taken.add(row.active_key)
        rows = free
    for row in rows:
        row.on_conflict = "return"
    written = enqueue.insert_many(rows, using=using)
    return [row for row, own in zip(written, rows, strict=True) if row is own]


def run_now(pk: int, *, using: str) -> TaskModel | WorkflowModel:
    """Start one more call of a schedule at once; see ``ScheduleModel.run_now``."""
    with databases.of(using).own_transaction(connections[using]):
        row = locked(using).get(pk=pk)
        call = None if row.is_retired else call_of(row)
        if call is None:
            reason = "its declaration has gone" if row.is_retired else "its call is not known here"
            message = (
                f"Schedule {row.name!r} was not started: {reason}. Import the module that "
                f"declares it, or delete the schedule."
            )
            raise ScheduleError(message)
        occurrence = Occurrence(pk, None)
        started: TaskModel | WorkflowModel
        if isinstance(call, Job):
            written = _insert([_row(call, occurrence, 0.0)], using)
            if not written:
                message = (
                    f"Schedule {row.name!r} was not started: a call with its unique key has not "
                    f"ended yet."
                )
                raise ScheduleError(message)
            started = written[0]
        else:
            started = call.start(occurrence)
        _count(pk, 1, callee(call), using, by_hand=1)
    return started


def _count(pk: int, starts: int, func_name: str, using: str, *, by_hand: int = 0) -> None:
    ScheduleModel.objects.using(using).filter(pk=pk).update(
        run_count=F("run_count") + starts,
        manual_count=F("manual_count") + by_hand,
        active_count=F("active_count") + starts,
        operation=Operation.RUNNING,
        last_run=DatabaseNow(),
        func_name=func_name,
    )


def _note_problem(row: Any, problem: Exception, count: int, using: str) -> None:
    """Count occurrences that could not even be written as failed: nobody else would tell."""
    logger.error(
        "Schedule %s could not start its call: %s", row.name, describe(problem), exc_info=problem
    )
    ScheduleModel.objects.using(using).filter(pk=row.pk).update(
        run_count=F("run_count") + count,
        failure_count=F("failure_count") + count,
        last_run=DatabaseNow(),
        last_ended=DatabaseNow(),
        last_status=Status.FAILED,
        raw_last_result=None,
        last_error=describe(problem),
    )
