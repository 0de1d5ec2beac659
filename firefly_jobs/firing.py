"""Start what schedules are due for: move ``next_run`` and write the call, in one transaction.

There is no scheduler process.  Every consumer looks, and the lock on the schedule's row
decides which of them fires an occurrence.  Whoever is killed in between has moved nothing
and written nothing.  Each schedule has a transaction of its own, so what one of them waits
for, or cannot do, keeps the others from nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime
from enum import Enum, auto
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.db.models import F, Q, QuerySet

from . import databases, enqueue
from .attempts import describe
from .checkpoints import reach
from .databases.functions import DatabaseNow, SecondsFromNow
from .declarations import Misfire, Occurrence, Overlap
from .exceptions import ScheduleError
from .jobs import Job
from .models import ScheduleModel, TaskModel, WorkflowModel
from .planning import call_of, locked
from .recurrence import Recurrence, due
from .schedule_models import Operation
from .states import Status

logger = logging.getLogger("firefly_jobs")

# Schedules that one look fires, and occurrences of one that are made up for at once.
BATCH_SIZE, OCCURRENCES_MAX = 100, 1_000


class Agenda(NamedTuple):
    """What there is to do.

    Attributes:
        seconds: Until the first schedule is due that may fire; ``None``: none will be.
        queued: Schedules that are about to be due, and wait for the end of what they have started.
        queued_seconds: Until the first of those is due that is not yet.
    """

    seconds: float | None
    queued: frozenset[int]
    queued_seconds: float | None = None


class Fired(NamedTuple):
    """What one look at the schedules has come to.

    Attributes:
        calls: How many calls were started.
        unknown: Schedules that are due, and of which this process does not know the call.
        held: Schedules that would have had to wait for somebody else, or met an error.
        error: What has ended the look, with its connection.
    """

    calls: int
    unknown: frozenset[int]
    held: frozenset[int]
    error: Exception | None = None


class _Left(Enum):
    """Why a schedule that is due was left for later."""

    UNKNOWN = auto()
    HELD = auto()


# Behind what it has started and what has not ended.
_QUEUES = Q(overlap=Overlap.QUEUE, active_count__gt=0)


def agenda(*, using: str, ahead_seconds: float, besides: Collection[int] = ()) -> Agenda:
    """Return what there is to do, by the database's clock; one statement if nothing is near.

    Args:
        using: Database alias.
        ahead_seconds: How far ahead it is looked for what queues.
        besides: Schedules that are not looked at.
    """
    rows = _planned(using, besides)
    seconds = _seconds_until_first(rows)
    if seconds is None or seconds > ahead_seconds:
        return Agenda(seconds, frozenset())
    soon = rows.filter(_QUEUES, next_run__lte=SecondsFromNow(ahead_seconds))
    queued = frozenset(soon.values_list("pk", flat=True))
    if not queued:
        return Agenda(seconds, queued)
    later = _seconds_until_first(soon.filter(next_run__gt=DatabaseNow()))
    return Agenda(_seconds_until_first(rows.exclude(_QUEUES)), queued, later)


def _seconds_until_first(rows: QuerySet[ScheduleModel]) -> float | None:
    # Both moments of one row: an aggregate over no rows has no clock on MariaDB.
    found = rows.order_by("next_run", "pk").values_list("next_run", DatabaseNow()).first()
    if found is None or found[0] is None:
        return None
    return float((found[0] - found[1]).total_seconds())


def _planned(using: str, besides: Collection[int]) -> QuerySet[ScheduleModel]:
    return ScheduleModel.objects.using(using).filter(next_run__isnull=False).exclude(pk__in=besides)


def fire_due(*, using: str, besides: Collection[int] = ()) -> Fired:
    """Fire up to ``BATCH_SIZE`` schedules that are due and that nobody else is firing.

    Args:
        using: Database alias.
        besides: Schedules that are not looked at.
    """
    database, connection = databases.of(using), connections[using]
    due_now = _due_now(using).exclude(pk__in=besides).order_by("next_run", "pk")
    calls, left, broken = 0, dict[int, _Left](), None
    for pk in list(due_now.values_list("pk", flat=True)[:BATCH_SIZE]):
        try:
            with database.own_transaction(connection):
                starts = _fire(pk, using)
                reach("firing")
            reach("fired")
        except Exception as error:
            if database.is_busy(error):
                raise
            left[pk] = _Left.HELD
            if not database.is_conflict(error):
                logger.warning("Firing schedule %s failed, will try again", pk, exc_info=error)
            if not database.is_usable(connection):
                broken = error
                break
        else:
            if isinstance(starts, _Left):
                left[pk] = starts
            else:
                calls += starts
    unknown, held = ({pk for pk, why in left.items() if why is one} for one in _Left)
    return Fired(calls, frozenset(unknown), frozenset(held), broken)


def _due_now(using: str) -> QuerySet[ScheduleModel]:
    return _planned(using, ()).exclude(_QUEUES).filter(next_run__lte=DatabaseNow())


def note_waiting(schedules: Collection[int], *, using: str) -> None:
    """Note of schedules that are due and wait for the end of a call that somebody saw them wait.

    Else nobody could tell later what had to wait from what was missed.  Written once for each
    occurrence.
    """
    due_now = ScheduleModel.objects.using(using).filter(_QUEUES, next_run__lte=DatabaseNow())
    rows = due_now.filter(pk__in=schedules).defer("raw_last_result", "last_error")
    row: Any
    for row in rows.annotate(now=DatabaseNow()):
        with suppress(ValueError, ImproperlyConfigured):
            latest = _insist(row.recurrence).latest_until(row.now) or row.next_run
            if row.waited_until is None or row.waited_until < max(latest, row.next_run):
                due_now.filter(pk=row.pk).update(waited_until=row.now)


def _fire(pk: int, using: str) -> int | _Left:
    """Fire a schedule if it is still due; return how often, or why it was not for us to do."""
    rows = locked(using, skips=True).exclude(_QUEUES)
    row = rows.filter(pk=pk, next_run__lte=DatabaseNow()).first()
    if row is None:
        # Whoever has locked it fires it, or does something else with it.
        return _Left.HELD if _due_now(using).filter(pk=pk).exists() else 0
    try:
        recurrence = _insist(row.recurrence)
    except (ValueError, ImproperlyConfigured) as error:
        # Another consumer may have what it takes to read it, such as cronsim.
        logger.error("Schedule %s cannot be read here: %s", row.name, error)  # noqa: TRY400 - it says all
        return _Left.UNKNOWN
    misfire, limit = _policy(row)
    found = due(
        recurrence,
        next_run=row.next_run,
        now=row.now,
        misfire=misfire,
        ends=row.ends_at,
        limit=max(limit, 1),
    )
    moments, changes = found.occurrences[:limit], {}
    starts, problem = 0, None
    connection = connections[using]
    connection.errors_occurred = False
    try:
        # What one asks the database for may fail without undoing the rest.
        with transaction.atomic(using=using):
            call = call_of(row)
            if call is None:
                logger.warning("Schedule %s is due, and its call is not known here", row.name)
                return _Left.UNKNOWN
            starts = _start_all(row, call, moments, using)
    except BaseException as error:
        # Most of it is the project's code, which may ask other databases, and call sys.exit().
        if _has_ended_here(connection, error):
            raise
        problem = error
    if problem is None and starts:
        changes = _started(starts)
    elif problem is not None and moments:
        logger.error(
            "Schedule %s could not start its call: %s",
            row.name,
            describe(problem),
            exc_info=problem,
        )
        changes = _could_not_start(problem, len(moments))
    next_run = found.next_run
    # What a taken unique key has left out is no run; what could not be written is a failed one.
    runs = starts if problem is None else len(moments)
    if row.max_runs is not None and _planned_runs(row) + runs >= row.max_runs:
        next_run = None
    ScheduleModel.objects.using(using).filter(pk=pk).update(next_run=next_run, **changes)
    return starts


def _has_ended_here(connection: Any, error: BaseException) -> bool:
    """Whether an error has ended the open transaction, or says that others are in its way."""
    is_gone = connection.needs_rollback or connection.closed_in_transaction
    # Django notes of each connection whether a statement has failed there.
    is_ours = connection.errors_occurred and databases.of(connection.alias).is_lost(error)
    return bool(is_gone or is_ours)


def _insist(recurrence: Recurrence | None) -> Recurrence:
    if recurrence is None:
        message = "It has a next run, and neither a cron expression nor an interval."
        raise ValueError(message)
    return recurrence


def _policy(row: Any) -> tuple[str, int]:
    """Return what becomes of missed occurrences, and how many may be started at most."""
    limit = OCCURRENCES_MAX
    if row.max_runs is not None:
        limit = max(row.max_runs - _planned_runs(row), 0)
    if row.overlap == Overlap.SKIP and row.active_count:
        return Misfire.SKIP, 0
    if row.overlap == Overlap.QUEUE:
        # The first is late because it had to wait, or because nobody was there to see it wait.
        had_to_wait = row.waited_until is not None and row.waited_until >= row.next_run
        return (Misfire.ALL if had_to_wait else row.misfire), min(limit, 1)
    return row.misfire, min(limit, OCCURRENCES_MAX)


def _planned_runs(row: Any) -> int:
    return int(row.run_count - row.manual_count)


def _start_all(row: Any, call: Any, moments: Collection[datetime], using: str) -> int:
    if call.alias != using:
        message = (
            f"Its calls belong to database {call.alias!r}, and the schedule stands in {using!r}."
        )
        raise ScheduleError(message)
    occurrences = [Occurrence(row.pk, moment, row.jitter) for moment in moments]
    if not isinstance(call, Job):
        for occurrence in occurrences:
            call.start(occurrence)
        return len(occurrences)
    tasks = [_row(call, occurrence) for occurrence in occurrences]
    if any(task.active_key is not None for task in tasks):
        # Somebody may be about to take it, and the other schedules do not wait for that.
        databases.of(using).wait_briefly(connections[using])
    return len(_insert(tasks, using))


def _row(call: Job, occurrence: Occurrence) -> TaskModel:
    row = call.row()
    row.schedule_id, row.occurrence = occurrence.schedule, occurrence.moment
    row.is_manual = occurrence.is_manual
    if occurrence.due is not None:
        row.not_before = occurrence.due
    return row


def _insert(rows: list[TaskModel], using: str) -> list[TaskModel]:
    """Write those whose unique keys are free."""
    keys = {row.active_key for row in rows if row.active_key is not None}
    if keys:
        # Not by trying: who has one may be about to end, and waits for the schedule's row then.
        taken = databases.of(using).taken_keys(connections[using], sorted(keys))
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


def run_now(pk: int, *, using: str, user: Any = None) -> TaskModel | WorkflowModel:
    """Start one more call of a schedule at once; see ``ScheduleModel.run_now``."""
    with databases.of(using).own_transaction(connections[using]):
        row = locked(using).get(pk=pk)
        named = None if row.saved_job is None else row.saved_job.get_job(user=user)
        call = None if row.is_retired else call_of(row) if named is None else named.job
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
            written = _insert([_row(call, occurrence)], using)
            if not written:
                message = (
                    f"Schedule {row.name!r} was not started: a call with its unique key has not "
                    f"ended yet."
                )
                raise ScheduleError(message)
            started = written[0]
            if named is not None and user is not None:
                named.note_start(started)
        else:
            started = call.start(occurrence)
        by_hand = {"manual_count": F("manual_count") + 1}
        ScheduleModel.objects.using(using).filter(pk=pk).update(**_started(1), **by_hand)
    return started


def _started(count: int) -> dict[str, Any]:
    """Return what is written into the row of a schedule whose calls have started."""
    return {
        "run_count": F("run_count") + count,
        "active_count": F("active_count") + count,
        "operation": Operation.RUNNING,
        "last_run": DatabaseNow(),
    }


def _could_not_start(problem: BaseException, count: int) -> dict[str, Any]:
    """Return the same for calls that could not even be written: nobody else would tell."""
    return {
        "run_count": F("run_count") + count,
        "failure_count": F("failure_count") + count,
        "last_run": DatabaseNow(),
        "last_ended": DatabaseNow(),
        "last_status": Status.FAILED,
        "raw_last_result": None,
        "last_error": describe(problem),
    }
