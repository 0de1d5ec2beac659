"""Everything that this package raises, in three families.

Mistakes end in ``Error`` (or carry the name an established API gave them) and say
whose fault they are.  Exceptions that *steer* are verbs a task raises on purpose:
:class:`Retry`, :class:`Snooze`, :class:`Cancel`.  Events are things that happened to
a running call: :class:`LeaseLost`, :class:`ConsumerLost`.

To add one: say in its docstring who raises it, and document it in
``docs/reference/errors.md``; a test compares the two.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.core import signing


class AsyncFuncNotSupportedException(TypeError):
    """``@task`` was put on an ``async def``; that is what ``@atask`` is for."""


class SyncFuncNotSupportedException(TypeError):
    """``@atask`` was put on a plain function; that is what ``@task`` is for."""


class TaskDefinitionError(TypeError):
    """A function cannot become a task, and the message says why."""


class TaskNotFoundError(LookupError):
    """A row names a function that is not registered as a task in this process."""


class PayloadError(ValueError):
    """Arguments or a result cannot be stored, or cannot be read back."""


class PayloadTooLargeError(PayloadError):
    """Arguments or a result are longer than ``MAX_PAYLOAD_BYTES``."""


class BadSignature(PayloadError, signing.BadSignature):
    """A stored payload was not signed with this project's key for this task.

    It was not unpickled.
    """


class TaskAlreadyScheduled(ValueError):
    """Another task with the same unique key waits or runs.

    Attributes:
        existing: Its row.
    """

    def __init__(self, message: str, existing: Any) -> None:
        super().__init__(message)
        self.existing = existing


class WorkflowError(ValueError):
    """A workflow that cannot be: a circle, an unknown parent, a name that is taken.

    Nothing was written.
    """


class ScheduleError(ValueError):
    """A schedule that cannot start what it calls: it is not known here, or takes no arguments.

    Nothing was written.
    """


class JobRefused(Exception):
    """A registered job that was not started.

    Attributes:
        message: What is wrong, and what to do.
        status_code: What HTTP calls it: 400, 403 or 404.
    """

    def __init__(self, message: str, status_code: int) -> None:
        super().__init__(message)
        self.message, self.status_code = message, status_code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.status_code)


class TransactionDoomedError(RuntimeError):
    """The call returned, but its transaction was already rolled back or marked so."""


class ImplicitCommitError(RuntimeError):
    """A statement would have ended the call's transaction; it was not sent."""


class LeavesGroup(RuntimeError):
    """An event: the call would end a transaction it shares; it runs again in one of its own."""

    def __init__(self) -> None:
        super().__init__(
            "The task may end its transaction itself, which it shares with others (group "
            "commit). It runs again in a transaction of its own."
        )


class LaneTimeoutError(RuntimeError):
    """An async call waited too long for a database connection."""


class WaitInsideTransactionError(RuntimeError):
    """A row was waited for inside a transaction, which may keep it from ever ending."""


class TaskFailed(Exception):
    """Raised to whoever waits for the result of a task that failed.

    Args:
        task_id: Primary key of the row.
        func_name: The task's name.
        error: What the row says about the last error, one line.
    """

    def __init__(self, task_id: int, func_name: str, error: str) -> None:
        super().__init__(task_id, func_name, error)
        self.task_id, self.func_name, self.error = task_id, func_name, error

    def __str__(self) -> str:
        return f"Task {self.task_id} ({self.func_name}) failed: {self.error or 'no reason given'}"


class TaskCancelled(Exception):
    """Raised to whoever waits for the result of a task that was cancelled.

    Args:
        task_id: Primary key of the row.
        func_name: The task's name.
        reason: What the row says about it, one line.
    """

    def __init__(self, task_id: int, func_name: str, reason: str) -> None:
        super().__init__(task_id, func_name, reason)
        self.task_id, self.func_name, self.reason = task_id, func_name, reason

    def __str__(self) -> str:
        return (
            f"Task {self.task_id} ({self.func_name}) was cancelled: "
            f"{self.reason or 'no reason given'}"
        )


class LeaseLost(Exception):
    """The row is no longer ours: another consumer claimed it, or a person changed it."""


class CommitUncertain(Exception):
    """The connection broke while COMMIT was under way; only the row can tell what happened.

    Attributes:
        callbacks: What the call had registered with ``on_commit``, not yet run.
    """

    def __init__(self, callbacks: list[Any]) -> None:
        super().__init__("The connection broke while COMMIT was under way.")
        self.callbacks = callbacks


class ConsumerLost(Exception):
    """The consumer that ran a task disappeared too often; recorded as the row's error."""


class TimeLimitExceeded(Exception):
    """Raised inside a call that has run for longer than its ``time_limit``.

    If that does not end it, its supervisor ends the process, and records this as the error.
    """

    # Without arguments it is what another thread raises, which can give it none.
    def __init__(self, message: str = "It ran for longer than its time_limit.") -> None:
        super().__init__(message)


class MemoryLimitExceeded(Exception):
    """Raised inside a call whose process keeps more memory than its ``memory_limit``.

    If that does not end it, its supervisor ends the process, and records this as the error.
    """

    def __init__(self, message: str = "Its process kept more than its memory_limit.") -> None:
        super().__init__(message)


class Withdrawn(Exception):
    """A call is not to be started, and is cancelled; the reason is what its row will tell."""


class StopRequested(BaseException):
    """Raised inside a running call when the shutdown timeout is over."""


DELAY_SECONDS_MAX = 100 * 365 * 86_400


def _delay_seconds(delay: float | timedelta) -> float:
    if isinstance(delay, bool) or not isinstance(delay, int | float | timedelta):
        message = f"delay must be seconds or a timedelta, got {delay!r}."
        raise TypeError(message)
    number = delay.total_seconds() if isinstance(delay, timedelta) else float(delay)
    if not 0 <= number <= DELAY_SECONDS_MAX:
        message = f"delay must be zero or more seconds and at most 100 years, got {delay!r}."
        raise ValueError(message)
    return number


class Retry(Exception):
    """Raise inside a task to try again later; spends one retry.

    Args:
        delay: Pause before the next attempt, in seconds or as ``timedelta``.
            ``None`` leaves it to the task's retry strategy.
    """

    def __init__(self, delay: float | timedelta | None = None) -> None:
        super().__init__("retry asked for by the task")
        self.delay_seconds = None if delay is None else _delay_seconds(delay)


class Snooze(Exception):
    """Raise inside a task to run again later without spending a retry.

    Args:
        delay: Pause before the next attempt, in seconds or as ``timedelta``.
    """

    # For subclasses: what the row says meanwhile, and whether history keeps it.
    reason: str | None = None
    is_notable = True

    def __init__(self, delay: float | timedelta) -> None:
        super().__init__("snoozed by the task")
        self.delay_seconds = _delay_seconds(delay)


class Cancel(Exception):
    """Raise inside a task to end it as ``cancelled``; its transaction is rolled back.

    Args:
        reason: Text for people, kept in the row's ``error``.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "cancelled by the task")
