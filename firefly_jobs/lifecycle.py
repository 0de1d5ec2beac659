"""Change existing rows: claim, settle, release, rescue, bury, cancel, retry, delete.

The only writer of ``status`` on rows that exist, but for what limits do to it (``admission``,
``lines``).  A running row changes only for the holder of its fence: every such UPDATE names
id, status and fence, and one helper, ``fencing.held``, says so (``databases`` says the same
in its batched statements).  Whoever matches no row has lost the lease and changes nothing.
A row that stands in a line lets the next one go when it stops running, in the same
transaction.

What is due, stale or late is decided by the database's clock.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any

from django.db import DatabaseError, IntegrityError, connections, transaction
from django.db.models import F, Q, QuerySet

from . import admission, databases, messenger
from .attempts import Claim, Settlement, Verdict, decide_buried, decide_rescued
from .checkpoints import reach
from .columns import columns_of, history_of, revived_columns
from .conf import get_settings
from .databases import ANY_QUEUE, Completion
from .databases.functions import DatabaseNow, SecondsFromNow
from .exceptions import LeaseLost
from .fencing import claims_of, held, lease_lost
from .lines import Lines, lines_of, without_waiting_for_ever
from .models import ConsumerModel, TaskAttempt, TaskModel
from .states import TRANSITIONS, Status
from .wakeup import announce, announce_ended

logger = logging.getLogger("firefly_jobs")

# Rows deleted, or made due again, per transaction by the commands.
BATCH_SIZE = 1_000


# --- claiming and giving back


def claim(
    *,
    using: str,
    consumer: int,
    queue: str,
    priority: int | None,
    limit: int,
    not_below: Any = None,
) -> list[Claim]:
    """Claim up to ``limit`` due rows of one queue and priority for ``consumer``.

    Args:
        using: Database alias.
        consumer: The claiming consumer's id.
        queue: One queue's name.
        priority: One priority; ``None``, where ``can_claim_highest``, for the highest there is.
        limit: How many rows at most.
        not_below: Look at no ``run_at`` below this; see ``claiming.py``.

    Returns:
        Claims in the order they should run.
    """
    reach("claiming")
    asked_at = monotonic()
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
    return [
        item if item.start_by is None else item._replace(start_by=asked_at + item.start_by)
        for item in claims
    ]


def release(claims: Collection[Claim], *, using: str) -> int:
    """Give back claims whose call has not started; return how many were still held."""
    released = 0
    by_fence: defaultdict[int, list[int]] = defaultdict(list)
    for item in claims:
        by_fence[item.fence].append(item.id)
    lines = _lines_of(claims, using)
    with databases.of(using).own_transaction(connections[using]):
        lines.lock()
        # Few rows have been claimed often, so these are few statements.
        for fence, ids in sorted(by_fence.items()):
            released += held(using, fence, *ids).update(
                status=Status.CREATED, consumer=None, started=None, limit_key=None
            )
        lines.let_go()
        if released:
            announce(using, {item.queue for item in claims})
    return released


# --- settling


def complete(completion: Completion, *, using: str, also: Settlement | None = None) -> None:
    """Complete a row, or write ``also``, inside the transaction that is open on this thread.

    Raises:
        LeaseLost: If the row is not held under this fence any more.
    """
    lines = _lines_of([completion], using)
    lines.lock()
    if not (
        _write(also, using)
        if also is not None
        else databases.of(using).complete(connections[using], completion)
    ):
        raise lease_lost(completion)
    lines.let_go()
    announce_ended(using, (completion.id,))
    reach("settling")


def complete_group(completions: Sequence[Completion], *, using: str) -> None:
    """Complete all rows inside the transaction that is open on this thread's connection.

    Raises:
        LeaseLost: If one of them is not held any more; nothing must be committed then.
    """
    lines = _lines_of(completions, using)
    lines.lock()
    count = databases.of(using).complete_many(connections[using], completions)
    if count != len(completions):
        message = f"Only {count} of the {len(completions)} tasks of a group are still held."
        raise LeaseLost(message)
    lines.let_go()
    announce_ended(using, [completion.id for completion in completions])
    reach("settling")


def complete_many(completions: Sequence[Completion], *, using: str) -> list[Completion]:
    """Complete rows whose calls touched no database, as one statement if all is well.

    Those that let others go take a transaction of their own.

    Returns:
        Those that were not held any more.
    """
    limited = [completion for completion in completions if completion.is_limited]
    others = [completion for completion in completions if not completion.is_limited]
    database, connection = databases.of(using), connections[using]
    count = database.complete_many(connection, others) if others else 0
    if limited:
        lines = _lines_of(limited, using)
        with database.own_transaction(connection):
            lines.lock()
            count += database.complete_many(connection, limited)
            lines.let_go()
    announce_ended(using, [completion.id for completion in completions])
    reach("settled")
    if count == len(completions):
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
    lines = _lines_of([settlement.claim], using)
    with databases.of(using).own_transaction(connections[using]):
        lines.lock()
        if not _write(settlement, using):
            raise lease_lost(settlement.claim)
        if settlement.is_history:
            history_of(settlement, consumer).save(using=using, force_insert=True)
        lines.let_go()
        _announce([settlement], using)
        reach("settling")
    reach("settled")


def settle_many(
    settlements: Sequence[Settlement], *, using: str, consumer: int | None
) -> list[Settlement]:
    """Write outcomes as :func:`settle` does, in one transaction, and what is alike at once.

    Returns:
        Those whose row was still held under its fence; the others have lost it.
    """
    rows = TaskModel.objects.using(using).filter(pk__in=[item.claim.id for item in settlements])
    lines = _lines_of([item.claim for item in settlements], using)
    with databases.of(using).own_transaction(connections[using]):
        lines.lock()
        locked = rows.filter(status=Status.RUNNING).order_by("id").select_for_update()
        fences = dict(locked.values_list("id", "fence"))
        settled = [item for item in settlements if fences.get(item.claim.id) == item.claim.fence]
        alike: defaultdict[Any, list[int]] = defaultdict(list)
        for item in settled:
            alike[item.claim.fence, tuple(_columns(item).items())].append(item.claim.id)
        for (fence, columns), ids in alike.items():
            held(using, fence, *ids).update(**dict(columns))
        TaskAttempt.objects.using(using).bulk_create(
            [history_of(item, consumer) for item in settled if item.is_history]
        )
        lines.let_go()
        _announce(settled, using)
        reach("settling")
    reach("settled")
    return settled


def _lines_of(rows: Collection[Claim] | Collection[Completion], using: str) -> Lines:
    """Return the lines that some rows stand in, without a statement if they have no limits."""
    limited = [row.id for row in rows if row.is_limited]
    if not limited:
        return Lines((), using=using)
    return lines_of(TaskModel.objects.using(using).filter(pk__in=limited), using=using)


def _write(settlement: Settlement, using: str) -> bool:
    claim = settlement.claim
    return held(using, claim.fence, claim.id).update(**_columns(settlement)) == 1


def _columns(settlement: Settlement) -> dict[str, Any]:
    # Only a limit blocks what runs, and no outcome.
    if settlement.status not in TRANSITIONS[Status.RUNNING] - {Status.BLOCKED}:
        message = f"A running task cannot become {settlement.status}."
        raise ValueError(message)
    return columns_of(settlement)


def _announce(settlements: Sequence[Settlement], using: str) -> None:
    announce(using, {item.claim.queue for item in settlements if item.status is Status.CREATED})
    announce_ended(using, [item.claim.id for item in settlements if item.status.is_terminal])


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
    is_late = Q(renewed_at__lt=SecondsFromNow(-F("lease_seconds")))
    found = list(others.filter(is_late | Q(suspected_at__isnull=False)))
    # One read tells that nobody is late, which is nearly always; and an idle SQLite
    # database is not locked by every heartbeat.
    if all(consumer.suspected_at is not None for consumer in found):
        return found
    others.filter(is_late, suspected_at__isnull=True).update(suspected_at=DatabaseNow())
    return list(others.filter(suspected_at__isnull=False))


def end_sessions(suspect: ConsumerModel, *, using: str) -> None:
    """End the database sessions of a dead consumer, so that its row locks go with it.

    What is not permitted is left to the server, which notices a vanished machine later.
    """
    is_silent = ConsumerModel.objects.using(using).filter(pk=suspect.pk, suspected_at__isnull=False)
    if is_silent.exists():
        _end_sessions(suspect.pk, str(suspect), using)


def _end_sessions(consumer: int, name: str, using: str) -> None:
    try:
        ended = databases.of(using).end_sessions(connections[using], consumer)
    except DatabaseError as error:
        logger.info("Could not end the sessions of consumer %s: %s", name, error)
    else:
        if ended:
            logger.warning("Ended %s database sessions of consumer %s", ended, name)


def rescue(suspect: ConsumerModel, *, using: str) -> list[Settlement] | None:
    """Take the second look: if ``suspect`` did not renew since the first, free its rows.

    Rows that another transaction has locked (a consumer paused between settling and
    COMMIT) are left for the next round, and the consumer's row with them.

    Returns:
        What became of its rows, or ``None`` if it has renewed.
    """

    def work(lines: Lines) -> list[Settlement] | None:
        with databases.of(using).own_transaction(connections[using]):
            lines.lock()
            consumer = _lock_consumer(suspect.pk, using).filter(suspected_at__isnull=False).first()
            # Compared here, because SQLite compares moments as text, and its own clock writes
            # fewer digits than Django sends.
            if consumer is None or consumer.renewed_at != suspect.renewed_at:
                return None
            settlements, are_all = _free_rows(suspect.pk, str(suspect), lines, using)
            if are_all:
                unregister(suspect.pk, using=using)
        return settlements

    lines = lines_of(_rows_of(suspect.pk, using), using=using)
    return without_waiting_for_ever(lines, work, using=using)


def bury(
    consumer: int, *, using: str, verdict: Verdict | None = None
) -> tuple[list[Settlement], bool]:
    """Free the rows of a consumer whose process has ended, as its supervisor saw.

    So nobody has to look twice, and no lease has to run out.

    Args:
        consumer: Its id, also one that it used before it was rescued.
        using: Database alias.
        verdict: Why the supervisor itself ended the process, if it did.

    Returns:
        What became of its rows, and whether these were all: others may be locked by a
        transaction that the server has not ended yet.
    """
    _end_sessions(consumer, f"#{consumer}", using)

    def work(lines: Lines) -> tuple[list[Settlement], bool]:
        with databases.of(using).own_transaction(connections[using]):
            lines.lock()
            row = _lock_consumer(consumer, using).first()
            name = str(row or f"#{consumer}")
            settlements, are_all = _free_rows(consumer, name, lines, using, verdict)
            if row is None:
                # Rescued by others, or locked by its own last heartbeat.
                are_all &= not ConsumerModel.objects.using(using).filter(pk=consumer).exists()
            elif are_all:
                unregister(consumer, using=using)
        return settlements, are_all

    lines = lines_of(_rows_of(consumer, using), using=using)
    return without_waiting_for_ever(lines, work, using=using)


def _lock_consumer(consumer: int, using: str) -> QuerySet[ConsumerModel]:
    can_skip_locked = databases.of(using).can_skip_locked
    rows = ConsumerModel.objects.using(using).filter(pk=consumer)
    return rows.select_for_update(skip_locked=can_skip_locked)


def _rows_of(consumer: int, using: str) -> QuerySet[TaskModel]:
    return TaskModel.objects.using(using).filter(consumer=consumer, status=Status.RUNNING)


def _free_rows(
    consumer: int, name: str, lines: Lines, using: str, verdict: Verdict | None = None
) -> tuple[list[Settlement], bool]:
    """Settle what a dead consumer held and nobody has locked; say whether that was all."""
    rows = _rows_of(consumer, using)
    count = rows.count()
    can_skip_locked = databases.of(using).can_skip_locked
    claims = claims_of(rows.select_for_update(skip_locked=can_skip_locked))
    if any(item.is_limited for item in claims):
        # What was admitted after the lines were read is left for the next round.
        stand = dict(rows.filter(limit_key__isnull=False).values_list("pk", "limit_key"))
        claims = [item for item in claims if item.id not in stand or stand[item.id] in lines]
    max_rescues = get_settings().MAX_RESCUES
    settlements = [
        decide_rescued(item, was_alone=count == 1, consumer=name, max_rescues=max_rescues)
        if verdict is None
        else decide_buried(item, verdict, consumer=name, max_rescues=max_rescues)
        for item in claims
    ]
    settlements = [item for item in settlements if _write(item, using)]
    TaskAttempt.objects.using(using).bulk_create(
        [history_of(item, consumer) for item in settlements]
    )
    lines.let_go()
    _announce(settlements, using)
    return settlements, len(claims) == count


def rescue_orphans(claims: Sequence[Claim], *, using: str) -> list[Claim]:
    """Free rows that :func:`orphans` returned at two looks in a row; return which."""
    max_rescues, rescued = get_settings().MAX_RESCUES, []
    for item in claims:
        settlement = decide_rescued(
            item, was_alone=False, consumer="(unknown)", max_rescues=max_rescues
        )
        try:
            settle(settlement, using=using, consumer=None)
        except LeaseLost as event:
            logger.debug("%s", event)
        else:
            rescued.append(item)
    return rescued


def hasten(pk: int, *, attempt: int, using: str) -> bool:
    """Make a row due now that waits to go on with this attempt; return whether it did."""
    rows = TaskModel.objects.using(using).filter(
        pk=pk, status=Status.CREATED, retry_attempts=attempt - 1
    )
    hastened = rows.update(not_before=DatabaseNow()) == 1
    if hastened:
        announce(using, (ANY_QUEUE,))
    return hastened


# --- what people do


def cancel(ids: Sequence[int], *, using: str) -> int:
    """Cancel rows that wait, for their start or for a retry; return how many were cancelled."""
    waiting = [Status.CREATED, Status.BLOCKED]
    rows = TaskModel.objects.using(using).filter(pk__in=ids, status__in=waiting)
    columns = {"error": "cancelled while it waited", "active_key": None, "limit_key": None}
    with databases.of(using).write_transaction(connections[using]):
        messenger.cancelling(rows, using=using)
        cancelled = rows.filter(limit_key__isnull=True).update(status=Status.CANCELLED, **columns)
        if cancelled < len(ids):
            # The others stand in a line, or have started.
            places = admission.places_of(rows)
            cancelled += rows.update(status=Status.CANCELLED, **columns)
            admission.pass_on(places, using=using)
    if cancelled:
        announce_ended(using, ids)
    return cancelled


def retry(ids: Sequence[int], *, using: str) -> int:
    """Make failed or cancelled rows due now, with all their retries; return how many.

    A row whose unique key another one has meanwhile is passed over, and a warning says so.
    """
    ended = [Status.FAILED, Status.CANCELLED]
    rows = TaskModel.objects.using(using).filter(pk__in=ids, status__in=ended)
    # In one order everywhere, so that two who revive the same do not meet in a deadlock.
    keyed = list(
        rows.filter(unique_key__isnull=False)
        .order_by("unique_key", "id")
        .values_list("id", "unique_key")
    )
    retried = rows.filter(unique_key__isnull=True).update(**revived_columns())
    for pk, key in keyed:
        try:
            with transaction.atomic(using=using):
                retried += rows.filter(pk=pk).update(active_key=key, **revived_columns())
        except IntegrityError:
            logger.warning(
                "Task %s stays as it is: another task has its unique key", pk, extra={"task_id": pk}
            )
    if retried:
        # Their queues are not known here, and asking for them would cost more.
        announce(using, (ANY_QUEUE,))
    return retried


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
