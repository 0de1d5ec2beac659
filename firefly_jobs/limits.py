"""How many calls of one key may run at the same time, and how many may start in a period.

Pure rules: what an option means, what a call's key is, when a token is there.  The rows
that hold slots and buckets are ``admission``'s.

The rate limit is a token bucket, kept as one number: the *theoretical arrival time*, up to
which all tokens are spent (the generic cell rate algorithm of ATM Forum, Traffic Management
Specification 4.1, section 4.4.2; as a limiter of requests see B. Leach, "Rate Limiting,
Cells, and GCRA", 2015; the bucket is J. Turner's, "New Directions in Communications",
IEEE Communications Magazine 24(10), 1986).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from .conf import DURATION_SECONDS_MAX
from .signatures import call_with, check_called_by_name

# A parameter's name, a callable of the call's arguments, or None for all calls of the task.
LimitKey = str | Callable[..., str | None] | None

SECOND = 1_000_000
CONCURRENT_MAX = 1_000_000
RATE_COUNT_MAX = 1_000_000
# As a row carries them: a count and a period, and a key with the kind of the line before it.
RATE_LENGTH_MAX = 32
LINE_LENGTH_MAX = 255 + 2
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_RATE = re.compile(r"\s*(\d+)\s*/\s*(\d*)\s*([smhd])\s*")
# What one parameter's value may be, to be part of a key.  The text decides: 1 and "1" count
# together, as they do in a URL; 1, 1.0 and True do not, though Python takes them for equal.
_PLAIN = (str, int, float, Decimal, UUID, date, time, timedelta, type(None))


@dataclass(frozen=True, slots=True)
class Concurrency:
    """At most ``max_concurrent`` calls of one key run at the same time, on all consumers.

    Args:
        max_concurrent: How many.
        key: Which calls count together: those with the same value of this parameter, those
            for which this callable returns the same text, or with ``None`` all of the task.
    """

    max_concurrent: int
    key: LimitKey = None

    def __post_init__(self) -> None:
        number: Any = self.max_concurrent
        if isinstance(number, bool) or not isinstance(number, int):
            message = f"max_concurrent must be a whole number, got {number!r}."
            raise TypeError(message)
        if not 1 <= number <= CONCURRENT_MAX:
            message = (
                f"max_concurrent must be between 1 and {CONCURRENT_MAX}, got {number}. To hold "
                f"calls back altogether, give them a queue that nobody serves."
            )
            raise ValueError(message)
        _check_key("concurrency", self.key)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most so many calls of one key start in a period, on all consumers.

    Args:
        rate: ``"100/m"``: a number of calls, a slash, and a second, a minute, an hour or a day
            (``s m h d``), or several of them: ``"3/10s"``.
        key: As for :class:`Concurrency`.
    """

    rate: str
    key: LimitKey = None
    parsed: Rate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", _parse(self.rate))
        _check_key("rate_limit", self.key)


def _check_key(option: str, key: Any) -> None:
    if key is not None and not callable(key) and not isinstance(key, str):
        message = (
            f"The key of {option} must be a parameter's name, a callable of the call's arguments, "
            f"or None, got a {type(key).__name__}."
        )
        raise TypeError(message)
    if callable(key):
        check_called_by_name(f"The key of {option}", key)


def as_concurrency(value: Any) -> Concurrency | None:
    """Return the option ``concurrency`` as a value; a number stands for all calls of the task.

    Raises:
        TypeError, ValueError: If it is none.
    """
    if value is None or isinstance(value, Concurrency):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        message = (
            f"concurrency must be a whole number or a value such as Concurrency(3, key='user_id'), "
            f"got {value!r}."
        )
        raise TypeError(message)
    return Concurrency(value)


def as_rate_limit(value: Any) -> RateLimit | None:
    """Return the option ``rate_limit`` as a value; text stands for all calls of the task.

    Raises:
        TypeError, ValueError: If it is none.
    """
    return value if value is None or isinstance(value, RateLimit) else RateLimit(value)


# --- keys


def key_of(
    option: str, key: LimitKey, *, task: str, arguments: Callable[[], Mapping[str, Any]]
) -> Any:
    """Return what calls count together under, as text; a callable's answer unchecked.

    A task's name is part of what is worked out here, so that two tasks never share a limit by
    accident.  The text of a callable is used as it is: tasks that return the same share one.

    Args:
        option: Which option asks, for messages.
        key: Its key.
        task: The task's name.
        arguments: Returns the call's arguments by name; not called if they are not needed.

    Raises:
        TypeError: If the parameter's value cannot be part of a key.
        ValueError: If the call has no such argument.
    """
    if key is None:
        return task
    values = arguments()
    if callable(key):
        return answer_of(key, values, word=f"the key of {option}", task=task)
    if key not in values:
        message = (
            f"The key of {option} is the argument {key!r}, which this call of {task!r} does not "
            f"have."
        )
        raise ValueError(message)
    # The bracket keeps white space at the end of a value from being the end of the key.
    return f"{task}[{key}={_text_of(option, key, values[key])}]"


def answer_of(
    key: Callable[..., Any], arguments: Mapping[str, Any], *, word: str, task: str
) -> Any:
    """Return what a callable key says about a call, unchecked.

    Args:
        key: The callable.
        arguments: The call's arguments by name.
        word: What the key is, for the note on what it raises.
        task: The task's name, likewise.
    """
    try:
        return call_with(key, arguments)
    except Exception as error:
        error.add_note(f"Raised by {word}, so the call of {task!r} was not scheduled.")
        raise


def _text_of(option: str, key: str, value: Any) -> str:
    if isinstance(value, _PLAIN):
        return str(value)
    meta, pk = getattr(value, "_meta", None), getattr(value, "pk", None)
    if meta is not None and pk is not None:
        return f"{meta.label_lower}:{pk}"
    message = (
        f"The key of {option} is the argument {key!r}, a {type(value).__name__}, which has no text "
        f"that tells it from others. Use a callable: key=lambda {key}: ..."
    )
    raise TypeError(message)


# --- rates


@dataclass(frozen=True, slots=True)
class Rate:
    """``count`` tokens in a period; as many are there at once if none was taken before.

    Moments are whole microseconds by the database's clock: as floating-point numbers they
    would round a token away, or to it.  A bucket is its theoretical arrival time.
    """

    count: int
    period_seconds: int

    def __str__(self) -> str:
        return f"{self.count}/{self.period_seconds}"

    @classmethod
    def from_text(cls, text: str) -> Rate:
        """Return the rate that a row carries."""
        count, period = text.split("/")
        return cls(int(count), int(period))

    @property
    def interval(self) -> int:
        """How long one token takes, rounded up."""
        return -(-self.period_seconds * SECOND // self.count)

    def permitted_at(self, bucket: int, *, now: int, ahead: int = 0) -> int:
        """Return the moment at which the next token is there, ``now`` at the earliest.

        Args:
            bucket: Up to when tokens are spent.
            now: The moment.
            ahead: How many others go first.
        """
        return max(now, max(bucket, now) + (ahead + 1 - self.count) * self.interval)

    def taken(self, bucket: int, *, now: int) -> int:
        """Return the bucket after a token was taken ``now``."""
        return max(bucket, now) + self.interval

    def reined(self, bucket: int, *, now: int) -> int:
        """Return the bucket, no further ahead than an empty one.

        Further ahead is one that was filled more slowly by an earlier version of the code, or
        before the clock was set back.
        """
        return min(bucket, now + self.count * self.interval)


def _parse(text: Any) -> Rate:
    if not isinstance(text, str):
        message = f"rate_limit must be text such as '100/m', got {text!r}."
        raise TypeError(message)
    match = _RATE.fullmatch(text)
    if match is None:
        message = (
            f"rate_limit must be calls per second, minute, hour or day, such as '5/s', '100/m', "
            f"'1000/h', '10/d' or '3/10s', got {text!r}."
        )
        raise ValueError(message)
    count, period = int(match[1]), int(match[2] or 1) * _UNITS[match[3]]
    if not 1 <= count <= RATE_COUNT_MAX:
        message = f"rate_limit must permit 1 to {RATE_COUNT_MAX} calls, got {text!r}."
        raise ValueError(message)
    if not 1 <= period <= DURATION_SECONDS_MAX:
        message = (
            f"The period of rate_limit must be 1 to {DURATION_SECONDS_MAX} seconds, got {text!r}."
        )
        raise ValueError(message)
    return Rate(count, period)


def moments(
    rates: Sequence[Rate], bucket: int, *, now: int, ahead: int, most: int, within: int
) -> list[int]:
    """Return when the first calls of a line may start, those that are worth letting go now.

    Args:
        rates: The rate of each call in the line, first one first.
        bucket: Up to when tokens are spent.
        now: The moment.
        ahead: How many have been let go before and have not started.
        most: How many may be let go and not started.
        within: How far ahead calls are let go; the first one always is, if none
            was before.
    """
    found: list[int] = []
    for rate in rates:
        place = ahead + len(found)
        moment = rate.permitted_at(bucket, now=now, ahead=place)
        if place >= most or (place > 0 and moment > now + within):
            break
        found.append(moment)
    return found


def places(maxima: Sequence[int], *, occupied: int) -> int:
    """Return how many of the first in a line may go.

    Args:
        maxima: What each of them says about how many may run, first one first.
        occupied: How many run, or have been let go before.
    """
    count = 0
    for most in maxima:
        if occupied + count >= most:
            break
        count += 1
    return count


# --- lines


# In this order they are locked: slots before buckets.
SLOT, BUCKET = "c:", "r:"


def slot_line(key: str) -> str:
    """Return the name of the line before a concurrency limit."""
    return f"{SLOT}{key}"


def bucket_line(key: str) -> str:
    """Return the name of the line before a rate limit."""
    return f"{BUCKET}{key}"
