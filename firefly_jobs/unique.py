"""Unique keys: at most one row with a key waits or runs.

The database's own constraint on ``active_key`` decides, so it holds between processes and
machines.  An INSERT that finds the key taken is no error of the caller's transaction; it
then looks who has it.  Between the two the holder may end: then the INSERT is tried again,
a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from django.db import OperationalError, connections

from . import admission, databases, events
from .event_models import EventKind
from .exceptions import TaskAlreadyScheduled
from .lines import pause_after_deadlock
from .models import TaskModel
from .states import TERMINAL, Status
from .wakeup import announce

# The key would have to change hands so often between two statements.
TRIES_MAX = 20
BATCH_SIZE = 1_000

# Inserts those of some rows whose keys are free, in their order, and returns which.
Write = Callable[[Any, list[TaskModel]], list[bool]]

# What the latest call says, where it replaces one that waits; and what that one has left.
_REPLACED = (
    *("func_name", "queue", "priority", "not_before", "raw_params", "retry_delay", "max_retries"),
    *("retry", "expires_at", "time_limit", "memory_limit", "label", "description"),
    *("metadata", "tags", "concurrency_key", "max_concurrent", "rate_key", "rate_limit"),
)
_RESET = {"retry_attempts": 0, "rescues": 0, "lost_alone": 0, "error": "", "started": None}


def insert(row: TaskModel, connection: Any, *, write: Write) -> TaskModel:
    """Write ``row``, or find the one that has its key.

    Args:
        row: What ``enqueue.build`` returned, with a key.
        connection: Where.
        write: Inserts rows whose keys are free.

    Raises:
        TaskAlreadyScheduled: If the key is taken, and the row's ``on_conflict`` says so, or
            what should be replaced runs already, or is part of a workflow.
    """
    database, alias = databases.of(connection.alias), connection.alias
    for left in reversed(range(TRIES_MAX)):
        try:
            if write(connection, [row])[0]:
                announce(alias, (row.queue,))
                return row
        except OperationalError as error:
            # On InnoDB several that insert a key which a holder has just given back, or whose
            # entry is not purged yet, share the gap and meet in a deadlock, which all but one
            # of them lose.  Outside of a transaction nothing else was lost.
            if connection.in_atomic_block or not left or not database.is_conflict(error):
                raise
            pause_after_deadlock(TRIES_MAX - left)
            continue
        if (found := _conflict(row, connection)) is not None:
            return found
    message = (
        f"Unique key {row.active_key!r} changed hands {TRIES_MAX} times while {row.func_name} was "
        f"to be scheduled. Too many schedule it at once; try again."
    )
    raise TaskAlreadyScheduled(message, None)


def insert_many(rows: list[TaskModel], keyed: list[int], connection: Any, *, write: Write) -> None:
    """Write those of ``rows`` that have a key, in the transaction that is open.

    Args:
        rows: All rows of a bulk; where a key is taken, its holder comes into the list.
        keyed: Which places have a key.
        connection: Where.
        write: As for :func:`insert`.

    Raises:
        TaskAlreadyScheduled: As for :func:`insert`.
    """
    # In the order of their keys from the first to the last, so that two bulks which have
    # several in common wait for each other and never in a circle.
    ordered = sorted(keyed, key=lambda place: rows[place].active_key or "")
    for start in range(0, len(ordered), BATCH_SIZE):
        places = ordered[start : start + BATCH_SIZE]
        firsts = list({rows[place].active_key: place for place in reversed(places)}.values())[::-1]
        are_free = write(connection, [rows[place] for place in firsts])
        done = {place for place, is_free in zip(firsts, are_free, strict=True) if is_free}
        for place in places:
            if place not in done:
                rows[place] = insert(rows[place], connection, write=write)


def holder_of(key: str, connection: Any) -> TaskModel | None:
    """Return the row that has a key, though a snapshot may not show it."""
    pk = databases.of(connection.alias).holder(connection, key)
    if pk is None:
        return None
    # Not shown by a snapshot that is older: then it is committed, and another session sees it.
    found = TaskModel.objects.using(connection.alias).filter(pk=pk).first()
    return found or _seen_outside(pk, connection.alias)


def _conflict(row: TaskModel, connection: Any) -> TaskModel | None:
    """Do what the row's ``on_conflict`` says; return ``None`` if the key may be free now."""
    alias, key = connection.alias, row.active_key or ""
    rows = TaskModel.objects.using(alias)
    if (existing := holder_of(key, connection)) is None:
        return None
    pk = existing.pk
    if existing.status in TERMINAL:
        # A consumer of a version without keys has settled it, or a snapshot shows an earlier life.
        ended = rows.filter(pk=pk, active_key=key, status__in=list(TERMINAL))
        if ended.update(active_key=None):
            return None
    if row.on_conflict == "return":
        return existing
    problem = existing.status
    if row.on_conflict == "replace":
        if existing.workflow_id is None:
            return _replace(row, pk, alias)
        # Others wait for what it returns, and it perhaps for others.
        problem = "part of a workflow and not replaced"
    message = (
        f"Task {pk} ({existing.func_name}) with unique key {key!r} is {problem}, so "
        f"{row.func_name} was not scheduled. Use on_conflict='return' to get that row instead."
    )
    raise TaskAlreadyScheduled(message, existing)


def _replace(row: TaskModel, pk: int, alias: str) -> TaskModel | None:
    waiting = [Status.CREATED, Status.BLOCKED]
    rows = TaskModel.objects.using(alias)
    values = {name: getattr(row, name) for name in _REPLACED}
    waits = rows.filter(pk=pk, active_key=row.active_key, status__in=waiting)
    # Mostly it was never claimed, so it stands in no line either, and one statement does.
    with events.together(alias):
        never_claimed = waits.filter(fence=0, limit_key__isnull=True)
        is_replaced = never_claimed.update(**values, **_RESET) or admission.start_over(
            pk, {**values, **_RESET}, key=row.active_key, using=alias
        )
        if is_replaced:
            events.told([pk], EventKind.SCHEDULED, "instead of a former call", using=alias)
    if is_replaced:
        announce(alias, (row.queue,))
        return rows.get(pk=pk)
    if databases.of(alias).holder(connections[alias], row.active_key or "") != pk:
        return None
    message = (
        f"Task {pk} with unique key {row.active_key!r} is running, so its arguments cannot be "
        f"replaced any more and {row.func_name} was not scheduled. Schedule it once that has "
        f"ended."
    )
    raise TaskAlreadyScheduled(message, rows.filter(pk=pk).first() or _seen_outside(pk, alias))


def _seen_outside(pk: int, alias: str) -> TaskModel | None:
    """Read a row on a connection of its own."""

    def read() -> TaskModel | None:
        try:
            return TaskModel.objects.using(alias).filter(pk=pk).first()
        finally:
            connections[alias].close()

    if not connections[alias].in_atomic_block:
        return None
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(read).result()
