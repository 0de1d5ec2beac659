"""When something recurs: at an interval or by a cron expression, and what is due by now.

Pure rules; the rows are ``firing``'s.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from .conf import DURATION_SECONDS_MAX
from .cron import Cron

SECONDS_MIN = 1.0
# What is skipped if it was missed: what is later than this.
GRACE_SECONDS = 60.0
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Interval:
    """Recurs every so many seconds, counted from an anchor, whatever clocks are set to.

    Args:
        seconds: 1 or more; a fraction has whole microseconds.
        anchor: An aware moment; an occurrence itself.

    Raises:
        ValueError: If the number is out of range.
    """

    seconds: float
    anchor: datetime

    def __post_init__(self) -> None:
        number: Any = self.seconds
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not SECONDS_MIN <= number <= DURATION_SECONDS_MAX:
            message = (
                f"An interval must be {SECONDS_MIN:g} to {DURATION_SECONDS_MAX} seconds, or a "
                f"timedelta, got {number!r}. What is to run more often is a loop in a task."
            )
            raise ValueError(message)

    @property
    def _step(self) -> timedelta:
        return timedelta(seconds=self.seconds)

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence after an aware moment, in UTC."""
        return self.upcoming(moment, 1)[0]

    def upcoming(self, moment: datetime, count: int) -> list[datetime]:
        """Return the ``count`` occurrences after an aware moment, in UTC."""
        anchor = self.anchor.astimezone(UTC)
        number = (moment.astimezone(UTC) - anchor) // self._step + 1
        return [anchor + (number + n) * self._step for n in range(count)]

    def latest_until(self, moment: datetime) -> datetime:
        """Return the last occurrence at or before an aware moment, in UTC."""
        return self.next_after(moment) - self._step


Recurrence = Cron | Interval


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
    """
    if next_run > now:
        return Due((), _until(next_run, ends))
    last = now if ends is None else min(now, ends)
    if next_run > last:
        return Due((), None)
    if misfire == "all":
        found = [next_run]
        while len(found) <= limit and found[-1] <= last:
            found.append(recurrence.next_after(found[-1]))
        *fires, following = found
        return Due(tuple(fires), _until(following, ends))
    # Where a person has moved it, the first one may be off the beat.
    latest = max(recurrence.latest_until(last) or next_run, next_run)
    is_late = misfire == "skip" and (now - latest).total_seconds() > grace_seconds
    return Due(() if is_late else (latest,), _until(recurrence.next_after(now), ends))


def _until(moment: datetime, ends: datetime | None) -> datetime | None:
    return moment if ends is None or moment <= ends else None


def jitter_seconds(key: str, occurrence: datetime, jitter: float) -> float:
    """Return by how much an occurrence is put off: at least 0, less than ``jitter``.

    The same on every machine, and another for every schedule.
    """
    text = f"{key}:{occurrence.astimezone(UTC).isoformat()}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return jitter * (int.from_bytes(digest, "big") / 2**64)
