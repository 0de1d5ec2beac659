"""Priorities by name, and the bands that consumers are told to serve.

A priority is a whole number from -100 to 100, higher first; a name stands for one of
them.  The same name also stands for a band, the numbers around it, where a consumer is
told what to serve: the bands cover every number once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import Any, Literal

from .conf import suggestion

PRIORITY_MIN, PRIORITY_MAX = -100, 100

PriorityName = Literal["critical", "high", "normal", "low", "background"]
Band = tuple[int, int]


class Priority(IntEnum):
    """Names for priorities."""

    CRITICAL = 100
    HIGH = 50
    NORMAL = 0
    LOW = -50
    BACKGROUND = -100


NUMBERS = {priority.name.lower(): int(priority) for priority in Priority}
BANDS: dict[str, Band] = {
    "critical": (100, 100),
    "high": (50, 99),
    "normal": (0, 49),
    "low": (-50, -1),
    "background": (-100, -51),
}
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_NUMBER = re.compile(r"-?\d+")


def as_number(priority: Any) -> int:
    """Return a priority given as a number, a name or a :class:`Priority` as a number.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is out of range, or there is no such name.
    """
    if isinstance(priority, str) and priority in NUMBERS:
        return NUMBERS[priority]
    if isinstance(priority, str) and not _NUMBER.fullmatch(priority):
        message = (
            f"There is no priority {priority!r}, only {', '.join(NUMBERS)}."
            f"{suggestion(priority, NUMBERS)}"
        )
        raise ValueError(message)
    if isinstance(priority, bool) or not isinstance(priority, int):
        message = (
            f"priority must be a whole number, got {priority!r}; or one of {', '.join(NUMBERS)}."
        )
        raise TypeError(message)
    if not PRIORITY_MIN <= priority <= PRIORITY_MAX:
        message = f"priority must be between {PRIORITY_MIN} and {PRIORITY_MAX}, got {priority}."
        raise ValueError(message)
    return int(priority)


def bands(served: Iterable[Any]) -> tuple[Band, ...]:
    """Return what a consumer serves, highest first; touching bands are one.

    Args:
        served: Names, ``Priority`` members (their bands), single numbers, ``"A..B"``, or
            pairs of numbers.

    Raises:
        TypeError, ValueError: If one of them is none of these, or nothing is left.
    """
    merged: list[Band] = []
    for low, high in sorted(map(_band, served)):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    if not merged:
        message = f"priorities must name at least one band of {', '.join(BANDS)}."
        raise ValueError(message)
    return tuple(reversed(merged))


def at_least(priority: Any) -> Band:
    """Return the band from a priority, or from the start of a named band, upwards."""
    return _band(priority)[0], PRIORITY_MAX


def _band(word: Any) -> Band:
    if isinstance(word, Priority):
        return BANDS[word.name.lower()]
    if isinstance(word, str):
        return _band_of_text(word.strip())
    low, high = word if isinstance(word, tuple | list) and len(word) == 2 else (word, word)  # noqa: PLR2004 - a pair
    low, high = as_number(low), as_number(high)
    if low > high:
        message = f"A band goes from low to high, so {low}..{high} is empty."
        raise ValueError(message)
    return low, high


def _band_of_text(text: str) -> Band:
    if text in BANDS:
        return BANDS[text]
    if match := _RANGE.fullmatch(text):
        return _band((int(match[1]), int(match[2])))
    if _NUMBER.fullmatch(text):
        return _band(int(text))
    message = (
        f"There is no band {text!r}; give one of {', '.join(BANDS)}, or a range such as -50..100."
        f"{suggestion(text, BANDS)}"
    )
    raise ValueError(message)
