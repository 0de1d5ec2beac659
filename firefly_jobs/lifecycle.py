"""Change existing rows: claim, settle, release, rescue, cancel, retry, delete.

The only writer of ``status`` on rows that exist.  A running row changes only for the
holder of its fence: every such UPDATE names id, status and fence, and one private
helper, :func:`_held`, says so (``databases`` says the same in its batched statements).
Whoever matches no row has lost the lease and changes nothing.

What is due, stale or late is decided by the database's clock.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from django.db import DatabaseError, connections
from django.db.models import F, QuerySet

from . import databases
from .attempts import Claim, Ended, Settlement, decide_rescued
from .checkpoints import reach
from .conf import get_settings
from .databases import Completion
from .databases.functions import DatabaseNow, SecondsFromNow
from .exceptions import LeaseLost
from .models import ConsumerModel, TaskAttempt, TaskModel
from .states import TRANSITIONS, Status

logger = logging.getLogger("firefly_jobs")

# Rows deleted, or made due again, per transaction by the commands.
BATCH_SIZE = 1_000


def _held(claim: Claim, using: str) -> QuerySet[TaskModel]:
    """Return the row of ``claim`` as long as the claim still holds."""
    return TaskModel.objects.using(using).filter(
        pk=claim.id, status=Status.RUNNING, fence=claim.fence
    )


# --- claiming and giving back


def claim(
    *,
    using: str,
    consumer: int,
    queue: str,
    priority: int,
    limit: int,
    not_below: Any = None,
) -> list[Claim]:
    """Claim up to ``limit`` due rows of one queue and priority for ``consumer``.

    Args:
        using: Database alias.
        consumer: The claiming consumer's id.
        queue: One queue's name.
        priority: One priority.
        limit: How many rows at most.
        not_below: Look at no ``run_at`` below this; see ``claiming.py``.

    Returns:
        Claims in the order they should run.
    """
    reach("claiming")
    claims = databases.of(using).claim(
        connections[using],
        queue=queue,
        priority=priority,
        limit=limit,
        consumer=consumer,
        not_below=not_below,
    )
    if claims:
        reach("claimed")
    return claims


def release(claims: Iterable[Claim], *, using: str) -> int:
    """Give back claims whose call has not started; return how many were still held."""
    released = 0
    with databases.of(using).write_transaction(connections[using]):
        for item in sorted(claims):
            released += _held(item, using).update(
                status=Status.CREATED, consumer=None, started=None
            )
    return released


def claims_of(consumer: int, *, using: str) -> list[Claim]:
    """Return what the database thinks that ``consumer`` holds, at its current fences."""
    rows = TaskModel.objects.using(using).filter(consumer=consumer, status=Status.RUNNING)
    return _as_claims(rows)


def _as_claims(rows: QuerySet[TaskModel, TaskModel]) -> list[Claim]:
    return [Claim._make(values) for values in rows.order_by("id").values_list(*Claim._fields)]


# --- settling


def complete(completion: Completion, *, using: str) -> None:
    """Complete a row inside the transaction that is open on this thread's connection.

    Raises:
        LeaseLost: If the row is not held under this fence any more.
    """
    if not databases.of(using).complete(connections[using], completion):
        raise lease_lost(completion)
    reach("settling")


def complete_many(completions: Sequence[Completion], *, using: str) -> list[Completion]:
    """Complete rows whose calls touched no database, as one statement if all is well.

    Returns:
        Those that were not held any more.
    """
    held = databases.of(using).complete_many(connections[using], completions)
    reach("settled")
    if held == len(completions):
        return []
    # Somebody took at least one of them over, or an earlier try did succeed.  Each row
    # was compared by itself, so the others are completed.
    done = set(
        TaskModel.objects.using(using)
        .filter(pk__in=[c.id for c in completions], status=Status.COMPLETED)
        .values_list("id", "fence")
    )
    return [c for c in completions if (c.id, c.fence) not in done]


def settle(settlement: Settlement, *, using: str, consumer: int | None) -> None:
    """Write an outcome that is no plain success, and its history, in one transaction.

    Raises:
        LeaseLost: If the row is not held under this fence any more.
    """
    with databases.of(using).write_transaction(connections[using]):
        if not _write(settlement, using):
            raise lease_lost(settlement.claim)
        if settlement.has_started and settlement.ended is not Ended.COMPLETED:
            _attempt(settlement, consumer).save(using=using, force_insert=True)
        reach("settling")
    reach("settled")


def was_completed(claim: Claim, *, using: str) -> bool:
    """Whether the row was completed under this claim's fence: by nobody else, then."""
    rows = TaskModel.objects.using(using)
    return rows.filter(pk=claim.id, fence=claim.fence, status=Status.COMPLETED).exists()


def was_settled(claim: Claim | Completion, *, using: str) -> bool:
    """Whether the row was already settled under this claim's fence.

    Then it is no surprise that it is not held any more: either the answer to our own
    statement got lost on the way, or a rescuer or a person ended what had been taken from us.
    """
    return (
        TaskModel.objects.using(using)
        .filter(pk=claim.id, fence=claim.fence, status__in=[s for s in Status if s.is_terminal])
        .exists()
    )


def lease_lost(claim: Claim | Completion) -> LeaseLost:
    """Return the event that a claim does not hold any more."""
    return LeaseLost(
        f"Task {claim.id} is no longer held under fence {claim.fence}: this consumer was rescued, "
        f"or the row was changed by hand. Its outcome was dropped and its transaction rolled back."
    )


def _write(settlement: Settlement, using: str) -> bool:
    claim = settlement.claim
    if settlement.status not in TRANSITIONS[Status.RUNNING]:
        message = f"A running task cannot become {settlement.status}."
        raise ValueError(message)
    values: dict[str, Any] = {"status": settlement.status, "duration": settlement.duration}
    if settlement.status is Status.CREATED:
        values["consumer"] = None
    if not settlement.has_started:
        values["started"] = None
    if settlement.status is Status.FAILED:
        values["failed"] = DatabaseNow()
    if settlement.status is Status.COMPLETED:
        values.update(completed=DatabaseNow(), failed=None, error="")
        values["raw_returned"] = settlement.returned
    if settlement.delay_seconds is not None:
        values["not_before"] = SecondsFromNow(settlement.delay_seconds)
    if settlement.error is not None:
        values["error"] = settlement.error
    for column, growth in (
        ("retry_attempts", settlement.retries),
        ("rescues", settlement.rescues),
        ("lost_alone", settlement.losses_alone),
    ):
        if growth:
            values[column] = F(column) + growth
    return _held(claim, using).update(**values) == 1


def _attempt(settlement: Settlement, consumer: int | None) -> TaskAttempt:
    return TaskAttempt(
        task_id=settlement.claim.id,
        number=settlement.claim.attempt,
        fence=settlement.claim.fence,
        outcome=settlement.ended,
        consumer=consumer,
        duration=settlement.duration,
        error=settlement.error or "",
        traceback=settlement.traceback,
    )


# --- consumers and their leases


def register(*, name: str, queues: Sequence[str], lease_seconds: float, using: str) -> int:
    """Write the row of a consumer that starts, and return its id."""
    row = ConsumerModel(name=name[:200], queues=",".join(queues), lease_seconds=lease_seconds)
    row.save(using=using, force_insert=True)
    return row.pk


def unregister(consumer: int, *, using: str) -> None:
    """Delete the row of a consumer that has given back everything."""
    ConsumerModel.objects.using(using).filter(pk=consumer).delete()


def renew(consumer: int, *, using: str) -> bool:
    """Write a heartbeat; return ``False`` if the consumer was rescued meanwhile."""
    renewed = (
        ConsumerModel.objects.using(using)
        .filter(pk=consumer)
        .update(renewed_at=DatabaseNow(), suspected_at=None)
    )
    return renewed == 1


def suspects(*, using: str, besides: int) -> list[ConsumerModel]:
    """Take the first look: mark consumers whose lease is over, and return all marked ones."""
    others = ConsumerModel.objects.using(using).exclude(pk=besides)
    late = others.filter(
        renewed_at__lt=SecondsFromNow(-F("lease_seconds")), suspected_at__isnull=True
    )
    # Read before write: an idle SQLite database is not locked by every heartbeat.
    if late.exists():
        late.update(suspected_at=DatabaseNow())
    return list(others.filter(suspected_at__isnull=False))


def end_sessions(suspect: ConsumerModel, *, using: str) -> None:
    """End the database sessions of a dead consumer, so that its row locks go with it.

    What is not permitted is left to the server, which notices a vanished machine later.
    """
    is_silent = ConsumerModel.objects.using(using).filter(pk=suspect.pk, suspected_at__isnull=False)
    if not is_silent.exists():
        return
    try:
        ended = databases.of(using).end_sessions(connections[using], suspect.pk)
    except DatabaseError as error:
        logger.info("Could not end the sessions of consumer %s: %s", suspect, error)
    else:
        if ended:
            logger.warning("Ended %s database sessions of consumer %s", ended, suspect)


def rescue(suspect: ConsumerModel, *, using: str) -> list[Settlement] | None:
    """Take the second look: if ``suspect`` did not renew since the first, free its rows.

    Rows that another transaction has locked (a consumer paused between settling and
    COMMIT) are left for the next round, and the consumer's row with them.

    Returns:
        What became of its rows, or ``None`` if it has renewed.
    """
    database, settings = databases.of(using), get_settings()
    with database.write_transaction(connections[using]):
        consumer = (
            ConsumerModel.objects.using(using)
            .select_for_update(skip_locked=database.can_skip_locked)
            .filter(pk=suspect.pk, suspected_at__isnull=False)
            .first()
        )
        # Compared here, because SQLite compares moments as text, and its own clock writes
        # fewer digits than Django sends.
        if consumer is None or consumer.renewed_at != suspect.renewed_at:
            return None
        rows = TaskModel.objects.using(using).filter(consumer=suspect.pk, status=Status.RUNNING)
        held = rows.count()
        claims = _as_claims(rows.select_for_update(skip_locked=database.can_skip_locked))
        settlements = [
            decide_rescued(
                item,
                was_alone=held == 1,
                consumer=str(suspect),
                max_rescues=settings.MAX_RESCUES,
            )
            for item in claims
        ]
        settlements = [item for item in settlements if _write(item, using)]
        TaskAttempt.objects.using(using).bulk_create(
            [_attempt(item, suspect.pk) for item in settlements]
        )
        if len(claims) == held:
            consumer.delete(using=using)
    return settlements


def orphans(*, using: str) -> list[Claim]:
    """Return running rows whose consumer has no row: claimed by one that was already rescued."""
    consumers = ConsumerModel.objects.using(using).values("pk")
    rows = TaskModel.objects.using(using).filter(status=Status.RUNNING)
    return _as_claims(rows.exclude(consumer__in=consumers))


def rescue_orphans(claims: Sequence[Claim], *, using: str) -> None:
    """Free rows that :func:`orphans` returned at two looks in a row."""
    max_rescues = get_settings().MAX_RESCUES
    for item in claims:
        settlement = decide_rescued(
            item, was_alone=False, consumer="(unknown)", max_rescues=max_rescues
        )
        try:
            settle(settlement, using=using, consumer=None)
        except LeaseLost as event:
            logger.debug("%s", event)
        else:
            logger.warning("Rescued task %s, whose consumer was gone", item.id)


# --- what people do


def cancel(ids: Sequence[int], *, using: str) -> int:
    """Cancel rows that have not started; return how many were cancelled."""
    return (
        TaskModel.objects.using(using)
        .filter(pk__in=ids, status__in=[Status.CREATED, Status.BLOCKED])
        .update(status=Status.CANCELLED, error="cancelled before it started")
    )


def retry(ids: Sequence[int], *, using: str) -> int:
    """Make failed or cancelled rows due now, with all their retries; return how many."""
    ended = [Status.FAILED, Status.CANCELLED]
    return (
        TaskModel.objects.using(using)
        .filter(pk__in=ids, status__in=ended)
        .update(
            status=Status.CREATED,
            # Its place in the queue is by the time it became due, and that is now.
            not_before=DatabaseNow(),
            failed=None,
            started=None,
            duration=None,
            error="",
            consumer=None,
            retry_attempts=0,
            rescues=0,
            lost_alone=0,
        )
    )


def delete(ids: Sequence[int], *, using: str) -> int:
    """Delete ended rows and their history; return how many rows were deleted."""
    connection = connections[using]
    database = databases.of(using)
    with database.write_transaction(connection):
        # Locked first, so that a row which a person just revived is not deleted.
        ended = list(
            TaskModel.objects.using(using)
            .select_for_update(skip_locked=database.can_skip_locked)
            .filter(pk__in=ids, status__in=[s for s in Status if s.is_terminal])
            .values_list("pk", flat=True)
        )
        TaskModel.objects.using(using).filter(pk__in=ended).delete()
    return len(ended)
