"""The claim that must run with nothing beside it, because its process was lost too often.

If it kills the process, it is found out, and no neighbour is blamed.  The consumer makes
room for it, for a while; then another consumer may try.
"""

from __future__ import annotations

from time import monotonic

from .attempts import Claim

# How long it keeps others from starting, and how long it is left to other consumers if
# there was no room for it: a lease at first, more each time.
ROOM_SECONDS = 2.0
PAUSE_SECONDS_MAX = 600.0


class Alone:
    """At most one such claim of one consumer, waiting for room or running.

    Args:
        lease_seconds: The first pause after there was no room.
    """

    def __init__(self, *, lease_seconds: float) -> None:
        self._lease_seconds = self._pause_seconds = lease_seconds
        self._since = 0.0
        self._has_started = False
        self.claim: Claim | None = None

    def take(self, claim: Claim) -> None:
        """Take over a claim; from now on nothing else may start."""
        self.claim, self._since = claim, monotonic()

    @property
    def waiting(self) -> Claim | None:
        """The claim, if it has not started."""
        return None if self._has_started else self.claim

    def start(self) -> Claim | None:
        """Take note that the call starts, and return its claim."""
        self._has_started = self.claim is not None
        self._pause_seconds = self._lease_seconds
        return self.claim

    @property
    def is_overdue(self) -> bool:
        """Whether it has waited for room for too long."""
        return self.waiting is not None and monotonic() - self._since > ROOM_SECONDS

    def next_pause(self) -> float:
        """Return how many seconds to leave it to other consumers."""
        pause = self._pause_seconds
        self._pause_seconds = min(pause * 2, PAUSE_SECONDS_MAX)
        return pause

    def forget(self, claim: Claim) -> None:
        """Take note that ``claim``, if it is this one, has ended or was given back."""
        if self.claim == claim:
            self._has_started = False
            self.claim = None
