"""Change existing rows: claim, settle, release, free, cancel, retry, delete.

The only writer of ``status`` on rows that exist, but for what limits do to it (``admission``,
``lines``) and what one step of a workflow means for the others (``dependencies``).  A running
row changes only for the holder of its fence: every such UPDATE names id, status and fence,
and one helper, ``fencing.held``, says so (``databases`` says the same in its batched
statements).  Whoever matches no row has lost the lease and changes nothing.
A row that stands in a line lets the next one go when it stops running, and a step that ends
those that wait for it, in the same transaction.

What is due, stale or late is decided by the database's clock.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from time import monotonic
from typing import Any

from django.db import IntegrityError, connections, transaction
from django.db.models import QuerySet

from . import admission, databases, dependencies, events, fencing, messenger, tallies
from .attempts import Claim, Settlement, Verdict, decide_buried, decide_rescued
from .checkpoints import reach
from .columns import columns_of, history_of, revived_columns, withdrawn_columns
from .conf import get_settings
from .consequences import follow, follow_completed, tell
from .databases import ANY_QUEUE, Completion
from .databases.functions import DatabaseNow
from .dependencies import End
from .event_models import EventKind
from .exceptions import LeaseLost
from .fencing import claims_of, held, lease_lost
from .history import note_withdrawn
from .lines import Lines, lines_of, tried_again
from .models import TaskAttempt, TaskModel, WorkflowModel, WorkflowStep
from .states import TERMINAL, TRANSITIONS, Status, WorkflowStatus
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
        events.claimed(claims, using=using, consumer=consumer)
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
            rows = held(using, fence, *ids)
            events.changing(rows, EventKind.RELEASED, using=using)
            released += rows.update(
                status=Status.CREATED, consumer=None, started=None, limit_key=None
            )
        lines.let_go()
        if released:
            dependencies.finish_later((item.workflow for item in claims), using=using)
            announce(using, {item.queue for item in claims})
    return released


# --- settling


def complete(
    completion: Completion,
    *,
    using: str,
    also: Settlement | None = None,
    consumer: int | None = None,
) -> None:
    """Complete a row, or write ``also``, inside the transaction that is open on this thread.

    Args:
        completion: What the call has returned.
        using: Database alias.
        also: The same, with columns that the call has changed.
        consumer: The consumer's id.

    Raises:
        LeaseLost: If the row is not held under this fence any more.
    """
    if completion.workflow is not None and not completion.is_limited and also is None:
        _complete_step(completion, completion.workflow, consumer, using)
    else:
        lines = _lines_of([completion], using)
        lines.lock()
        if not (
            _write(also, using)
            if also is not None
            else databases.of(using).complete(connections[using], completion)
        ):
            raise lease_lost(completion)
        events.one_completed(completion, using=using, consumer=consumer)
        lines.let_go()
        follow_completed([completion], using=using)
    announce_ended(using, (completion.id,))
    reach("settling")


def _complete_step(completion: Completion, workflow: int, consumer: int | None, using: str) -> None:
    is_held, counted = databases.of(using).complete_step(connections[using], completion)
    if not is_held:
        raise lease_lost(completion)
    events.one_completed(completion, using=using, consumer=consumer)
    if counted is None or not counted.is_of_no_consequence:
        end = End(completion.id, workflow, Status.COMPLETED)
        dependencies.follow([end], using=using, counted=counted)


def complete_group(
    completions: Sequence[Completion], *, using: str, consumer: int | None = None
) -> None:
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
    events.completed(completions, using=using, consumer=consumer)
    lines.let_go()
    follow_completed(completions, using=using)
    announce_ended(using, [completion.id for completion in completions])
    reach("settling")


def complete_many(
    completions: Sequence[Completion], *, using: str, consumer: int | None = None
) -> list[Completion]:
    """Complete rows whose calls touched no database, as one statement if all is well.

    Those that let others go, or of which events are kept, take a transaction of their own, and
    are locked first.

    Returns:
        Those that were not held any more.
    """
    are_told = events.are_kept()
    leading = [item for item in completions if are_told or item.lets_others_go]
    others = [item for item in completions if not (are_told or item.lets_others_go)]
    database, connection = databases.of(using), connections[using]
    count = database.complete_many(connection, others) if others else 0
    if leading:
        count += _complete_leading(leading, using, consumer)
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


def _complete_leading(completions: Sequence[Completion], using: str, consumer: int | None) -> int:
    database, connection = databases.of(using), connections[using]
    lines = _lines_of(completions, using)
    are_told = events.are_kept()
    counted = {item.id for item in completions if item.workflow or item.schedule}
    locked = [item for item in completions if are_told or item.id in counted]
    with database.own_transaction(connection):
        lines.lock()
        # Looked at before, since one that an earlier try has completed must not count twice.
        held = fencing.lock_held(locked, using=using) if locked else []
        count = database.complete_many(connection, completions)
        events.completed(held, using=using, consumer=consumer)
        lines.let_go()
        follow_completed(held, using=using)
    return count


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
        events.settled([settlement], using=using, consumer=consumer)
        lines.let_go()
        follow([settlement], using=using)
        tell([settlement], using=using)
        reach("settling")
    reach("settled")


def write_alone(settlement: Settlement, *, using: str) -> None:
    """Write that a row has ended, and nothing that follows from it: the last resort."""
    _write(settlement, using)


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
        events.settled(settled, using=using, consumer=consumer)
        lines.let_go()
        follow(settled, using=using)
        tell(settled, using=using)
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


# --- freeing what a dead consumer held


def rows_of(consumer: int, using: str) -> QuerySet[TaskModel]:
    """Return the rows that the database thinks a consumer runs."""
    return TaskModel.objects.using(using).filter(consumer=consumer, status=Status.RUNNING)


def free_rows(
    consumer: int, name: str, lines: Lines, using: str, verdict: Verdict | None = None
) -> tuple[list[Settlement], bool]:
    """Settle what a dead consumer held and nobody has locked; say whether that was all.

    Args:
        consumer: Its id.
        name: What messages call it.
        lines: The lines that its rows stand in, locked.
        using: Database alias.
        verdict: Why a supervisor ended its process, if one did.
    """
    rows = rows_of(consumer, using)
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
    events.settled(settlements, using=using, consumer=consumer)
    lines.let_go()
    follow(settlements, using=using)
    tell(settlements, using=using)
    return settlements, len(claims) == count


def hasten(pk: int, *, reason: str, using: str) -> bool:
    """Make a row due now that a ``Snooze`` with this reason lets wait; return whether it did."""
    rows = TaskModel.objects.using(using).filter(pk=pk, status=Status.CREATED, error=reason)
    hastened = rows.update(not_before=DatabaseNow()) == 1
    if hastened:
        announce(using, (ANY_QUEUE,))
    return hastened


# --- what people do


def cancel(ids: Sequence[int], *, using: str) -> int:
    """Cancel rows that wait, for their start or for a retry; return how many were cancelled."""
    return tried_again(partial(_cancel, ids, using), using=using)


def _cancel(ids: Sequence[int], using: str) -> int:
    waiting = [Status.CREATED, Status.BLOCKED]
    found = TaskModel.objects.using(using).filter(pk__in=ids, status__in=waiting)
    reason = "cancelled while it waited"
    columns = withdrawn_columns(reason)
    with databases.of(using).own_transaction(connections[using]):
        # Others wait for a step, so its end is more than that of a row: also of one that has
        # started, and may wait again a moment later.
        steps = _steps_among(ids, using)
        idle = list(found.filter(pk__in=steps).values_list("pk", flat=True)) if steps else []
        by_step = dependencies.cancel_steps(idle, reason, using=using) if idle else 0
        # Not as an exclusion: InnoDB would lock the steps before that is asked.
        plain = set(ids) - steps
        rows = found.filter(pk__in=plain)
        tallies.count_withdrawn(rows, reason, using=using)
        note_withdrawn(rows, reason, using=using)
        messenger.cancelling(rows, reason, using=using)
        events.changing(rows, EventKind.CANCELLED, reason, using=using)
        cancelled = rows.filter(limit_key__isnull=True).update(**columns)
        if cancelled < len(plain):
            # The others stand in a line, or have started.
            places = admission.places_of(rows)
            cancelled += rows.update(**columns)
            admission.pass_on(places, using=using)
    if cancelled:
        announce_ended(using, ids)
    return cancelled + by_step


def retry(ids: Sequence[int], *, using: str) -> int:
    """Make failed or cancelled rows due now, with all their retries; return how many.

    A row whose unique key another one has meanwhile is passed over, and a warning says so; so
    is a step of a workflow, which runs again with what was cancelled because of it, and what is
    called at its end, while it has not ended.
    """
    return tried_again(partial(_retry, ids, using), using=using)


def _retry(ids: Sequence[int], using: str) -> int:
    ended = [Status.FAILED, Status.CANCELLED]
    found = TaskModel.objects.using(using).filter(pk__in=ids, status__in=ended)
    last = TaskModel.objects.using(using).filter(pk__in=ids, workflow__in=_open_workflows(using))
    others = _steps_among(ids, using).union(last.values_list("pk", flat=True))
    for pk in found.filter(pk__in=others).order_by("pk").values_list("pk", flat=True):
        logger.warning(
            "Task %s is a step of a workflow; use the workflow's retry_failed()",
            pk,
            extra={"task_id": pk},
        )
    rows = found.filter(pk__in=set(ids) - others)
    schedules: list[int | None] = []
    with databases.of(using).own_transaction(connections[using]):
        plain = rows.filter(unique_key__isnull=True)
        events.reviving(plain, using=using)
        locked = plain.order_by("pk").select_for_update().values_list("pk", "schedule")
        revived = dict(locked)
        schedules += revived.values()
        plain.filter(pk__in=revived).update(**revived_columns())
        # In one order everywhere, so that two who revive the same do not meet in a deadlock.
        keyed = rows.filter(unique_key__isnull=False).order_by("unique_key", "pk")
        for pk, key, schedule in list(keyed.values_list("pk", "unique_key", "schedule")):
            try:
                with transaction.atomic(using=using):
                    events.reviving(rows.filter(pk=pk), using=using)
                    if rows.filter(pk=pk).update(active_key=key, **revived_columns()):
                        schedules.append(schedule)
            except IntegrityError:
                logger.warning(
                    "Task %s stays as it is: another task has its unique key",
                    pk,
                    extra={"task_id": pk},
                )
        # Last, as whoever has a key may be about to end, and to count that.
        tallies.count_revived(schedules, using=using)
    if schedules:
        # Their queues are not known here, and asking for them would cost more.
        announce(using, (ANY_QUEUE,))
    return len(schedules)


def _steps_among(ids: Sequence[int], using: str) -> set[int]:
    steps = WorkflowStep.objects.using(using).filter(pk__in=ids)
    return set(steps.values_list("pk", flat=True))


def _open_workflows(using: str) -> QuerySet[WorkflowModel]:
    return WorkflowModel.objects.using(using).filter(status=WorkflowStatus.RUNNING)


def delete(ids: Sequence[int], *, using: str) -> int:
    """Delete ended rows and their history; return how many rows were deleted.

    Steps of a workflow stay until it has ended.
    """
    database = databases.of(using)
    rows = TaskModel.objects.using(using).filter(pk__in=ids, status__in=TERMINAL)
    asked = rows.filter(workflow__isnull=False).values_list("workflow", flat=True).distinct()
    with database.own_transaction(connections[using]):
        # All locked first, so that what a person just revived is not deleted.
        busy = _busy_workflows(list(asked), using)
        ended = rows.exclude(workflow__in=busy)
        locked = ended.select_for_update(skip_locked=database.can_skip_locked)
        found = list(locked.values_list("pk", flat=True))
        TaskModel.objects.using(using).filter(pk__in=found, status__in=TERMINAL).delete()
    return len(found)


def _busy_workflows(ids: Sequence[Any], using: str) -> set[int]:
    """Lock those of some workflows that have ended, and return the others.

    One that is about to run again is locked while its counters are set from its rows.
    """
    runs = WorkflowModel.objects.using(using).filter(pk__in=ids).order_by("pk")
    skips = databases.of(using).can_skip_locked
    ended = runs.exclude(status=WorkflowStatus.RUNNING).select_for_update(skip_locked=skips)
    return set(runs.values_list("pk", flat=True)) - set(ended.values_list("pk", flat=True))
