"""How many tasks to claim at once, from how fast they have been running."""

from __future__ import annotations

BATCH_SECONDS = 0.1
BATCH_MAX = 500
_WEIGHT = 0.1
_GROWTH = 2


class Pace:
    """A moving average of the time that calls take.

    The batch starts at 1 and at most doubles with each claim, so that a queue of slow
    tasks is never hoarded, until it holds what the slots finish in about 100 ms.

    Args:
        slots: Calls that run at the same time.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._average_seconds = BATCH_SECONDS
        self._batch = 1

    def observe(self, duration_seconds: float) -> None:
        """Take note of one call's duration."""
        self._average_seconds += _WEIGHT * (duration_seconds - self._average_seconds)

    def next_batch(self) -> int:
        """Return how many claims should be at hand."""
        wanted = int(BATCH_SECONDS * self._slots / max(self._average_seconds, 1e-6))
        self._batch = max(1, min(wanted, self._batch * _GROWTH, BATCH_MAX))
        return self._batch
