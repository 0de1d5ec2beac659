"""What a consumer holds in memory: claims that wait, run, or are not settled yet.

A consumer owns exactly this.  Whether a waiting claim is started or released is decided
here, under one lock, before any statement is sent; rows that carry the consumer's id in
the database and do not stand here are released (``Membership``).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from time import monotonic

from .attempts import Claim

_Key = tuple[int, int]

# How long a call waits before it asks again whether the lease is fresh.
LEASE_POLL_SECONDS = 0.1


class Holdings:
    """The claims of one consumer, from claim to settling.

    Args:
        may_start: Whether the lease is fresh; a consumer that was suspended must not
            start what others may have taken over.
        is_low: Called when the sync lanes are about to run out of claims.
    """

    def __init__(self, *, may_start: Callable[[], bool], is_low: Callable[[], None]) -> None:
        self._may_start = may_start
        self._is_low = is_low
        self._lock = threading.Condition()
        self._waiting: deque[tuple[Claim, float]] = deque()
        self._low_mark = 0
        self._is_closed = False
        self._all: dict[_Key, Claim] = {}
        # When each began, and on which thread.
        self._lane_calls: dict[_Key, tuple[float, int]] = {}
        self._coroutines: set[_Key] = set()

    # --- the dispatcher's side

    def hold(self, claims: Iterable[Claim]) -> None:
        """Take over claims that wait for a sync lane, in order."""
        now = monotonic()
        with self._lock:
            for claim in claims:
                self._all[claim.key] = claim
                self._waiting.append((claim, now))
            self._low_mark = len(self._waiting) // 2
            self._lock.notify_all()

    def hold_started(self, claim: Claim) -> None:
        """Take over a claim that is handed to the event loop at once."""
        with self._lock:
            self._all[claim.key] = claim
            self._coroutines.add(claim.key)

    def hold_aside(self, claim: Claim) -> None:
        """Take over a claim that is not started before :meth:`hold` is called with it."""
        with self._lock:
            self._all[claim.key] = claim

    def take_waiting(self, *, older_than_seconds: float = -1.0) -> list[Claim]:
        """Stop holding the claims that have waited longer, and return them to be released."""
        limit = monotonic() - older_than_seconds
        with self._lock:
            taken = [claim for claim, since in self._waiting if since < limit]
            self._waiting = deque(item for item in self._waiting if item[1] >= limit)
            for claim in taken:
                self._all.pop(claim.key, None)
        return taken

    def close(self) -> None:
        """Let the lanes end once nothing waits."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()

    @property
    def waiting(self) -> int:
        """Claims that wait for a sync lane."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Calls that have started and not returned."""
        return len(self._lane_calls) + len(self._coroutines)

    @property
    def running_lanes(self) -> int:
        """Sync lanes that are busy; with group commit one may run several calls."""
        with self._lock:
            return len({lane for _, lane in self._lane_calls.values()})

    @property
    def running_async(self) -> int:
        """Coroutines that have started and not returned."""
        return len(self._coroutines)

    @property
    def is_empty(self) -> bool:
        """Whether everything is settled."""
        return not self._all

    def ids(self) -> set[_Key]:
        """Return ``(id, fence)`` of everything held."""
        with self._lock:
            return set(self._all)

    def started(self) -> list[Claim]:
        """Return the claims whose calls have started and not returned."""
        with self._lock:
            started = [*self._lane_calls, *self._coroutines]
            return [self._all[key] for key in started if key in self._all]

    def lanes_busy_longer_than(self, seconds: float) -> int:
        """Return how many sync lanes have not begun a call since."""
        limit = monotonic() - seconds
        with self._lock:
            latest: dict[int, float] = {}
            for started, lane in self._lane_calls.values():
                latest[lane] = max(started, latest.get(lane, started))
            return sum(started < limit for started in latest.values())

    # --- the executors' side

    def next_sync(self) -> Claim | None:
        """Return the next claim to start, waiting for one; ``None`` once closed and empty."""
        with self._lock:
            while True:
                if not self._waiting:
                    if self._is_closed:
                        return None
                    self._is_low()
                    self._lock.wait()
                elif self._may_start():
                    return self._start_first()
                else:
                    self._lock.wait(LEASE_POLL_SECONDS)

    def next_at_hand(self, accepts: Callable[[Claim], bool]) -> Claim | None:
        """Return the next claim to start if there is one and it is accepted; never wait."""
        with self._lock:
            if not self._waiting or not accepts(self._waiting[0][0]) or not self._may_start():
                return None
            return self._start_first()

    def _start_first(self) -> Claim:
        claim, _ = self._waiting.popleft()
        self._lane_calls[claim.key] = monotonic(), threading.get_ident()
        if len(self._waiting) <= self._low_mark:
            self._is_low()
        return claim

    def returned(self, claim: Claim) -> None:
        """Take note that a call has returned; it is held until it is settled."""
        key = claim.key
        with self._lock:
            self._forget_call(key)

    def done(self, claim: Claim) -> None:
        """Stop holding a claim: it is settled, or its lease was lost."""
        key = claim.key
        with self._lock:
            self._forget_call(key)
            self._all.pop(key, None)

    def _forget_call(self, key: _Key) -> None:
        self._lane_calls.pop(key, None)
        self._coroutines.discard(key)
