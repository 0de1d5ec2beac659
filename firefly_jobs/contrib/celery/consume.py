"""Claim rows here, and let Celery workers execute them.

The process is a consumer like any other: it has a row and a heartbeat, its claims are
rescued if it dies, and what it holds in memory is what it owns.  Only its slots are
elsewhere.  A message tells a worker which row to execute under which fence; the worker
settles it in the call's own transaction.  So the rows stay the truth, and Celery's queue
may lose or repeat messages: a claim that nobody settles comes back, and of two that are
executed one commits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any

from celery import Celery
from django.db import Error
from kombu.exceptions import KombuError

from firefly_jobs import databases, fencing, lifecycle
from firefly_jobs.attempts import Claim, Outcome, decide
from firefly_jobs.bell import Bell
from firefly_jobs.claiming import Claimer
from firefly_jobs.conf import get_settings, seconds
from firefly_jobs.consumer_options import count, queue_names, shutdown_seconds
from firefly_jobs.exceptions import ConsumerLost, LeaseLost
from firefly_jobs.heartbeat import Heartbeat, awake_seconds
from firefly_jobs.holdings import Holdings
from firefly_jobs.membership import KeptConnection, Membership
from firefly_jobs.napping import Nap
from firefly_jobs.readiness import insist
from firefly_jobs.reporting import log_settled
from firefly_jobs.stopping import INTERRUPT_SECONDS, stop_signals

from .app import RUN

logger = logging.getLogger("firefly_jobs")

MAX_IN_FLIGHT = 100
SILENCE_SECONDS = 3_600.0
# How often it is looked up what has ended: with room for more, and without.
LOOK_SECONDS, LOOK_SECONDS_FULL = 1.0, 0.1
BACK_OFF_SECONDS_MAX = 5.0


class CeleryConsumer:
    """Claim due tasks, send them to Celery workers, see to those that do not come back.

    Args:
        app: The Celery application.
        queues: Queue names in strict order of preference, ``"*"`` for all; default
            ``FIREFLY_JOBS["DEFAULT_QUEUE"]``.
        using: Database alias; default ``FIREFLY_JOBS["DATABASE"]``.
        max_in_flight: How many may be sent and not have ended.
        silence: Seconds or ``timedelta`` after which a task that has not ended counts as lost.
        celery_queue: Celery's queue; by default as Celery routes ``firefly_jobs.run``.
        shutdown_timeout: Seconds, or a ``timedelta``, that what is in flight gets after a stop.
    """

    def __init__(
        self,
        app: Celery,
        queues: Sequence[str] | None = None,
        *,
        using: str | None = None,
        max_in_flight: int | None = None,
        silence: float | timedelta = SILENCE_SECONDS,
        celery_queue: str | None = None,
        shutdown_timeout: float | timedelta | None = None,
    ) -> None:
        settings = get_settings()
        self._app = app
        self._using = using or settings.DATABASE
        self._queues = queue_names(queues)
        self._max_in_flight = count("max_in_flight", max_in_flight, MAX_IN_FLIGHT)
        self._silence_seconds = seconds(silence)
        self._options: dict[str, Any] = {} if celery_queue is None else {"queue": celery_queue}
        self._shutdown_timeout = shutdown_seconds(shutdown_timeout)
        self._max_rescues = settings.MAX_RESCUES
        self._bell = Bell()
        self._is_stopping = False
        self._rescued_id: int | None = None
        # What was sent, and when.
        self._in_flight: dict[Claim, float] = {}
        self._next_look_at = 0.0
        self._claimer = Claimer(self._queues, using=self._using)
        self._nap = Nap(
            self._claimer,
            using=self._using,
            queues=self._queues,
            owner=self.owner,
            awaken=self._bell.ring,
        )
        self._heartbeat = Heartbeat(
            using=self._using, lease_seconds=settings.LEASE_SECONDS, on_rescued=self._rescued
        )
        self._holdings = Holdings(may_start=self._heartbeat.is_fresh, is_low=self._bell.ring)
        self._membership = Membership(
            using=self._using,
            queues=self._queues,
            lease_seconds=settings.LEASE_SECONDS,
            holdings=self._holdings,
        )
        self._connection = KeptConnection(self._using, owner=self.owner)

    def run(self) -> None:
        """Send tasks until asked to stop; then wait for what is in flight."""
        databases.leave_pools()
        with stop_signals(self.stop):
            if not insist(
                self._using,
                self._register,
                is_stopping=lambda: self._is_stopping,
                wait=self._bell.wait,
            ):
                return
            self._heartbeat.start()
            self._nap.start()
            pause = 0.0
            while not self._is_stopping:
                try:
                    self._turn()
                    pause = 0.0
                except Exception as error:  # noqa: BLE001 - one turn of the loop; a server may be restarting
                    pause = min(max(pause * 2, 0.1), BACK_OFF_SECONDS_MAX)
                    self._start_over(error, pause)
                    self._bell.wait(pause)
            self._drain()

    def stop(self) -> None:
        """Ask it to stop; returns at once, from any thread or signal handler."""
        self._is_stopping = True
        self._bell.ring()

    def owner(self) -> int:
        """Return the consumer's id."""
        return self._membership.id

    # --- one turn

    def _turn(self) -> None:
        self._connection.ensure()
        if self._rescued_id == self._membership.id:
            self._register_anew()
        if monotonic() >= self._next_look_at:
            self._look_for_ended()
        if monotonic() >= self._membership.next_reconcile_at and self._membership.reconcile():
            self._nap.call()
        room = self._max_in_flight - len(self._in_flight)
        if room > 0 and self._nap.seconds_left <= 0:
            self._claim_and_send(room)
        if not self._is_stopping:
            has_room = len(self._in_flight) < self._max_in_flight
            moments = [self._next_look_at, self._membership.next_reconcile_at]
            pause = min(moments) - monotonic()
            if has_room:
                pause = min(pause, self._nap.seconds_left)
            self._nap.sleep(max(pause, 0.0), self._bell.wait, has_room=has_room)

    def _claim_and_send(self, room: int) -> None:
        self._nap.begin_look()
        claims = self._claimer.claim(room, consumer=self._membership.id)
        self._nap.end_look(has_found=bool(claims))
        for place, claim in enumerate(claims):
            self._holdings.hold_aside(claim)
            try:
                self._send(claim)
            except Exception:
                # Whether this one has left, nobody knows; released, its fence is gone.
                for unsent in claims[place:]:
                    self._forget(unsent)
                self._membership.release(claims[place:])
                raise
            self._in_flight[claim] = monotonic()

    def _send(self, claim: Claim) -> None:
        message = {
            "using": self._using,
            "consumer": self._membership.id,
            "pk": claim.id,
            "fence": claim.fence,
        }
        self._app.send_task(RUN, kwargs=message, ignore_result=True, **self._options)

    # --- what became of them

    def _look_for_ended(self) -> None:
        """Forget what is not held under its fence any more: it was settled, or taken over."""
        if self._in_flight:
            held = set(fencing.held_among(list(self._in_flight), using=self._using))
            for claim in set(self._in_flight) - held:
                self._forget(claim)
            self._give_up_on_the_silent()
        is_full = len(self._in_flight) >= self._max_in_flight
        self._next_look_at = monotonic() + (LOOK_SECONDS_FULL if is_full else LOOK_SECONDS)

    def _give_up_on_the_silent(self) -> None:
        limit = monotonic() - self._silence_seconds
        for claim in [claim for claim, sent_at in self._in_flight.items() if sent_at < limit]:
            error = ConsumerLost(
                f"No Celery worker has ended this task within {self._silence_seconds:g} s."
            )
            # As if its consumer had disappeared: it may be the task that ends its worker.
            outcome = Outcome(
                claim=claim, duration=self._silence_seconds, error=error, is_lost=True
            )
            settlement = decide(outcome, max_rescues=self._max_rescues)
            with suppress(LeaseLost):
                lifecycle.settle(settlement, using=self._using, consumer=self._membership.id)
                log_settled(settlement)
            self._forget(claim)

    def _forget(self, claim: Claim) -> None:
        self._in_flight.pop(claim, None)
        self._holdings.done(claim)

    # --- leases

    def _register(self) -> None:
        before = awake_seconds()
        self._membership.register()
        self._heartbeat.watch(self._membership.id, since=before)

    def _rescued(self, consumer: int) -> None:
        self._rescued_id = consumer
        self._bell.ring()

    def _register_anew(self) -> None:
        """Start over under a new id: others took this consumer for dead and have its rows."""
        logger.warning(
            "This consumer was taken for dead and its tasks were rescued; it goes on as a new "
            "one. %s tasks in flight are dropped.",
            len(self._in_flight),
            extra={"consumer": self._membership.id},
        )
        for claim in list(self._in_flight):
            self._forget(claim)
        self._membership.reconcile()
        self._register()

    def _start_over(self, error: Exception, pause: float) -> None:
        database = databases.of(self._using)
        is_busy = database.is_busy(error) or database.is_conflict(error)
        is_expected = isinstance(error, Error | OSError | KombuError)
        logger.log(
            logging.DEBUG if is_busy else logging.WARNING,
            "The consumer's loop was interrupted, goes on in %.1fs: %s",
            pause,
            error,
            exc_info=None if is_expected else error,
            extra={"consumer": self._membership.id},
        )
        if not is_busy:
            self._connection.close()
        self._claimer.forget()
        self._nap.call()
        self._membership.next_reconcile_at = 0.0

    # --- stopping

    def _drain(self) -> None:
        """Let what is in flight end; give back what has not, which workers then cannot settle."""
        consumer = self._membership.id
        logger.info("Consumer %s stops", consumer, extra={"consumer": consumer})
        deadline = monotonic() + self._shutdown_timeout
        while self._in_flight and monotonic() < deadline:
            self._connection.insist(self._look_for_ended)
            if self._in_flight:
                self._bell.wait(min(LOOK_SECONDS_FULL, max(deadline - monotonic(), 0.0)))
        self._connection.insist(self._give_back_the_rest)
        self._heartbeat.stop()
        self._heartbeat.join(timeout=INTERRUPT_SECONDS)
        self._connection.insist(self._membership.unregister)
        self._nap.stop()
        self._connection.close()

    def _give_back_the_rest(self) -> None:
        rest: list[Any] = list(self._in_flight)
        for claim in rest:
            self._membership.give_back(claim, has_started=True)
            self._forget(claim)
