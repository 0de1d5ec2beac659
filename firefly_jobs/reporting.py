"""The log lines about tasks: constant text, and what varies in fields."""

from __future__ import annotations

import logging
from typing import Any

from .attempts import Claim, Ended, Settlement
from .exceptions import LeaseLost

logger = logging.getLogger("firefly_jobs")

_LEVELS = {
    Ended.COMPLETED: logging.INFO,
    Ended.SNOOZED: logging.INFO,
    Ended.RELEASED: logging.INFO,
    Ended.CANCELLED: logging.INFO,
    Ended.RETRIED: logging.WARNING,
    Ended.LOST: logging.WARNING,
    Ended.FAILED: logging.ERROR,
}


def log_fields(claim: Claim) -> dict[str, Any]:
    """Return the fields that every log line about a task carries."""
    return {
        "task_id": claim.id,
        "task_name": claim.func_name,
        "queue": claim.queue,
        "attempt": claim.attempt,
    }


def log_completed(claim: Claim, duration: float) -> None:
    """Say that a task completed."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(
            "Task %s #%s completed in %.3fs",
            claim.func_name,
            claim.id,
            duration,
            extra={**log_fields(claim), "duration": duration},
        )


def log_settled(settlement: Settlement) -> None:
    """Say how an attempt ended."""
    claim, ended = settlement.claim, settlement.ended
    if ended is Ended.COMPLETED:
        log_completed(claim, settlement.duration)
        return
    if not logger.isEnabledFor(_LEVELS[ended]):
        return
    text = f"Task %s #%s {ended.value}"
    values: list[Any] = [claim.func_name, claim.id]
    if ended is Ended.RETRIED:
        text = "Task %s #%s: retry %s/%s in %.1fs"
        values += [claim.attempt, claim.max_retries, settlement.delay_seconds]
    if settlement.error:
        text += ": %s"
        values.append(settlement.error)
    fields = {**log_fields(claim), "duration": settlement.duration, "outcome": ended.value}
    if settlement.traceback:
        fields["traceback"] = settlement.traceback
    logger.log(_LEVELS[ended], text, *values, extra=fields)


def log_lease_lost(claim: Claim, event: LeaseLost) -> None:
    """Say that an outcome was dropped; the fence did its work."""
    logger.warning("LeaseLost: %s", event, extra=log_fields(claim))


def log_to_stderr(verbosity: int) -> None:
    """Show the log of a project that has not configured where it goes."""
    logger = logging.getLogger("firefly_jobs")
    if logger.hasHandlers():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbosity, logging.DEBUG))
