"""One attempt at a task: the claim that starts it, the outcome that ends it.

A consumer turns a :class:`Claim` into an :class:`Outcome`; :func:`decide` says what that
means for the row, as a :class:`Settlement`; ``lifecycle`` writes it.  Everything here is
a value, and ``decide`` is a pure function, so every rule about retries, snoozes and
losses can be read, and tested, without a database.
"""

from __future__ import annotations

import traceback as traceback_module
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from .exceptions import DELAY_SECONDS_MAX, Cancel, ConsumerLost, Retry, Snooze, Withdrawn
from .retries import Fixed, RetryStrategy, fraction
from .states import Status

ERROR_LENGTH_MAX = 2_000
TRACEBACK_LENGTH_MAX = 50_000
LOST_DELAY_SECONDS = 0.2
NOT_STARTED_DELAY_SECONDS = 2.0
_LOST_GROWTHS_MAX = 6

# From this many losses on a task runs alone, so that the next loss is its own.
ALONE_AFTER_RESCUES = 2


class Claim(NamedTuple):
    """A row as the consumer that claimed it holds it.

    A named tuple, not a dataclass: claims are made by the hundred straight from
    database rows, and this is the one value whose making shows in a profile.
    """

    id: int
    fence: int
    func_name: str
    queue: str
    priority: int
    run_at: Any  # as the driver gives it: compared and handed back, never computed with
    raw_params: str
    retry_attempts: int
    max_retries: int
    retry_delay: int
    retry: str | None
    rescues: int
    lost_alone: int
    # What the call may take, in seconds and bytes; None: anything.
    time_limit: float | None = None
    memory_limit: int | None = None
    # The workflow that it is a step of.
    workflow: int | None = None
    # The schedule that has started it.
    schedule: int | None = None
    # Whether it may start only once it is admitted, and frees a place when it ends.
    is_limited: bool = False
    # Why it is not to start: its workflow stops.
    withdrawn: str = ""
    # Seconds that are left to start it, as claimed; then a moment of monotonic().  None: for ever.
    start_by: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from every other claim; a row that was lost and claimed again has two."""
        return self.id, self.fence

    @property
    def attempt(self) -> int:
        """Number of this attempt, counted from 1; a rescue or a snooze does not raise it."""
        return self.retry_attempts + 1

    @property
    def runs_alone(self) -> bool:
        """Whether this task was lost so often that it must not share a process."""
        return self.rescues >= ALONE_AFTER_RESCUES

    @property
    def is_bounded(self) -> bool:
        """Whether the call may take only so much time, or memory."""
        return self.time_limit is not None or self.memory_limit is not None

    def strategy(self) -> RetryStrategy:
        """Return the row's retry strategy; its two columns where it carries none.

        The columns decide as well if the strategy cannot be read: a deploy may have
        removed its class, and a failed task must not fail to be settled over that.
        """
        if self.retry:
            try:
                return RetryStrategy.from_json(self.retry)
            except Exception:  # noqa: BLE001 - whatever the text or a custom class raises
                return Fixed(self.max_retries, self.retry_delay)
        return Fixed(self.max_retries, self.retry_delay)


class Ended(StrEnum):
    """How an attempt ended; the ``outcome`` of a ``TaskAttempt``."""

    COMPLETED = "completed"
    RETRIED = "retried"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SNOOZED = "snoozed"
    LOST = "lost"
    RELEASED = "released"


# Not frozen: each call has one, and that would cost it most of a microsecond.
@dataclass(slots=True, kw_only=True)
class Outcome:
    """What happened when a claim was executed; nobody changes it.

    Attributes:
        returned: The stored result, if the call returned.
        error: What it raised, if it did.
        is_lost: Whether ``error`` came from the database or the machine and says
            nothing about the task.
        is_interrupted: Whether our own shutdown ended it.
        has_started: Whether the function was called at all.
        duration: Seconds from the start of the call to its end.
        changes: Columns that the attempt itself has changed.
        decided: What :func:`decide` has said, if it was asked already.
    """

    claim: Claim
    duration: float
    returned: str | None = None
    error: BaseException | None = None
    is_lost: bool = False
    is_interrupted: bool = False
    has_started: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    decided: Settlement | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What an outcome means for the row.

    Attributes:
        delay_seconds: If the row goes back to ``created``: when it is due again,
            counted from the database's clock; ``None`` leaves ``not_before`` alone.
        retries / rescues / losses_alone: What the counters grow by.
        error: One line for the row; ``None`` leaves the former one.
        has_started: Whether the call had started; if not, this was no attempt.
        is_notable: Whether it is worth keeping; a look at how far something is, is not.
        is_history: Whether it is kept as history.
        changes: Columns that the attempt itself has changed.
        ignores_failure: If it has failed: whether its workflow goes on; ``None``: as its step says.
    """

    claim: Claim
    ended: Ended
    status: Status
    duration: float
    returned: str | None = None
    delay_seconds: float | None = None
    retries: int = 0
    rescues: int = 0
    losses_alone: int = 0
    error: str | None = None
    traceback: str = ""
    has_started: bool = True
    is_notable: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)
    ignores_failure: bool | None = None

    @property
    def is_history(self) -> bool:  # noqa: D102 - see above
        if not self.has_started:
            return self.ended is Ended.CANCELLED
        return self.is_notable and self.ended is not Ended.COMPLETED


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a supervisor ended a process: a call in it exceeded a limit.

    Attributes:
        task_id / fence: Which call.
        error: What its attempt failed with.
        duration: Seconds that the call had run for.
    """

    task_id: int
    fence: int
    error: Exception
    duration: float


def decide(outcome: Outcome, *, max_rescues: int) -> Settlement:
    """Return what ``outcome`` means for its row.

    Args:
        outcome: How the attempt ended.
        max_rescues: Losses while alone that a task survives
            (``FIREFLY_JOBS["MAX_RESCUES"]``).
    """
    if isinstance(outcome.error, Withdrawn):
        error = str(outcome.error)
        return _settle(outcome, Ended.CANCELLED, Status.CANCELLED, error=error, has_started=False)
    if not outcome.has_started:
        pause = NOT_STARTED_DELAY_SECONDS * (0.5 + fraction(outcome.claim.id, outcome.claim.fence))
        return _settle(
            outcome, Ended.RELEASED, Status.CREATED, delay_seconds=pause, has_started=False
        )
    if outcome.is_interrupted:
        return _settle(outcome, Ended.RELEASED, Status.CREATED)
    if outcome.error is None:
        return _settle(outcome, Ended.COMPLETED, Status.COMPLETED, returned=outcome.returned)
    if outcome.is_lost:
        return _decide_lost(outcome, outcome.error, max_rescues)
    return _decide_raised(outcome, outcome.error)


def decide_rescued(claim: Claim, *, was_alone: bool, consumer: str, max_rescues: int) -> Settlement:
    """Return what the death of its consumer means for a row.

    Args:
        claim: The row as the dead consumer held it.
        was_alone: Whether it was the only row of that consumer.
        consumer: Name of the dead consumer, for the message.
        max_rescues: Losses while alone after which the task fails.
    """
    # A deploy or a full machine takes innocent tasks with it.  Only a task that was
    # deliberately run alone, and took its process with it, is to blame.
    blamed = int(was_alone and claim.runs_alone)
    event = ConsumerLost(f"Consumer {consumer} disappeared while it held this task.")
    if claim.lost_alone + blamed > max_rescues:
        event = ConsumerLost(
            f"Consumer {consumer} disappeared while it ran this task, and so did the consumers "
            f"before it: {claim.lost_alone + blamed} times while nothing else ran. It probably "
            f"ends its process; see its attempts."
        )
        ended, status = Ended.FAILED, Status.FAILED
    else:
        ended, status = Ended.LOST, Status.CREATED
    return Settlement(
        claim=claim,
        ended=ended,
        status=status,
        duration=0.0,
        rescues=1,
        losses_alone=blamed,
        error=describe(event),
    )


def decide_buried(claim: Claim, verdict: Verdict, *, consumer: str, max_rescues: int) -> Settlement:
    """Return what the end of its process means for a row, if the supervisor ended it.

    Args:
        claim: The row as the consumer held it.
        verdict: Whose fault it was.
        consumer: Name of the consumer, for the message.
        max_rescues: As for :func:`decide`.
    """
    if (claim.id, claim.fence) == (verdict.task_id, verdict.fence):
        outcome = Outcome(claim=claim, duration=verdict.duration, error=verdict.error)
        return decide(outcome, max_rescues=max_rescues)
    # The culprit is known, so its neighbours are not even suspected.
    event = ConsumerLost(
        f"Consumer {consumer} was ended because of task {verdict.task_id}, which ran beside "
        f"this one. That does not count."
    )
    return Settlement(
        claim=claim,
        ended=Ended.LOST,
        status=Status.CREATED,
        duration=0.0,
        error=describe(event),
    )


def _decide_lost(outcome: Outcome, error: BaseException, max_rescues: int) -> Settlement:
    claim = outcome.claim
    # As with rescues: what was lost among others may have been the others' doing.
    blamed = int(claim.runs_alone)
    counts = {"rescues": 1, "losses_alone": blamed}
    if claim.lost_alone + blamed > max_rescues:
        # Unlike the death of a consumer this harms nobody else, so it may be retried.
        return _decide_raised(outcome, error)
    # Short, growing, and different for every task: two that met in a deadlock should
    # not meet again.
    growth = 2 ** min(claim.rescues, _LOST_GROWTHS_MAX)
    delay = LOST_DELAY_SECONDS * growth * (0.5 + fraction(claim.id, claim.fence))
    return _settle(
        outcome, Ended.LOST, Status.CREATED, delay_seconds=delay, **counts, **_report(outcome)
    )


def _decide_raised(outcome: Outcome, error: BaseException) -> Settlement:
    if isinstance(error, Cancel):
        return _settle(outcome, Ended.CANCELLED, Status.CANCELLED, error=_reason(error))
    if isinstance(error, Snooze):
        return _settle(
            outcome,
            Ended.SNOOZED,
            Status.CREATED,
            delay_seconds=error.delay_seconds,
            error=error.reason,
            is_notable=error.is_notable,
        )
    claim = outcome.claim
    if isinstance(error, Retry) and error.delay_seconds is not None:
        delay = error.delay_seconds if claim.attempt <= claim.max_retries else None
    else:
        delay = _strategy_delay(claim, error)
    if delay is None:
        return _settle(outcome, Ended.FAILED, Status.FAILED, **_report(outcome))
    return _settle(
        outcome, Ended.RETRIED, Status.CREATED, retries=1, delay_seconds=delay, **_report(outcome)
    )


def _strategy_delay(claim: Claim, error: BaseException) -> float | None:
    """Ask the row's strategy; one that raises or answers nonsense means no pause."""
    strategy = claim.strategy()
    if claim.attempt > strategy.retries_max:
        return None
    try:
        if not isinstance(error, Retry) and not strategy.matches(error):
            return None
        pause = strategy.pause_seconds(task_id=claim.id, attempt=claim.attempt)
        return min(max(0.0, float(pause)), DELAY_SECONDS_MAX)
    except Exception:  # noqa: BLE001 - a custom strategy is user code
        return 0.0


def _settle(outcome: Outcome, ended: Ended, status: Status, **values: Any) -> Settlement:
    return Settlement(
        claim=outcome.claim,
        ended=ended,
        status=status,
        duration=outcome.duration,
        changes=outcome.changes,
        **values,
    )


def _report(outcome: Outcome) -> dict[str, str]:
    error = outcome.error
    if error is None:
        return {}
    try:
        text = "".join(traceback_module.format_exception(error))
    except Exception as broken:  # noqa: BLE001 - an exception's own __str__ may raise
        text = f"{type(error).__name__} (its text raised {type(broken).__name__})"
    return {"error": describe(error), "traceback": _storable(text[-TRACEBACK_LENGTH_MAX:])}


def describe(error: BaseException) -> str:
    """Return one line about an exception: its class and its message."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception as broken:  # noqa: BLE001 - an exception's own __str__ may raise
        text = f"{type(error).__name__} (its text raised {type(broken).__name__})"
    return _storable(text.rstrip(": ")[:ERROR_LENGTH_MAX])


def _reason(error: Cancel) -> str:
    try:
        return _storable(str(error)[:ERROR_LENGTH_MAX])
    except Exception:  # noqa: BLE001 - a subclass's own __str__ may raise
        return type(error).__name__


def _storable(text: str) -> str:
    """Return text that every database takes: no NUL characters, no lone surrogates."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()
