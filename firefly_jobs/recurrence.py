"""When something recurs: at an interval or by a cron expression, and what is due by now.

Pure rules; the rows are ``firing``'s.

To add a kind of recurrence: a frozen value with the methods of :class:`Interval`, a name in
``Recurrence``, and a case in ``tests/unit/test_recurrence.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, count, islice
from typing import Any, NamedTuple

from .conf import DURATION_SECONDS_MAX, seconds
from .cron import Cron, first_of, in_utc

SECONDS_MIN = 1.0
# What is skipped if it was missed: what is later than this.
GRACE_SECONDS = 60.0
MISFIRES = ("all", "once", "skip")


@dataclass(frozen=True, slots=True)
class Interval:
    """Recurs every so many seconds, before and after an anchor, whatever clocks are set to.

    Args:
        seconds: 1 or more, rounded to whole microseconds; or a ``timedelta``.
        anchor: An aware moment; an occurrence itself.

    Raises:
        ValueError: If the number is out of range, or the anchor is not aware.
    """

    seconds: float | timedelta
    anchor: datetime

    def __post_init__(self) -> None:
        given: Any = self.seconds
        is_number = isinstance(given, int | float | timedelta) and not isinstance(given, bool)
        if not is_number or not SECONDS_MIN <= seconds(given) <= DURATION_SECONDS_MAX:
            message = (
                f"An interval must be {SECONDS_MIN:g} to {DURATION_SECONDS_MAX} seconds, or a "
                f"timedelta, got {given!r}. What is to run more often is a loop in a task."
            )
            raise ValueError(message)
        object.__setattr__(self, "seconds", seconds(given))
        object.__setattr__(self, "anchor", in_utc(self.anchor, word="The anchor of an interval"))

    @property
    def _step(self) -> timedelta:
        return timedelta(seconds=seconds(self.seconds))

    def following(self, moment: datetime) -> Iterator[datetime]:
        """Yield the occurrences after an aware moment, in UTC, as far as the calendar goes."""
        return self._from(self._number(moment) + 1)

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence after an aware moment, in UTC.

        Raises:
            ValueError: If the calendar, which ends with the year 9999, has none.
        """
        return first_of(self.following(moment), moment)

    def upcoming(self, moment: datetime, count: int) -> list[datetime]:
        """Return the first ``count`` occurrences after an aware moment, in UTC."""
        return list(islice(self.following(moment), count))

    def latest_until(self, moment: datetime) -> datetime | None:
        """Return the last occurrence at or before an aware moment, in UTC, if there is one."""
        return next(self._from(self._number(moment)), None)

    def _number(self, moment: datetime) -> int:
        """Return which occurrence is the last at or before a moment; the anchor is number 0."""
        return (in_utc(moment) - self.anchor) // self._step

    def _from(self, number: int) -> Iterator[datetime]:
        step = self._step
        for place in count(number):
            try:
                yield self.anchor + place * step
            except OverflowError:  # the last or the first year
                return


Recurrence = Cron | Interval


def interval_in_words(interval_seconds: float) -> str:
    """Return an interval exactly, such as ``"1 h 30 min"``."""
    whole = timedelta(seconds=interval_seconds)
    minutes, rest = divmod(whole.seconds, 60)
    found = [(whole.days, "d"), (minutes // 60, "h"), (minutes % 60, "min")]
    words = [f"{number} {unit}" for number, unit in found if number]
    if rest or whole.microseconds or not words:
        fraction = f".{whole.microseconds:06d}".rstrip("0").rstrip(".")
        words.append(f"{rest}{fraction} s")
    return " ".join(words)


class Due(NamedTuple):
    """What fires now, and when the next one does; ``None``: never again."""

    occurrences: tuple[datetime, ...]
    next_run: datetime | None


def due(
    recurrence: Recurrence,
    *,
    next_run: datetime,
    now: datetime,
    misfire: str,
    ends: datetime | None = None,
    limit: int = 1_000,
    grace_seconds: float = GRACE_SECONDS,
) -> Due:
    """Return what fires now.

    Args:
        recurrence: When it recurs.
        next_run: The first occurrence that has not fired.
        now: The moment.
        misfire: What becomes of occurrences that were missed: ``"all"``: each fires;
            ``"once"``: the latest; ``"skip"``: none, but the latest if it is no later than
            ``grace_seconds``.
        ends: After this moment nothing fires; at it, something does.
        limit: How many of ``"all"`` at most; the rest are due at the next look.
        grace_seconds: How late is missed.

    Raises:
        ValueError: If a moment is not aware, or there is no such ``misfire`` or ``limit``.
    """
    if misfire not in MISFIRES or limit < 1:
        message = (
            f"misfire must be one of {', '.join(map(repr, MISFIRES))}, and limit 1 or more, got "
            f"{misfire!r} and {limit!r}."
        )
        raise ValueError(message)
    next_run, now = in_utc(next_run, word="next_run"), in_utc(now, word="now")
    ends = None if ends is None else in_utc(ends, word="ends")
    last = now if ends is None else min(now, ends)
    if next_run > last:
        return Due((), next_run if ends is None or next_run <= ends else None)
    if misfire == "all":
        fires, later = _first(recurrence, next_run, last, limit)
    else:
        # Where a person has moved it, the first one may be off the beat.
        latest = max(recurrence.latest_until(last) or next_run, next_run)
        is_late = misfire == "skip" and (now - latest).total_seconds() > grace_seconds
        fires = () if is_late else (latest,)
        later = next(recurrence.following(now), None)
    is_over = later is None or (ends is not None and later > ends)
    return Due(fires, None if is_over else later)


def _first(
    recurrence: Recurrence, start: datetime, last: datetime, limit: int
) -> tuple[tuple[datetime, ...], datetime | None]:
    """Return ``start`` and what comes after it, up to ``last``, and the one after these."""
    fires: list[datetime] = []
    for moment in chain((start,), recurrence.following(start)):
        if moment > last or len(fires) == limit:
            return tuple(fires), moment
        fires.append(moment)
    return tuple(fires), None


def jitter_seconds(key: str, occurrence: datetime, jitter: float) -> float:
    """Return by how much an occurrence is put off: at least 0, less than ``jitter``.

    The same on every machine, and another for every schedule.
    """
    text = f"{key}:{occurrence.astimezone(UTC).isoformat()}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # 53 bits are what a float holds; of more the highest would be rounded up to 1.
    return jitter * ((int.from_bytes(digest, "big") >> 11) / 2**53)
