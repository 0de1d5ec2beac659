"""Decide whether a failed attempt is tried again, and after how long.

A retry strategy is a pure value: it is told how many attempts have been made and what
the last one raised, and answers with a delay in seconds or ``None`` for "give up".  It
never reads the clock, the settings or the database, so the same question always gets
the same answer: jitter included, because the jitter is derived from the task's id
instead of from a random generator.

A strategy travels with the row as JSON (:meth:`RetryStrategy.to_json`), so a row keeps
the promise it was scheduled with when the code changes.

To add a strategy: subclass :class:`RetryStrategy`, give it a unique ``kind``, and add a
case to ``tests/unit/test_retries.py``.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

from .conf import DURATION_SECONDS_MAX, RETRIES_MAX, seconds

_KINDS: dict[str, type[RetryStrategy]] = {}


def exception_names(classes: Any) -> tuple[str, ...]:
    """Return dotted names of exception classes; names pass through.

    Names, not classes, because a strategy is stored as JSON and read by a process that
    must not import a module only because a row mentions it.
    """
    names = []
    given = classes if isinstance(classes, tuple | list | set | frozenset) else (classes,)
    for item in given:
        if isinstance(item, str):
            names.append(item)
        elif isinstance(item, type) and issubclass(item, BaseException):
            names.append(f"{item.__module__}.{item.__qualname__}")
        else:
            message = f"retry_on takes exception classes, got {item!r}."
            raise TypeError(message)
    return tuple(names)


def fraction(task_id: int, attempt: int) -> float:
    """Return a number in [0, 1) that is always the same for a task's attempt."""
    digest = hashlib.blake2b(f"{task_id}:{attempt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


@dataclass(frozen=True)
class RetryStrategy:
    """How often, how soon and after which errors an attempt is repeated.

    Attributes:
        retries_max: Retries that follow the first attempt.
        retry_on: Exception classes worth a retry; empty means every one.
    """

    kind: ClassVar[str] = ""

    retries_max: int = 3
    retry_on: tuple[type[BaseException] | str, ...] = field(default=(), kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        other = _KINDS.get(cls.kind)
        is_taken = other is not None and (other.__module__, other.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        )
        if not cls.kind or is_taken:
            message = f"{cls.__name__} needs a 'kind' of its own, got {cls.kind!r}."
            raise TypeError(message)
        _KINDS[cls.kind] = cls

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, timedelta):
                object.__setattr__(self, name, seconds(value))
        object.__setattr__(self, "retry_on", exception_names(self.retry_on))
        _require_count("retries_max", self.retries_max)

    def delay_seconds(self, *, task_id: int, attempt: int, error: BaseException) -> float | None:
        """Return the pause before the next attempt, or ``None`` to give up.

        Args:
            task_id: Primary key of the failed task.  Only used to spread retries; two
                tasks that fail together should not return together.
            attempt: Number of the attempt that just failed, counted from 1.
            error: What that attempt raised.

        Returns:
            Seconds to wait, zero or more.  ``None`` once ``retries_max`` retries have
            been used, or if ``error`` is not in ``retry_on``.

        Raises:
            ValueError: If ``attempt`` is below 1.  That is a bug in the caller: an
                attempt is counted before it can fail.
        """
        if attempt < 1:
            message = f"attempt is counted from 1, got {attempt}."
            raise ValueError(message)
        if attempt > self.retries_max or not self.matches(error):
            return None
        return self.pause_seconds(task_id=task_id, attempt=attempt)

    @abstractmethod
    def pause_seconds(self, *, task_id: int, attempt: int) -> float:
        """Return the pause after failed attempt number ``attempt``, in seconds."""

    def matches(self, error: BaseException) -> bool:
        """Whether ``error`` is one of ``retry_on``, or a subclass of one."""
        names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__}
        return not self.retry_on or not names.isdisjoint(exception_names(self.retry_on))

    def to_json(self) -> str:
        """Return the strategy as text for a row."""
        return json.dumps({"kind": self.kind, **asdict(self)}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> RetryStrategy:
        """Return the strategy that :meth:`to_json` wrote.

        Raises:
            LookupError: If no strategy of that kind is defined in this process.
        """
        values = json.loads(text)
        kind = values.pop("kind", None)
        if kind not in _KINDS:
            message = (
                f"No retry strategy of kind {kind!r} is defined in this process. Import its "
                f"module where tasks are imported, for example from a tasks.py."
            )
            raise LookupError(message)
        return _KINDS[kind](**values)


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= RETRIES_MAX:
        message = f"{name} must be 0 or more and at most {RETRIES_MAX}, got {value!r}."
        raise ValueError(message)


def _require_duration(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= DURATION_SECONDS_MAX:
        message = (
            f"{name} must be zero or more seconds, or a timedelta, and at most "
            f"{DURATION_SECONDS_MAX} s, got {value!r}."
        )
        raise ValueError(message)


@dataclass(frozen=True)
class Fixed(RetryStrategy):
    """Wait the same time before every retry.

    Args:
        retries_max: Retries after the first attempt.
        delay: Seconds, or a ``timedelta``.
        retry_on: Exception classes worth a retry; empty means every one.
    """

    kind: ClassVar[str] = "fixed"

    delay: float | timedelta = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_duration("delay", self.delay)

    def pause_seconds(self, *, task_id: int, attempt: int) -> float:  # noqa: ARG002 - the same for all
        """Return ``delay``."""
        return seconds(self.delay)


@dataclass(frozen=True)
class Exponential(RetryStrategy):
    """Wait ``min(base_delay * factor**(attempt - 1), max_delay)``, plus jitter.

    Args:
        retries_max: Retries after the first attempt.
        base_delay: Seconds before the first retry, or a ``timedelta``.
        factor: What each pause is longer by; 1 or more.
        max_delay: Longest pause before jitter, in seconds or as ``timedelta``.
        jitter_ratio: Largest share of the pause that is added to it, 0 to 1, so that
            tasks that failed together do not return together.
        retry_on: Exception classes worth a retry; empty means every one.
    """

    kind: ClassVar[str] = "exponential"

    base_delay: float | timedelta = 1.0
    factor: float = 2
    max_delay: float | timedelta = 60.0
    jitter_ratio: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_duration("base_delay", self.base_delay)
        _require_duration("max_delay", self.max_delay)
        if not 1 <= self.factor < math.inf:
            message = f"factor must be 1 or more, and finite, got {self.factor!r}."
            raise ValueError(message)
        if not 0 <= self.jitter_ratio <= 1:
            message = f"jitter_ratio must be between 0 and 1, got {self.jitter_ratio!r}."
            raise ValueError(message)

    def pause_seconds(self, *, task_id: int, attempt: int) -> float:
        """Return the pause for this attempt, jitter included."""
        base, longest = seconds(self.base_delay), seconds(self.max_delay)
        try:
            pause = min(base * self.factor ** (attempt - 1), longest)
        except OverflowError:
            pause = longest
        return pause * (1 + self.jitter_ratio * fraction(task_id, attempt))


@dataclass(frozen=True)
class RandomDelay(RetryStrategy):
    """Wait a time between two bounds, spread evenly over the tasks.

    Args:
        retries_max: Retries after the first attempt.
        min_delay: Shortest pause in seconds, or a ``timedelta``.
        max_delay: Longest pause in seconds, or a ``timedelta``.
        retry_on: Exception classes worth a retry; empty means every one.
    """

    kind: ClassVar[str] = "random"

    min_delay: float | timedelta = 1.0
    max_delay: float | timedelta = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_duration("min_delay", self.min_delay)
        _require_duration("max_delay", self.max_delay)
        if seconds(self.max_delay) < seconds(self.min_delay):
            message = (
                f"max_delay must not be below min_delay, got {self.max_delay!r} and "
                f"{self.min_delay!r}."
            )
            raise ValueError(message)

    def pause_seconds(self, *, task_id: int, attempt: int) -> float:
        """Return this attempt's place between the bounds."""
        low, high = seconds(self.min_delay), seconds(self.max_delay)
        return low + (high - low) * fraction(task_id, attempt)
