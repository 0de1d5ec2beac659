"""Write down what happens to tasks, if ``FIREFLY_JOBS["KEEP_EVENTS"]`` says so.

Each event is written in the transaction of what it tells, many with one statement; only that
rows were claimed is told right after the claim, which is a statement of its own.  That a call
has started is told together with its end, as nothing is written when it starts; so is the
claim of a call that goes on elsewhere, since most such claims only look, and tell nothing.

While none are kept this costs one look at the settings per batch.  Nothing here decides: what
is told is what ``enqueue``, ``lifecycle``, ``admission``, ``dependencies`` and ``rebuilding``
have written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from django.db import connections, transaction
from django.db.models import QuerySet

from . import databases, registry
from .attempts import Claim, Ended, Settlement
from .conf import get_settings
from .databases import Completion
from .databases.functions import SecondsFromNow
from .event_models import EventKind
from .models import TaskEvent, TaskModel
from .states import Status

BATCH_SIZE = 1_000
# What one sweep deletes at most: so many times so many.
SWEEP_BATCHES, SWEEP_BATCH_SIZE = 50, 5_000


def are_kept() -> bool:
    """Whether events are written."""
    return get_settings().KEEP_EVENTS is not False


def together(using: str) -> AbstractContextManager[Any]:
    """Return a transaction, where there is none, for a change and its events.

    While no events are kept the change is one statement, and needs none.
    """
    connection = connections[using]
    if connection.in_atomic_block or not are_kept():
        return transaction.mark_for_rollback_on_error(using=using)
    return databases.of(using).write_transaction(connection)


def _write(found: Iterable[TaskEvent], using: str) -> None:
    TaskEvent.objects.using(using).bulk_create(list(found), batch_size=BATCH_SIZE)


# --- what happens


def scheduled(rows: Iterable[TaskModel], *, using: str) -> None:
    """Tell that ``rows`` were written."""
    if are_kept():
        _write((TaskEvent(task_id=row.pk, kind=EventKind.SCHEDULED) for row in rows), using)


def told(ids: Iterable[int], kind: EventKind, message: str = "", *, using: str) -> None:
    """Tell the same about rows that no consumer holds."""
    if are_kept():
        _write((TaskEvent(task_id=pk, kind=kind, message=message) for pk in ids), using)


def changing(rows: QuerySet[TaskModel], kind: EventKind, message: str = "", *, using: str) -> None:
    """Lock ``rows``, and tell what the next statement of the open transaction does to them."""
    if not are_kept():
        return
    locked = rows.select_for_update().order_by("pk").values_list("pk", "status", "consumer")
    _write(
        (
            TaskEvent(
                task_id=pk,
                kind=kind,
                consumer=consumer if status == Status.RUNNING else None,
                message=message,
            )
            for pk, status, consumer in list(locked)
        ),
        using,
    )


def reviving(rows: QuerySet[TaskModel], *, using: str) -> None:
    """Lock ``rows``, which have ended, and tell that they are going to run again."""
    changing(rows, EventKind.SCHEDULED, "to run again", using=using)


def claimed(claims: Sequence[Claim], *, using: str, consumer: int) -> None:
    """Tell that rows were claimed; of what is only looked at, that waits for what is seen."""
    if claims and are_kept():
        found = [c for c in claims if not registry.is_looked_at(c.func_name)]
        kind = EventKind.CLAIMED
        _write((TaskEvent(task_id=c.id, kind=kind, consumer=consumer) for c in found), using)


def completed(completions: Iterable[Completion], *, using: str, consumer: int | None) -> None:
    """Tell that rows were completed, and when their calls had started."""
    if not are_kept():
        return
    found = []
    for item in completions:
        if registry.is_looked_at(item.func_name):
            found.append(_since(item.id, EventKind.CLAIMED, item.duration, consumer))
        found.append(_since(item.id, EventKind.STARTED, item.duration, consumer))
        found.append(TaskEvent(task_id=item.id, kind=EventKind.COMPLETED, consumer=consumer))
    _write(found, using)


def one_completed(completion: Completion, *, using: str, consumer: int | None) -> None:
    """Do the same for one, without a list while no events are kept."""
    if are_kept():
        completed([completion], using=using, consumer=consumer)


def settled(settlements: Iterable[Settlement], *, using: str, consumer: int | None) -> None:
    """Tell how attempts have ended, and when they had started; nothing of a look without news."""
    if not are_kept():
        return
    found = []
    for item in settlements:
        if not item.is_notable:
            continue
        if registry.is_looked_at(item.claim.func_name):
            found.append(_since(item.claim.id, EventKind.CLAIMED, item.duration, consumer))
        # Nobody knows it of a call whose process has died.
        if item.has_started and item.duration:
            found.append(_since(item.claim.id, EventKind.STARTED, item.duration, consumer))
        found.append(
            TaskEvent(
                task_id=item.claim.id,
                kind=_kind_of(item),
                consumer=consumer,
                message=item.error or "",
            )
        )
    _write(found, using)


def _since(pk: int, kind: EventKind, duration: float, consumer: int | None) -> TaskEvent:
    at: Any = SecondsFromNow(-duration)
    return TaskEvent(task_id=pk, kind=kind, at=at, consumer=consumer)


def _kind_of(settlement: Settlement) -> EventKind:
    if settlement.ended is Ended.LOST and not settlement.duration:
        return EventKind.RESCUED
    return EventKind(settlement.ended.value)


# --- what is old


def sweep(*, using: str) -> int:
    """Delete events that are older than they are kept for; return how many.

    Bounded; what is left is deleted by the next sweep.
    """
    keep = get_settings().KEEP_EVENTS
    if isinstance(keep, bool):
        return 0
    events = TaskEvent.objects.using(using)
    deleted = 0
    for _ in range(SWEEP_BATCHES):
        # By primary key, which rises with time: so there is no index of moments to keep.
        first = events.order_by("pk").values_list("pk", flat=True)
        last = first[SWEEP_BATCH_SIZE - 1 : SWEEP_BATCH_SIZE].first()
        oldest = events.all() if last is None else events.filter(pk__lte=last)
        count, _ = oldest.filter(at__lt=SecondsFromNow(-keep)).delete()
        deleted += count
        if count < SWEEP_BATCH_SIZE:
            break
    return deleted
