"""The loop: claim due tasks, hand them to the executors, settle what they return.

:class:`Consumer` is the dispatcher.  It never runs a task itself: sync tasks run on a
lane (a thread with its own connection), coroutines on the event loop's thread, the
heartbeat on a third.  So a signal is answered at once, what waits behind a slow task is
given back, and the lease is renewed whatever the tasks do.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic

from django.db import Error, connections

from . import databases, lifecycle, registry
from .attempts import Claim, Ended, Outcome, Settlement
from .claiming import Claimer
from .conf import get_settings
from .databases import Completion
from .exceptions import LeaseLost
from .heartbeat import Heartbeat
from .holdings import Holdings
from .reporting import log_completed
from .settling import Settler
from .slots import Slots
from .states import Status
from .stopping import INTERRUPT_SECONDS, stop_signals

logger = logging.getLogger("firefly_jobs")

# What waits behind a slow task for longer is released to other consumers.
WAITING_SECONDS_MAX = 1.0
POLL_SECONDS_MIN = 0.02
BACK_OFF_SECONDS_MAX = 5.0
_STEP_ATTEMPTS = 3


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
        self._database = databases.of(self._using)
        self._prepared: object = None
        self._queues = list(queues or [settings.DEFAULT_QUEUE])
        self._burst = burst
        self._tasks_left = max_tasks
        self._shutdown_timeout = (
            settings.SHUTDOWN_TIMEOUT if shutdown_timeout is None else shutdown_timeout
        )
        # Lanes, the event loop, the heartbeat and signals wake the dispatcher through it.
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._is_woken = self._is_stopping = self._is_rescued = self._has_failed = False
        self._id = 0
        self._poll_seconds = POLL_SECONDS_MIN
        self._next_claim_at = self._next_reconcile_at = 0.0
        self._claimer = Claimer(self._queues, using=self._using)
        self._heartbeat = Heartbeat(
            using=self._using, lease_seconds=settings.LEASE_SECONDS, on_rescued=self._rescued
        )
        self._holdings = Holdings(may_start=self._heartbeat.is_fresh, is_low=self._awaken)
        self._settler = Settler(using=self._using, on_settled=self._on_settled)
        self._slots = Slots(self, self._holdings, using=self._using)

    # --- what a caller does

    def run(self) -> int:
        """Consume until asked to stop, then finish what was started.

        Returns:
            0 if it was asked to stop or ran out of work, 1 if ``FAIL_SILENTLY`` is off
            and a task failed.
        """
        with stop_signals(self.stop):
            self._register()
            self._heartbeat.start()
            self._slots.start()
            pause = 0.0
            while not self._is_stopping:
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
        self._is_stopping = True
        self._wake.put(None)

    @property
    def has_stuck_calls(self) -> bool:
        """Whether calls were left behind that could not be interrupted."""
        return self._slots.has_stuck_calls

    # --- one turn

    def _turn(self) -> None:
        """Do what is due, then sleep until something else is."""
        if not self._slots.is_healthy:
            self.crashed()
            return
        self._connect()
        if self._is_rescued:
            self._register_anew()
        if self._is_flush_due():
            self._settler.flush(consumer=self._id)
            if self._is_stopping:
                return
        self._release(self._holdings.take_waiting(older_than_seconds=WAITING_SECONDS_MAX))
        if monotonic() >= self._next_reconcile_at:
            self._reconcile()
        if self._slots.is_alone_waiting:
            self._make_room_for_one()
        elif self._slots.alone is None:
            self._claim_into_free_slots()
        if not self._is_stopping:
            self._wait(self._seconds_to_sleep())

    def _claim_into_free_slots(self) -> None:
        room = self._room()
        if room <= 0 or monotonic() < self._next_claim_at:
            return
        claims = self._claimer.claim(room, consumer=self._id)
        if claims:
            self._poll_seconds = POLL_SECONDS_MIN
            self._next_claim_at = 0.0
            if self._tasks_left is not None:
                self._tasks_left -= len(claims)
            self._release(self._slots.hand_out(claims))
        elif self._burst and self._is_idle:
            self._is_stopping = True
        else:
            self._next_claim_at = monotonic() + self._poll_seconds
            self._poll_seconds = min(self._poll_seconds * 2, self._settings.CONSUMER_NAP_TIME)

    def _room(self) -> int:
        room = self._slots.room()
        if self._tasks_left is None:
            return room
        if self._tasks_left <= 0 and self._is_idle:
            self._is_stopping = True
        return min(room, self._tasks_left)

    def _make_room_for_one(self) -> None:
        """Start the task that was lost too often, once nothing else waits or runs here."""
        self._release(self._holdings.take_waiting())
        if not self._holdings.running:
            self._settler.flush(consumer=self._id)
            self._slots.start_alone()
        elif monotonic() - self._slots.alone_since > self._settings.LEASE_SECONDS:
            # Others run for too long here.  Another consumer may have room, so let it
            # try before we do.
            self._give_back_alone(delay_seconds=self._settings.LEASE_SECONDS)

    def _seconds_to_sleep(self) -> float:
        now = monotonic()
        moments = [now + 1.0, self._next_reconcile_at]
        if self._slots.alone is None and self._room() > 0:
            moments.append(self._next_claim_at)
        if (due := self._settler.seconds_until_due()) is not None:
            moments.append(now if self._is_quiet else now + due)
        if self._holdings.waiting:
            moments.append(now + WAITING_SECONDS_MAX / 4)
        return min(moments) - now

    def _wait(self, seconds: float) -> None:
        try:
            self._wake.get(block=seconds > 0, timeout=max(seconds, 0.0))
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

    # --- what executors report (see executors.threads.Work)

    def owner(self) -> int:
        """Return the consumer's id."""
        return self._id

    def next_sync(self) -> Claim | None:
        """Return the next claim for a sync lane."""
        return self._holdings.next_sync()

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note of a call that was settled in its own transaction."""
        self._observe(claim, completion.duration)
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
        self._observe(outcome.claim, outcome.duration)
        self._settler.add(outcome, is_urgent=is_urgent)
        self._holdings.returned(outcome.claim)
        if self._settler.is_urgent or self._is_quiet:
            self._awaken()

    def _observe(self, claim: Claim, duration: float) -> None:
        # Coroutines mostly wait; they say nothing about how fast the lane is.
        if not registry.is_async(claim.func_name):
            self._slots.pace.observe(duration)

    def crashed(self) -> None:
        """Stop with an error: an executor ended by a mistake of its own."""
        self._has_failed = True
        self.stop()

    def _on_settled(self, claim: Claim, settlement: Settlement | None) -> None:
        self._holdings.done(claim)
        self._after(claim)
        is_failure = settlement is not None and settlement.ended in {Ended.FAILED, Ended.RETRIED}
        if is_failure and not self._settings.FAIL_SILENTLY:
            logger.error("Stopping at the first failure, as FAIL_SILENTLY is off")
            self._has_failed = True
            self.stop()

    def _after(self, claim: Claim) -> None:
        self._slots.forget_alone(claim)
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
        if self._slots.is_alone_waiting and self._slots.alone is not None:
            self._holdings.done(self._slots.alone)
            self._slots.forget_alone()
        # A claim may have come in between the rescue and this moment.  Others would find
        # such orphans too, but only at their second look.
        self._release(lost)
        self._reconcile()
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
            for claim in claims:
                self._slots.forget_alone(claim)
            if self._tasks_left is not None:
                self._tasks_left += len(claims)

    def _give_back(
        self, claim: Claim, *, has_started: bool, delay_seconds: float | None = None
    ) -> None:
        """Release a claim that is held, whatever its call is doing."""
        settlement = Settlement(
            claim=claim,
            ended=Ended.RELEASED,
            status=Status.CREATED,
            duration=0.0,
            delay_seconds=delay_seconds,
            has_started=has_started,
        )
        try:
            lifecycle.settle(settlement, using=self._using, consumer=self._id)
        except LeaseLost as event:
            logger.debug("%s", event)
        self._holdings.done(claim)

    def _give_back_alone(self, *, delay_seconds: float | None = None) -> None:
        if self._slots.alone is not None:
            self._give_back(self._slots.alone, has_started=False, delay_seconds=delay_seconds)
            self._slots.forget_alone()
            if self._tasks_left is not None:
                self._tasks_left += 1

    def _connect(self) -> None:
        connection = connections[self._using]
        connection.ensure_connection()
        if connection.connection is not self._prepared:
            self._database.prepare_dispatcher(connection, self._id)
            self._prepared = connection.connection

    def _reconnect(self, error: Exception, pause: float) -> None:
        """Drop the dispatcher's connection; what it was doing is found out anew."""
        is_busy = self._database.is_busy(error)
        is_expected = isinstance(error, Error)
        logger.log(
            logging.DEBUG if is_busy else logging.WARNING,
            "The consumer's loop was interrupted, goes on in %.1fs: %s",
            pause,
            error,
            exc_info=None if is_expected else error,
            extra={"consumer": self._id},
        )
        if not is_busy:
            _close(self._using)
        self._claimer.forget()
        self._next_reconcile_at = 0.0

    # --- stopping

    def _drain(self) -> None:
        """Give back what has not started, let the rest finish, interrupt what does not."""
        logger.info("Consumer %s stops", self._id, extra={"consumer": self._id})
        if self._slots.is_alone_waiting:
            self._insist(self._give_back_alone)
        waiting = self._holdings.take_waiting()
        self._insist(lambda: self._release(waiting))
        self._await_calls(self._shutdown_timeout)
        if self._holdings.running:
            logger.warning(
                "Interrupting %s calls that outlasted the shutdown timeout",
                self._holdings.running,
                extra={"consumer": self._id},
            )
            self._slots.interrupt()
            self._await_calls(INTERRUPT_SECONDS)
        if self._holdings.running:
            self._slots.break_off()
        self._insist(self._give_back_the_rest)
        self._slots.stop(timeout_seconds=INTERRUPT_SECONDS)
        self._heartbeat.stop()
        self._heartbeat.join(timeout=INTERRUPT_SECONDS)
        if self._slots.has_stuck_calls:
            # What cannot be interrupted here, the server can end, and its locks with it.
            self._insist(self._end_sessions)
        self._insist(self._unregister)
        _close(self._using)

    def _await_calls(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while (self._holdings.running or len(self._settler)) and monotonic() < deadline:
            if self._is_flush_due() and not self._insist(self._flush):
                self._wait(min(0.5, deadline - monotonic()))
            self._wait(min(0.05, deadline - monotonic()))

    def _flush(self) -> None:
        self._settler.flush(consumer=self._id)

    def _give_back_the_rest(self) -> None:
        self._flush()
        for claim in self._holdings.started():
            self._give_back(claim, has_started=True)

    def _end_sessions(self) -> None:
        self._database.end_sessions(connections[self._using], self._id)

    def _unregister(self) -> None:
        self._reconcile()
        if self._holdings.is_empty:
            lifecycle.unregister(self._id, using=self._using)

    def _insist(self, step: Callable[[], None]) -> bool:
        """Do one step of stopping; a database that is away must not keep the process."""
        for _ in range(_STEP_ATTEMPTS):
            try:
                self._connect()
                step()
            except Error as error:
                logger.warning("A step of stopping failed: %s", error)
                if not self._database.is_busy(error):
                    _close(self._using)
            else:
                return True
        return False


def _close(using: str) -> None:
    """Close this thread's connection, in whatever state it is."""
    try:
        connections[using].close()
    except Error:
        logger.debug("Closing a broken connection failed", exc_info=True)
