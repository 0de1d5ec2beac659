"""The loop: claim due tasks, hand them to the executors, settle what they return.

:class:`Consumer` is the dispatcher.  It never runs a task itself: sync tasks run on a
lane (a thread with its own connection), coroutines on the event loop's thread, the
heartbeat on a third.  So a signal is answered at once, what waits behind a slow task is
given back, and the lease is renewed whatever the tasks do.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from time import monotonic
from types import FrameType

from django.db import Error, connections

from . import lifecycle, registry
from .attempts import Claim, Ended, Outcome, Settlement
from .claiming import Claimer
from .conf import get_settings
from .databases import Completion
from .exceptions import LeaseLost
from .executors.coroutines import CoroutineLoop
from .executors.threads import SyncLane
from .heartbeat import Heartbeat
from .holdings import Holdings
from .pace import Pace
from .reporting import log_completed
from .settling import Settler
from .states import Status

logger = logging.getLogger("firefly_jobs")

# What waits behind a slow task for longer is released to other consumers.
WAITING_SECONDS_MAX = 1.0
# A call that has run for longer stops claims from being made ahead for its lane.
SLOW_SECONDS = 0.1
POLL_SECONDS_MIN = 0.02
BACK_OFF_SECONDS_MAX = 5.0
# How long interrupted calls get to unwind before the process ends without them.
INTERRUPT_SECONDS = 2.0


class Consumer:
    """Claim due tasks, execute them, settle the results; repeat until asked to stop.

    Args:
        queues: Queue names in strict order of preference, ``"*"`` for all; default
            ``FIREFLY_JOBS["DEFAULT_QUEUE"]``.
        using: Database alias; default ``FIREFLY_JOBS["DATABASE"]``.
        burst: Stop when nothing is due any more.
        max_tasks: Stop after this many tasks.
        shutdown_timeout: Seconds that running calls get after a stop was asked for.
    """

    def __init__(
        self,
        queues: Sequence[str] | None = None,
        *,
        using: str | None = None,
        burst: bool = False,
        max_tasks: int | None = None,
        shutdown_timeout: float | None = None,
    ) -> None:
        self._settings = settings = get_settings()
        self._using = using or settings.DATABASE
        self._queues = list(queues or [settings.DEFAULT_QUEUE])
        self._burst = burst
        self._tasks_left = max_tasks
        self._shutdown_timeout = (
            settings.SHUTDOWN_TIMEOUT if shutdown_timeout is None else shutdown_timeout
        )
        # Signal handlers may interrupt this thread anywhere, so what wakes it must be
        # reentrant; SimpleQueue.put is, Event.set is not.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_woken = False
        self._stopping = False
        self._is_rescued = False
        self._has_failed = False
        self._id = 0
        self._alone: Claim | None = None
        self._is_alone_started = False
        self._async_share = 0.0
        self._alone_since = 0.0
        self._poll_seconds = POLL_SECONDS_MIN
        self._next_claim_at = self._next_reconcile_at = 0.0
        self._pace = Pace(slots=1)
        self._claimer = Claimer(self._queues, using=self._using)
        self._heartbeat = Heartbeat(
            using=self._using, lease_seconds=settings.LEASE_SECONDS, on_rescued=self._rescued
        )
        self._holdings = Holdings(may_start=self._heartbeat.is_fresh, is_low=self._awaken)
        self._settler = Settler(using=self._using, on_settled=self._on_settled)
        self._lane = SyncLane(self, using=self._using, name="firefly-lane")
        self._loop: CoroutineLoop | None = None

    # --- what a caller does

    def run(self) -> int:
        """Consume until asked to stop, then finish what was started.

        Returns:
            0 if it was asked to stop or ran out of work, 1 if ``FAIL_SILENTLY`` is off
            and a task failed.
        """
        with self._signals():
            self._register()
            self._heartbeat.start()
            self._lane.start()
            pause = 0.0
            while not self._stopping:
                try:
                    self._turn()
                    pause = 0.0
                except Exception as error:  # noqa: BLE001 - one turn of the loop; a server may be restarting
                    pause = min(max(pause * 2, 0.1), BACK_OFF_SECONDS_MAX)
                    self._reconnect(error, pause)
                    self._wait(pause)
            self._drain()
        return int(self._has_failed)

    def stop(self) -> None:
        """Ask the consumer to stop; returns at once, from any thread or signal handler."""
        self._stopping = True
        self._wake.put(None)

    @property
    def has_stuck_calls(self) -> bool:
        """Whether calls were left behind that could not be interrupted."""
        return self._lane.is_alive() or (self._loop is not None and self._loop.is_alive())

    # --- one turn

    def _turn(self) -> None:
        """Do what is due, then sleep until something else is."""
        if self._is_rescued:
            self._register_anew()
        if self._is_flush_due():
            self._settler.flush(consumer=self._id)
        self._release(self._holdings.take_waiting(older_than_seconds=WAITING_SECONDS_MAX))
        if monotonic() >= self._next_reconcile_at:
            self._reconcile()
        if self._alone is not None:
            self._make_room(self._alone)
        else:
            self._claim_into_free_slots()
        if not self._stopping:
            self._wait(self._seconds_to_sleep())

    def _claim_into_free_slots(self) -> None:
        room = self._room()
        if room <= 0 or monotonic() < self._next_claim_at:
            return
        claims = self._claimer.claim(room, consumer=self._id)
        if claims:
            self._poll_seconds = POLL_SECONDS_MIN
            self._next_claim_at = 0.0
            self._hand_out(claims)
        elif self._burst and self._is_idle:
            self._stopping = True
        else:
            self._next_claim_at = monotonic() + self._poll_seconds
            self._poll_seconds = min(self._poll_seconds * 2, self._settings.CONSUMER_NAP_TIME)

    def _room(self) -> int:
        """Return how many claims the slots can take now."""
        holdings, batch = self._holdings, self._pace.next_batch()
        is_slow = holdings.lane_busy_seconds() > SLOW_SECONDS
        room = 0 if is_slow or holdings.waiting > batch // 2 else batch
        slots = self._settings.ASYNC_SLOTS - holdings.running_async
        if slots > 0 and registry.has_async() and (room or not holdings.waiting):
            # What is claimed turns out to be sync or async; the share so far is the guess.
            room = max(room, 1, int(slots * self._async_share))
        if self._tasks_left is not None:
            room = min(room, self._tasks_left)
            if self._tasks_left <= 0 and self._is_idle:
                self._stopping = True
        return room

    def _hand_out(self, claims: list[Claim]) -> None:
        """Give claims to their executors; a task that must run alone goes before all others."""
        alone = next((claim for claim in claims if claim.runs_alone), None)
        if alone is not None:
            self._release([claim for claim in claims if claim is not alone])
            self._alone, self._alone_since = alone, monotonic()
            self._holdings.hold_aside(alone)
            self._count(1)
            return
        self._count(len(claims))
        coroutines = [claim for claim in claims if registry.is_async(claim.func_name)]
        self._async_share += 0.3 * (len(coroutines) / len(claims) - self._async_share)
        if len(coroutines) < len(claims):
            self._holdings.hold(c for c in claims if not registry.is_async(c.func_name))
        for claim in coroutines:
            self._start_coroutine(claim)

    def _start_coroutine(self, claim: Claim) -> None:
        if self._loop is None:
            self._loop = CoroutineLoop(self, using=self._using)
            self._loop.start()
        self._holdings.hold_started(claim)
        self._loop.start_call(claim)

    def _make_room(self, alone: Claim) -> None:
        """Start the task that was lost too often once nothing else runs here."""
        if self._is_alone_started:
            return
        self._release(self._holdings.take_waiting())
        if not self._holdings.running:
            self._settler.flush(consumer=self._id)
            self._is_alone_started = True
            if registry.is_async(alone.func_name):
                self._start_coroutine(alone)
            else:
                self._holdings.hold([alone])
        elif monotonic() - self._alone_since > self._settings.LEASE_SECONDS:
            # Others run for too long here.  Another consumer may have room, so let it
            # try before we do.
            self._give_back(alone, delay_seconds=self._settings.LEASE_SECONDS)
            self._alone = None

    def _seconds_to_sleep(self) -> float:
        now = monotonic()
        moments = [now + 1.0, self._next_reconcile_at]
        if self._alone is None and self._room() > 0:
            moments.append(self._next_claim_at)
        if (due := self._settler.seconds_until_due()) is not None:
            moments.append(now if self._is_quiet else now + due)
        if self._holdings.waiting:
            moments.append(now + WAITING_SECONDS_MAX / 4)
        return min(moments) - now

    def _wait(self, seconds: float) -> None:
        if seconds > 0:
            try:
                self._wake.get(timeout=seconds)
            except Empty:
                return
        self._is_woken = False

    def _awaken(self) -> None:
        if not self._is_woken:
            self._is_woken = True
            self._wake.put(None)

    @property
    def _is_quiet(self) -> bool:
        return not self._holdings.waiting and not self._holdings.running

    @property
    def _is_idle(self) -> bool:
        return self._holdings.is_empty and not len(self._settler)

    def _is_flush_due(self) -> bool:
        due = self._settler.seconds_until_due()
        return due is not None and (due <= 0 or self._is_quiet)

    def _count(self, claimed: int) -> None:
        if self._tasks_left is not None:
            self._tasks_left -= claimed

    # --- what executors report (see executors.threads.Work)

    def next_sync(self) -> Claim | None:
        """Return the next claim for a sync lane."""
        return self._holdings.next_sync()

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note of a call that was settled in its own transaction."""
        self._pace.observe(completion.duration)
        self._holdings.done(claim)
        log_completed(claim, completion.duration)
        self._after(claim)
        # It may have scheduled more.
        self._poll_seconds = POLL_SECONDS_MIN
        self._next_claim_at = min(self._next_claim_at, monotonic() + POLL_SECONDS_MIN)

    def dropped(self, claim: Claim) -> None:
        """Take note of a call whose lease was lost."""
        self._holdings.done(claim)
        self._after(claim)

    def ended(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome that is still to be settled."""
        self._pace.observe(outcome.duration)
        self._settler.add(outcome, is_urgent=is_urgent)
        self._holdings.returned(outcome.claim)
        if self._settler.is_urgent or self._is_quiet:
            self._awaken()

    def _on_settled(self, claim: Claim, settlement: Settlement | None) -> None:
        self._holdings.done(claim)
        self._after(claim)
        is_failure = settlement is not None and settlement.ended in {Ended.FAILED, Ended.RETRIED}
        if is_failure and not self._settings.FAIL_SILENTLY:
            logger.error("Stopping at the first failure, as FAIL_SILENTLY is off")
            self._has_failed = True
            self.stop()

    def _after(self, claim: Claim) -> None:
        if self._alone is not None and self._alone.id == claim.id:
            self._alone = None
            self._is_alone_started = False
        if self._holdings.is_empty:
            self._awaken()

    # --- leases

    def _register(self) -> None:
        self._id = lifecycle.register(
            name=f"{socket.gethostname()}:{os.getpid()}",
            queues=self._queues,
            lease_seconds=self._settings.LEASE_SECONDS,
            using=self._using,
        )
        self._heartbeat.watch(self._id)
        self._next_reconcile_at = monotonic() + self._settings.LEASE_SECONDS
        logger.info(
            "Consumer %s consumes %s from database %s",
            self._id,
            ", ".join(self._queues),
            self._using,
            extra={"consumer": self._id},
        )

    def _rescued(self) -> None:
        self._is_rescued = True
        self._awaken()

    def _register_anew(self) -> None:
        """Start over under a new id: others took this consumer for dead and have its rows."""
        lost = self._holdings.take_waiting()
        logger.warning(
            "This consumer was taken for dead and its tasks were rescued; it goes on as a new "
            "one. %s tasks had not started and are dropped.",
            len(lost),
            extra={"consumer": self._id},
        )
        self._is_rescued = False
        self._register()

    def _reconcile(self) -> None:
        """Release rows that carry our id and that we do not hold.

        The answer to a claim may get lost: then the rows are ours and nobody runs them.
        """
        held = self._holdings.ids()
        strays = [
            claim
            for claim in lifecycle.claims_of(self._id, using=self._using)
            if (claim.id, claim.fence) not in held
        ]
        if strays:
            released = lifecycle.release(strays, using=self._using)
            logger.warning(
                "Released %s tasks that were claimed for this consumer without its knowledge",
                released,
                extra={"consumer": self._id},
            )
        self._next_reconcile_at = monotonic() + self._settings.LEASE_SECONDS

    def _release(self, claims: list[Claim]) -> None:
        if claims:
            lifecycle.release(claims, using=self._using)
            self._count(-len(claims))

    def _give_back(self, claim: Claim, *, delay_seconds: float | None = None) -> None:
        """Release a claim that is held, whatever its call is doing."""
        settlement = Settlement(
            claim=claim,
            ended=Ended.RELEASED,
            status=Status.CREATED,
            duration=0.0,
            delay_seconds=delay_seconds,
        )
        try:
            lifecycle.settle(settlement, using=self._using, consumer=self._id)
        except LeaseLost as event:
            logger.debug("%s", event)
        self._holdings.done(claim)

    def _reconnect(self, error: Exception, pause: float) -> None:
        """Drop the dispatcher's connection; what it was doing is found out anew."""
        is_expected = isinstance(error, Error)
        logger.warning(
            "The consumer's loop was interrupted, goes on in %.1fs: %s",
            pause,
            error,
            exc_info=None if is_expected else error,
            extra={"consumer": self._id},
        )
        close_quietly(self._using)
        self._claimer.forget()
        self._next_reconcile_at = 0.0

    # --- stopping

    def _drain(self) -> None:
        """Give back what has not started, let the rest finish, interrupt what does not."""
        logger.info("Consumer %s stops", self._id, extra={"consumer": self._id})
        if self._alone is not None and not self._is_alone_started:
            self._attempt(lambda alone=self._alone: self._give_back(alone))
        waiting = self._holdings.take_waiting()
        self._attempt(lambda: self._release(waiting))
        self._await_calls(self._shutdown_timeout)
        if self._holdings.running:
            logger.warning(
                "Interrupting %s calls that outlasted the shutdown timeout",
                self._holdings.running,
                extra={"consumer": self._id},
            )
            self._lane.interrupt()
            if self._loop is not None:
                self._loop.interrupt()
            self._await_calls(INTERRUPT_SECONDS)
        self._attempt(lambda: self._settler.flush(consumer=self._id))
        for claim in self._holdings.started():
            self._attempt(lambda claim=claim: self._give_back(claim))
        self._holdings.close()
        if self._loop is not None:
            self._loop.stop()
        for thread in filter(None, (self._lane, self._loop)):
            thread.join(timeout=INTERRUPT_SECONDS)
        self._heartbeat.stop()
        self._heartbeat.join(timeout=INTERRUPT_SECONDS)
        self._attempt(self._unregister)
        close_quietly(self._using)

    def _await_calls(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while (self._holdings.running or len(self._settler)) and monotonic() < deadline:
            if self._is_flush_due() and not self._attempt(
                lambda: self._settler.flush(consumer=self._id)
            ):
                self._wait(0.5)
            self._wait(min(0.05, deadline - monotonic()))

    def _unregister(self) -> None:
        self._reconcile()
        if self._holdings.is_empty:
            lifecycle.unregister(self._id, using=self._using)

    def _attempt(self, step: Callable[[], None]) -> bool:
        """Do one step of stopping; a database that is away must not keep the process."""
        for _ in range(3):
            try:
                step()
            except Error as error:
                logger.warning("A step of stopping failed: %s", error)
                close_quietly(self._using)
            else:
                return True
        return False

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop at the first SIGTERM or SIGINT, end the process at the second."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def asked_to_stop(number: int, _: FrameType | None) -> None:
            if self._stopping:
                os._exit(1)
            logger.info("Received %s", signal.Signals(number).name)
            self.stop()

        former = {
            number: signal.signal(number, asked_to_stop)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def close_quietly(using: str) -> None:
    """Close this thread's connection, in whatever state it is."""
    try:
        connections[using].close()
    except Error:
        logger.debug("Closing a broken connection failed", exc_info=True)
