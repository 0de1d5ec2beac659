"""What a settlement means for the columns of its row, and for history.

Pure functions; ``lifecycle`` writes what they return, under the row's fence.
"""

from __future__ import annotations

from typing import Any

from django.db.models import F

from .attempts import Ended, Settlement
from .databases.functions import DatabaseNow, SecondsFromNow
from .models import TaskAttempt
from .states import Status


def columns_of(settlement: Settlement) -> dict[str, Any]:
    """Return what a settlement writes into the row."""
    values: dict[str, Any] = {"status": settlement.status, "limit_key": None}
    if settlement.ended is not Ended.RELEASED:
        # Of what is given back only history keeps it, so that thousands are written at once.
        values["duration"] = settlement.duration
    if settlement.status.is_terminal:
        values |= _ending(settlement)
    else:
        values |= _returning(settlement)
    if not settlement.has_started:
        values["started"] = None
    if settlement.error is not None:
        values["error"] = settlement.error
    for column, growth in (
        ("retry_attempts", settlement.retries),
        ("rescues", settlement.rescues),
        ("lost_alone", settlement.losses_alone),
    ):
        if growth:
            values[column] = F(column) + growth
    values |= settlement.changes
    return values


def _ending(settlement: Settlement) -> dict[str, Any]:
    """Return what is written into a row that has ended."""
    # Others may have its key from now on.
    values: dict[str, Any] = {"active_key": None}
    if settlement.status is Status.FAILED:
        values["failed"] = DatabaseNow()
    if settlement.status is Status.CANCELLED:
        values["cancelled"] = DatabaseNow()
    if settlement.status is Status.COMPLETED:
        values |= {"completed": DatabaseNow(), "failed": None, "error": ""}
        values["raw_returned"] = settlement.returned
    return values


def _returning(settlement: Settlement) -> dict[str, Any]:
    """Return what is written into a row that will be claimed again."""
    values: dict[str, Any] = {"consumer": None}
    if settlement.has_started:
        # It was started in time, and may take its time from now on.
        values["expires_at"] = None
    if settlement.delay_seconds is not None:
        values["not_before"] = SecondsFromNow(settlement.delay_seconds)
    if settlement.ended in {Ended.RETRIED, Ended.SNOOZED}:
        # It ended by itself, so whatever took its former consumers was not its doing.
        values |= {"rescues": 0, "lost_alone": 0}
    return values


def withdrawn_columns(error: str) -> dict[str, Any]:
    """Return what is written into a row that waits and is cancelled; ``error`` says why."""
    return {
        "status": Status.CANCELLED,
        "cancelled": DatabaseNow(),
        "error": error,
        "active_key": None,
        "limit_key": None,
    }


def revived_columns() -> dict[str, Any]:
    """Return what is written into an ended row that is to run again, with all its retries."""
    return {
        "status": Status.CREATED,
        # Its place in the queue is by the time it became due, and that is now.
        "not_before": DatabaseNow(),
        "expires_at": None,
        "failed": None,
        "cancelled": None,
        "started": None,
        "duration": None,
        "error": "",
        "consumer": None,
        "limit_key": None,
        "retry_attempts": 0,
        "rescues": 0,
        "lost_alone": 0,
    }


def history_of(settlement: Settlement, consumer: int | None) -> TaskAttempt:
    """Return the attempt's place in history, unwritten."""
    return TaskAttempt(
        task_id=settlement.claim.id,
        number=settlement.claim.attempt if settlement.has_started else 0,
        fence=settlement.claim.fence,
        outcome=settlement.ended,
        consumer=consumer,
        duration=settlement.duration,
        error=settlement.error or "",
        traceback=settlement.traceback,
    )
