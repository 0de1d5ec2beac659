"""Where claims run: the sync lane, the event loop, and the task that must be alone.

:class:`Slots` knows how many claims can be taken now and who gets which.  It claims,
settles and releases nothing itself; that is the dispatcher's part.
"""

from __future__ import annotations

from time import monotonic

from . import registry
from .attempts import Claim
from .conf import get_settings
from .executors.coroutines import CoroutineLoop
from .executors.threads import SyncLane, Work
from .holdings import Holdings
from .pace import Pace

# A call that has run for longer stops claims from being made ahead for its lane.
SLOW_SECONDS = 0.1
# How long no coroutine is looked for behind a slow sync call after none was found.
PROBE_SECONDS_MIN, PROBE_SECONDS_MAX = 1.0, 30.0
_SHARE_WEIGHT = 0.3


class Slots:
    """The executors of one consumer.

    Args:
        work: The consumer's side of the executors.
        holdings: What the consumer holds.
        using: Database alias.
    """

    def __init__(self, work: Work, holdings: Holdings, *, using: str) -> None:
        self._work = work
        self._holdings = holdings
        self._using = using
        self._async_slots = get_settings().ASYNC_SLOTS
        self._lane = SyncLane(work, using=using, name="firefly-lane")
        self._loop: CoroutineLoop | None = None
        self._async_share = 0.0
        self._is_probing = False
        self._next_probe_at = 0.0
        self._probe_pause = PROBE_SECONDS_MIN
        self.pace = Pace(slots=1)
        self.alone: Claim | None = None
        self.alone_since = 0.0
        self._is_alone_started = False

    def start(self) -> None:
        """Start the lane; the event loop starts with the first coroutine."""
        self._lane.start()

    def room(self) -> int:
        """Return how many claims the slots can take now."""
        holdings, batch = self._holdings, self.pace.next_batch()
        is_slow = holdings.lane_busy_seconds() > SLOW_SECONDS
        room = 0 if is_slow or holdings.waiting > batch // 2 else batch
        free = self._async_slots - holdings.running_async
        self._is_probing = is_slow and not room
        may_probe = not self._is_probing or monotonic() >= self._next_probe_at
        if free > 0 and registry.has_async() and may_probe and (room or not holdings.waiting):
            # What is claimed turns out to be sync or async; the share so far is the guess.
            room = max(room, 1, int(free * self._async_share))
        return room

    def hand_out(self, claims: list[Claim]) -> list[Claim]:
        """Give claims to their executors; return those that have to be released.

        A task that was lost too often runs alone, so nothing is handed out beside it.
        """
        alone = next((claim for claim in claims if claim.runs_alone), None)
        if alone is not None:
            self.alone, self.alone_since = alone, monotonic()
            self._holdings.hold_aside(alone)
            return [claim for claim in claims if claim is not alone]
        coroutines = [claim for claim in claims if registry.is_async(claim.func_name)]
        plain = [claim for claim in claims if not registry.is_async(claim.func_name)]
        self._async_share += _SHARE_WEIGHT * (len(coroutines) / len(claims) - self._async_share)
        for claim in coroutines:
            self._start_coroutine(claim)
        if plain and self._is_probing:
            # The lane is busy with a slow call, and a coroutine was hoped for.  Others get
            # these at once, and hope rests for a while.
            self._next_probe_at = monotonic() + self._probe_pause
            self._probe_pause = min(self._probe_pause * 2, PROBE_SECONDS_MAX)
            return plain
        self._probe_pause = PROBE_SECONDS_MIN
        if plain:
            self._holdings.hold(plain)
        return []

    # --- running one task alone

    @property
    def is_alone_waiting(self) -> bool:
        """Whether a task is to run alone and has not started."""
        return self.alone is not None and not self._is_alone_started

    def start_alone(self) -> None:
        """Start the task that runs alone; nothing else may be waiting or running."""
        if self.alone is None:
            return
        self._is_alone_started = True
        if registry.is_async(self.alone.func_name):
            self._start_coroutine(self.alone)
        else:
            self._holdings.hold([self.alone])

    def forget_alone(self, claim: Claim | None = None) -> None:
        """Take note that the task that ran alone has ended, or was given back."""
        if self.alone is not None and (claim is None or claim == self.alone):
            self.alone = None
            self._is_alone_started = False

    # --- stopping

    def interrupt(self) -> None:
        """Interrupt every running call, as far as that is possible."""
        self._lane.interrupt()
        if self._loop is not None and self._loop.is_alive():
            self._loop.interrupt()

    def break_off(self) -> None:
        """Free what calls that could not be interrupted hold; the process is about to end."""
        self._lane.break_off()
        if self._loop is not None and self._loop.is_alive():
            self._loop.break_off()

    def stop(self, *, timeout_seconds: float) -> None:
        """End the threads; what cannot be ended is left behind."""
        self._holdings.close()
        if self._loop is not None and self._loop.is_alive():
            self._loop.stop()
            self._loop.join(timeout=timeout_seconds)
        self._lane.join(timeout=timeout_seconds)

    @property
    def is_healthy(self) -> bool:
        """Whether every thread that was started still runs."""
        return self._lane.is_alive() and (self._loop is None or self._loop.is_alive())

    @property
    def has_stuck_calls(self) -> bool:
        """Whether threads were left behind."""
        return self._lane.is_alive() or (self._loop is not None and self._loop.is_alive())

    def _start_coroutine(self, claim: Claim) -> None:
        if self._loop is None:
            self._loop = CoroutineLoop(self._work, using=self._using)
            self._loop.start()
        self._holdings.hold_started(claim)
        try:
            self._loop.start_call(claim)
        except BaseException:
            self._holdings.done(claim)
            raise
