"""Where claims run: the sync lanes, the event loop, and the task that must be alone.

:class:`Slots` knows how many claims can be taken now and who gets which.  It claims,
settles and releases nothing itself; that is the dispatcher's part.
"""

from __future__ import annotations

from time import monotonic

from . import registry
from .alone import Alone
from .attempts import Claim
from .executors.allowances import Allowances
from .executors.coroutines import CoroutineLoop
from .executors.threads import SyncLane
from .executors.work import Work
from .holdings import Holdings
from .pace import BATCH_MAX, Pace

# A call that has run for longer stops claims from being made ahead for its lane.
SLOW_SECONDS = 0.1
# How long no coroutine is looked for behind a slow sync call after none was found.
PROBE_SECONDS_MIN, PROBE_SECONDS_MAX = 1.0, 30.0
# How long nothing is claimed after a claim found more coroutines than there were slots.
FULL_SECONDS = 0.5
_SHARE_WEIGHT = 0.3


class Slots:
    """The executors of one consumer.

    Args:
        work: The consumer's side of the executors.
        holdings: What the consumer holds.
        alone: The claim that nothing may run beside.
        using: Database alias.
        threads: Sync calls at the same time, each on a lane of its own.
        async_slots: Coroutines at the same time.
        async_connections: Database connections that coroutines share.
    """

    def __init__(
        self,
        work: Work,
        holdings: Holdings,
        alone: Alone,
        *,
        using: str,
        threads: int,
        async_slots: int,
        async_connections: int,
    ) -> None:
        self._work = work
        self._holdings = holdings
        self._alone = alone
        self._using = using
        self._async_slots = async_slots
        self._async_connections = async_connections
        self._allowances = Allowances(on_outgrown=work.outgrew)
        self._lanes = [
            SyncLane(work, self._allowances, using=using, name=f"firefly-lane-{n}")
            for n in range(1, threads + 1)
        ]
        self._loop: CoroutineLoop | None = None
        self._async_share = 0.0
        self._is_probing = False
        self._next_probe_at = 0.0
        self._probe_pause = PROBE_SECONDS_MIN
        self.pace = Pace()
        self._is_wary = False
        self._full_until = 0.0

    def start(self) -> None:
        """Start the lanes; the event loop starts with the first coroutine."""
        self._allowances.warn_if_unsupervised()
        for lane in self._lanes:
            lane.start()

    def room(self) -> int:
        """Return how many claims the slots can take now."""
        holdings, lanes = self._holdings, len(self._lanes)
        quick = lanes - holdings.lanes_busy_longer_than(SLOW_SECONDS)
        is_slow = quick <= 0
        batch = 0 if is_slow else self.pace.next_batch(quick)
        # However slow tasks are, no lane stays idle.
        idle = lanes - holdings.running_lanes - holdings.waiting
        room = max(batch if holdings.waiting <= batch // 2 else 0, idle)
        if self._is_wary:
            # What was lost together comes back together, and each has to run alone.
            return min(room, 1)
        free = self._async_slots - holdings.running_async
        if free <= 0 and monotonic() < self._full_until:
            return 0
        if self._async_share > 0:
            room = min(room, max(int(free / self._async_share), 1))
        self._is_probing = is_slow and not room
        may_probe = not self._is_probing or monotonic() >= self._next_probe_at
        if free > 0 and registry.has_async() and may_probe and (room or not holdings.waiting):
            # What is claimed turns out to be sync or async; the share so far is the guess.
            room = max(room, 1, min(int(free * self._async_share), BATCH_MAX))
        return room

    def hand_out(self, claims: list[Claim]) -> list[Claim]:
        """Give claims to their executors; return those that have to be released.

        A task that was lost too often runs alone, so nothing is handed out beside it.
        """
        alone = next((claim for claim in claims if claim.runs_alone), None)
        self._is_wary = alone is not None
        if alone is not None:
            self._alone.take(alone)
            self._holdings.hold_aside(alone)
            return [claim for claim in claims if claim is not alone]
        coroutines = [claim for claim in claims if registry.is_async(claim.func_name)]
        plain = [claim for claim in claims if not registry.is_async(claim.func_name)]
        self._async_share += _SHARE_WEIGHT * (len(coroutines) / len(claims) - self._async_share)
        free = max(self._async_slots - self._holdings.running_async, 0)
        for claim in coroutines[:free]:
            self._start_coroutine(claim)
        excess = coroutines[free:]
        if excess:
            # A queue full of coroutines; what is behind them has to wait as well.
            self._full_until = monotonic() + FULL_SECONDS
        if plain and self._is_probing:
            # The lane is busy with a slow call, and a coroutine was hoped for.  Others get
            # these at once, and hope rests for a while.
            self._next_probe_at = monotonic() + self._probe_pause
            self._probe_pause = min(self._probe_pause * 2, PROBE_SECONDS_MAX)
            return plain + excess
        self._probe_pause = PROBE_SECONDS_MIN
        if plain:
            self._holdings.hold(plain)
        return excess

    def start_alone(self) -> None:
        """Start the task that runs alone; nothing else may be waiting or running."""
        claim = self._alone.start()
        if claim is None:
            return
        if registry.is_async(claim.func_name):
            self._start_coroutine(claim)
        else:
            self._holdings.hold([claim])

    # --- stopping

    def interrupt(self) -> None:
        """Interrupt every running call, as far as that is possible."""
        for lane in self._lanes:
            lane.interrupt()
        if self._loop is not None and self._loop.is_alive():
            self._loop.interrupt()

    def break_off(self) -> None:
        """Free what calls that could not be interrupted hold; the process is about to end."""
        for lane in self._lanes:
            lane.break_off()
        if self._loop is not None and self._loop.is_alive():
            self._loop.break_off()

    def stop(self, *, timeout_seconds: float) -> None:
        """End the threads; what has not ended after so long, all together, is left behind."""
        self._holdings.close()
        deadline = monotonic() + timeout_seconds
        if self._loop is not None and self._loop.is_alive():
            self._loop.stop()
            self._loop.join(timeout=timeout_seconds)
        for lane in self._lanes:
            lane.join(timeout=max(deadline - monotonic(), 0.0))
        self._allowances.stop(timeout_seconds=max(deadline - monotonic(), 0.0))

    @property
    def is_healthy(self) -> bool:
        """Whether every thread that was started still runs."""
        lanes_live = all(lane.is_alive() for lane in self._lanes)
        return lanes_live and (self._loop is None or self._loop.is_alive())

    @property
    def has_stuck_calls(self) -> bool:
        """Whether threads were left behind."""
        lanes_live = any(lane.is_alive() for lane in self._lanes)
        return lanes_live or (self._loop is not None and self._loop.is_alive())

    def _start_coroutine(self, claim: Claim) -> None:
        if self._loop is None:
            self._loop = CoroutineLoop(
                self._work,
                self._allowances,
                using=self._using,
                connections=self._async_connections,
            )
            self._loop.start()
        self._holdings.hold_started(claim)
        try:
            self._loop.start_call(claim)
        except BaseException:
            self._holdings.done(claim)
            raise
