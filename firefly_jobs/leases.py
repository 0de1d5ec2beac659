"""Consumers and their leases: heartbeats, suspicion, and taking back what the dead held.

Rescue takes two looks: the first marks a consumer whose lease is over, the second takes its
rows if it did not renew meanwhile.  Nobody waits for one whose process has ended, as its
supervisor or a consumer on the same machine sees.  What becomes of the rows ``lifecycle`` writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from django.db import DatabaseError, connections
from django.db.models import BooleanField, ExpressionWrapper, F, Q, QuerySet

from . import databases, lifecycle
from .attempts import Claim, Settlement, Verdict, decide_rescued
from .conf import get_settings
from .databases.functions import DatabaseNow, SecondsFromNow
from .exceptions import LeaseLost
from .lines import Lines, lines_of, without_waiting_for_ever
from .models import ConsumerModel
from .neighbours import MARK_LENGTH_MAX, has_ended, this_machine

logger = logging.getLogger("firefly_jobs")


def register(
    *, name: str, queues: Sequence[str], lease_seconds: float, process: str | None, using: str
) -> int:
    """Write the row of a consumer that starts, and return its id."""
    row = ConsumerModel(
        name=name[:200],
        queues=",".join(queues),
        lease_seconds=lease_seconds,
        process=process and process[:MARK_LENGTH_MAX],
    )
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
    """Take the first look: mark consumers whose lease is over.

    Returns:
        All marked ones, and those on this machine whose processes have ended.
    """
    others = ConsumerModel.objects.using(using).exclude(pk=besides)
    is_late = Q(renewed_at__lt=SecondsFromNow(-F("lease_seconds")))
    is_named = Q(suspected_at__isnull=False)
    if machine := this_machine(os.getpid()):
        is_named |= Q(process__startswith=f"{machine}/")
    # One read tells that nobody is late, which is nearly always; and an idle SQLite
    # database is not locked by every heartbeat.
    lateness = ExpressionWrapper(is_late, output_field=BooleanField())
    found = list(others.filter(is_late | is_named).annotate(is_late=lateness))
    if any(consumer.is_late and consumer.suspected_at is None for consumer in found):
        others.filter(is_late, suspected_at__isnull=True).update(suspected_at=DatabaseNow())
        found = list(others.filter(is_named).annotate(is_late=lateness))
    return [c for c in found if c.suspected_at is not None or has_ended(c.process or "")]


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
            settlements, are_all = lifecycle.free_rows(suspect.pk, str(suspect), lines, using)
            if are_all:
                unregister(suspect.pk, using=using)
        return settlements

    lines = lines_of(lifecycle.rows_of(suspect.pk, using), using=using)
    return without_waiting_for_ever(lines, work, using=using)


def bury(
    consumer: int, *, using: str, verdict: Verdict | None = None
) -> tuple[list[Settlement], bool]:
    """Free the rows of a consumer whose process has ended, as somebody on its machine saw.

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
            settlements, are_all = lifecycle.free_rows(consumer, name, lines, using, verdict)
            if row is None:
                # Rescued by others, or locked by its own last heartbeat.
                are_all &= not ConsumerModel.objects.using(using).filter(pk=consumer).exists()
            elif are_all:
                unregister(consumer, using=using)
        return settlements, are_all

    lines = lines_of(lifecycle.rows_of(consumer, using), using=using)
    return without_waiting_for_ever(lines, work, using=using)


def _lock_consumer(consumer: int, using: str) -> QuerySet[ConsumerModel]:
    can_skip_locked = databases.of(using).can_skip_locked
    rows = ConsumerModel.objects.using(using).filter(pk=consumer)
    return rows.select_for_update(skip_locked=can_skip_locked)


def rescue_orphans(claims: Sequence[Claim], *, using: str) -> list[Claim]:
    """Free rows that :func:`orphans` returned at two looks in a row; return which."""
    max_rescues, rescued = get_settings().MAX_RESCUES, []
    for item in claims:
        settlement = decide_rescued(
            item, was_alone=False, consumer="(unknown)", max_rescues=max_rescues
        )
        try:
            lifecycle.settle(settlement, using=using, consumer=None)
        except LeaseLost as event:
            logger.debug("%s", event)
        else:
            rescued.append(item)
    return rescued
