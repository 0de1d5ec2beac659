"""How many tasks to claim at once, from how fast they have been running."""

from __future__ import annotations

BATCH_SECONDS = 0.1
BATCH_MAX = 500
_WEIGHT = 0.1
_GROWTH = 2

# A call that takes longer on average joins no group, nor one that is not known yet.
SHORT_SECONDS = 0.005
_KNOWN_CALLS = 3


class Durations:
    """A moving average of how long the calls of each task take."""

    def __init__(self) -> None:
        self._averages: dict[str, tuple[int, float]] = {}
        self._excluded: set[str] = set()

    def observe(self, name: str, duration_seconds: float) -> None:
        """Take note of one call's duration; ``name`` is that of a registered task."""
        calls, average = self._averages.get(name, (0, duration_seconds))
        average += _WEIGHT * (duration_seconds - average)
        self._averages[name] = (calls + 1, average)

    def exclude(self, name: str) -> None:
        """Take calls of ``name`` for long from now on."""
        self._excluded.add(name)

    def are_short(self, name: str) -> bool:
        """Whether calls of ``name`` are known to be short."""
        if name in self._excluded:
            return False
        calls, average = self._averages.get(name, (0, 0.0))
        return calls >= _KNOWN_CALLS and average < SHORT_SECONDS


class Pace:
    """A moving average of the time that calls take.

    The batch starts at 1 and at most doubles with each claim, so that a queue of slow
    tasks is never hoarded, until it holds what the slots finish in about 100 ms.
    """

    def __init__(self) -> None:
        self._average_seconds = BATCH_SECONDS
        self._limit = 1

    def observe(self, duration_seconds: float) -> None:
        """Take note of one call's duration."""
        self._average_seconds += _WEIGHT * (duration_seconds - self._average_seconds)

    def next_batch(self, slots: int) -> int:
        """Return how many claims should be at hand for ``slots`` calls at the same time."""
        wanted = int(BATCH_SECONDS * slots / max(self._average_seconds, 1e-6))
        return max(1, min(wanted, self._limit, BATCH_MAX))

    def claimed(self, batch: int) -> None:
        """Take note of a claim that found something: the next one may be larger.

        Args:
            batch: How many were asked for.
        """
        self._limit = min(batch * _GROWTH, BATCH_MAX)
