"""What one call may take: time and memory.

Read here, stored in the row by ``enqueue``.  A limit may be written as a
:class:`Limit` or as the option of the same meaning; both end up as seconds and bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, ClassVar

from .conf import DURATION_SECONDS_MAX, seconds

MEMORY_BYTES_MAX = 2**63 - 1
# As --max-memory counts.
_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)I?B?", re.IGNORECASE)


class LimitType(StrEnum):
    """What is limited."""

    TIME = "time"
    MEMORY = "memory"


@dataclass(frozen=True)
class Limit:
    """How much time or memory one call may take.

    Args:
        type: ``Limit.Type.TIME`` or ``Limit.Type.MEMORY``.
        value: Seconds or a ``timedelta``; bytes or text such as ``"200MB"``.
    """

    Type: ClassVar = LimitType

    type: LimitType
    value: float | timedelta | str

    def __post_init__(self) -> None:
        kind: Any = self.type
        if not isinstance(kind, LimitType):
            message = f"A limit is of Limit.Type.TIME or Limit.Type.MEMORY, got {kind!r}."
            raise TypeError(message)
        check = time_seconds if self.type is LimitType.TIME else memory_bytes
        check(self.value)


def fold(
    limits: Any, *, time_limit: float | None, memory_limit: int | None
) -> tuple[float | None, int | None]:
    """Return both limits as seconds and bytes, from either way of writing them.

    Raises:
        TypeError: If ``limits`` is no list of limits.
        ValueError: If the same is limited twice.
    """
    if isinstance(limits, Limit | str) or not isinstance(limits, Iterable):
        message = f"limits must be a list such as [Limit(Limit.Type.TIME, 60)], got {limits!r}."
        raise TypeError(message)
    found: dict[LimitType, Any] = {LimitType.TIME: time_limit, LimitType.MEMORY: memory_limit}
    for limit in limits:
        if not isinstance(limit, Limit):
            message = f"limits must contain Limit values, got {limit!r}."
            raise TypeError(message)
        if found[limit.type] is not None:
            message = f"The {limit.type} of a call is limited twice; give one limit for it."
            raise ValueError(message)
        found[limit.type] = limit.value
    time, memory = found[LimitType.TIME], found[LimitType.MEMORY]
    return (
        None if time is None else time_seconds(time),
        None if memory is None else memory_bytes(memory),
    )


def time_seconds(value: Any) -> float:
    """Return a time limit in seconds; raise ``TypeError`` or ``ValueError`` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        message = f"time_limit must be seconds or a timedelta, got {value!r}."
        raise TypeError(message)
    if not 0 < seconds(value) <= DURATION_SECONDS_MAX:
        message = (
            f"time_limit must be more than zero seconds, at most {DURATION_SECONDS_MAX}, "
            f"got {value!r}."
        )
        raise ValueError(message)
    return float(seconds(value))


def memory_bytes(value: Any) -> int:
    """Return a memory limit in bytes; raise ``TypeError`` or ``ValueError`` if it is none."""
    number: Any = value
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            message = f"memory_limit must be bytes or text such as '200MB', got {value!r}."
            raise ValueError(message)
        # What is too much for a whole number is too much for a limit.
        number = int(min(float(match[1]) * _UNITS[match[2].upper()], 2.0 * MEMORY_BYTES_MAX))
    elif isinstance(value, bool) or not isinstance(value, int):
        message = f"memory_limit must be whole bytes or text such as '200MB', got {value!r}."
        raise TypeError(message)
    if not 1 <= number <= MEMORY_BYTES_MAX:
        message = f"memory_limit must be at least one byte and at most 8 EiB, got {value!r}."
        raise ValueError(message)
    return int(number)
