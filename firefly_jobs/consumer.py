"""The loop: claim due tasks, hand them to the executors, settle what they return.

:class:`Consumer` is the dispatcher.  It never runs a task itself: sync tasks run on a
lane (a thread with its own connection), coroutines on the event loop's thread, the
heartbeat on a third.  So a signal is answered at once, what waits behind a slow task is
given back, and the lease is renewed whatever the tasks do.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any

from django.db import Error

from . import databases, messenger, registry
from .alone import Alone
from .attempts import Claim, Ended, Outcome, Settlement
from .bell import Bell
from .claiming import Claimer, QueueOrder
from .conf import get_settings
from .consumer_options import count, queue_names, shutdown_seconds
from .control import Link, current_watch
from .databases import Completion
from .draining import Drain
from .heartbeat import Heartbeat, awake_seconds
from .holdings import Holdings
from .hooks import shared_hooks
from .membership import KeptConnection, Membership
from .napping import Nap
from .pace import Durations
from .priorities import bands
from .readiness import insist
from .reporting import log_completed
from .retiring import Retirement
from .settling import Settler
from .slots import Slots
from .states import Status
from .stopping import INTERRUPT_SECONDS, stop_signals
from .ticker import Ticker
from .wakeup import flush

logger = logging.getLogger("firefly_jobs")

# What waits behind a slow task for longer is released to other consumers.  Looked at four
# times as often, so they get it within a second.
WAITING_SECONDS_MAX = 0.75
BACK_OFF_SECONDS_MAX = 5.0


class Consumer:
    """Claim due tasks, execute them, settle the results; repeat until asked to stop.

    Args:
        queues: Queue names in strict order of preference, ``"*"`` for all; default
            ``FIREFLY_JOBS["DEFAULT_QUEUE"]``.
        using: Database alias; default ``FIREFLY_JOBS["DATABASE"]``.
        burst: Stop when nothing is due any more.
        max_tasks: Retire after this many tasks.
        max_memory_mb: Retire once the process keeps more than so many megabytes.
        threads: Sync tasks that run at the same time, each with a connection of its own.
        async_slots: Async tasks that run at the same time; default
            ``FIREFLY_JOBS["ASYNC_SLOTS"]``.
        async_connections: Connections that async tasks share; default
            ``FIREFLY_JOBS["ASYNC_CONNECTIONS"]``.
        group_commit: Run short tasks in groups with one COMMIT each, unless their own
            ``group_commit`` says no.
        queue_order: ``"strict"``: a later queue is served when the former have nothing due.
            ``"fair"``: each claim starts with another queue.
        priorities: Which priorities to serve: names, numbers, ``"A..B"``; default all.
        shutdown_timeout: Seconds, or a ``timedelta``, that running calls get after a stop.
        link: What to tell a supervisor through.
    """

    def __init__(
        self,
        queues: Sequence[str] | None = None,
        *,
        using: str | None = None,
        burst: bool = False,
        max_tasks: int | None = None,
        max_memory_mb: int | None = None,
        threads: int = 1,
        async_slots: int | None = None,
        async_connections: int | None = None,
        group_commit: bool = False,
        queue_order: QueueOrder = "strict",
        priorities: Sequence[Any] | None = None,
        shutdown_timeout: float | timedelta | None = None,
        link: Link | None = None,
    ) -> None:
        self._settings = settings = get_settings()
        self._using = using or settings.DATABASE
        self._database = databases.of(self._using)
        # Now, since nothing could be done about a wrong one in the midst of a call.
        shared_hooks()
        self._queues = queue_names(queues)
        self._burst = burst
        self._tasks_left = count("max_tasks", max_tasks, None)
        # Lanes, the event loop, the heartbeat and signals wake the dispatcher through it.
        self._bell = Bell()
        self._link = link or Link()
        self._retirement = Retirement(max_memory_mb, link=self._link, on_asked=self._bell.ring)
        self._group_commit = group_commit
        self._durations = Durations()
        self._shutdown_timeout = shutdown_seconds(shutdown_timeout)
        self._is_stopping = self._has_failed = False
        self._rescued_id: int | None = None
        self._alone = Alone(lease_seconds=settings.LEASE_SECONDS)
        served = databases.ALL_BANDS if priorities is None else bands(priorities)
        self._claimer = Claimer(self._queues, using=self._using, order=queue_order, bands=served)
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
        self._ticker = Ticker(using=self._using, owner=self.owner, on_fired=self._look_again)
        self._holdings = Holdings(may_start=self._heartbeat.is_fresh, is_low=self._bell.ring)
        self._membership = Membership(
            using=self._using,
            queues=self._queues,
            lease_seconds=settings.LEASE_SECONDS,
            holdings=self._holdings,
        )
        self._connection = KeptConnection(self._using, owner=self.owner)
        self._settler = Settler(using=self._using, on_settled=self._on_settled)
        self._slots = Slots(
            self,
            self._holdings,
            self._alone,
            using=self._using,
            threads=count("threads", threads, 1),
            async_slots=count("async_slots", async_slots, settings.ASYNC_SLOTS),
            async_connections=count(
                "async_connections", async_connections, settings.ASYNC_CONNECTIONS
            ),
        )

    # --- what a caller does

    def run(self) -> int:
        """Consume until asked to stop, then finish what was started.

        Returns:
            0 if it was asked to stop or ran out of work, 1 if ``FAIL_SILENTLY`` is off
            and a task failed.
        """
        databases.leave_pools()
        with stop_signals(self.stop), self._retirement:
            if not insist(
                self._using,
                self._register,
                is_stopping=lambda: self._is_stopping,
                wait=self._bell.wait,
            ):
                return 0
            self._heartbeat.start()
            messenger.start()
            self._ticker.start()
            self._slots.start()
            self._nap.start()
            pause = 0.0
            while not self._is_stopping:
                try:
                    self._turn()
                    pause = 0.0
                except Exception as error:  # noqa: BLE001 - one turn of the loop; a server may be restarting
                    pause = min(max(pause * 2, 0.1), BACK_OFF_SECONDS_MAX)
                    self._reconnect(error, pause)
                    self._bell.wait(pause)
            self._drain()
        return int(self._has_failed)

    def stop(self) -> None:
        """Ask the consumer to stop; returns at once, from any thread or signal handler."""
        self._is_stopping = True
        self._bell.ring()

    def retire(self, reason: str) -> None:
        """Let a fresh process take over: claim no more, and stop once all calls have ended.

        Unlike after :meth:`stop`, these get all the time they need.
        """
        self._retirement.ask(reason)

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
        self._connection.ensure()
        if self._rescued_id == self._membership.id:
            self._register_anew()
        if self._settler.is_due(is_quiet=self._is_quiet):
            self._settler.flush(consumer=self._membership.id)
            if self._is_stopping:
                return
        self._release(self._holdings.take_waiting(older_than_seconds=WAITING_SECONDS_MAX))
        if monotonic() >= self._membership.next_reconcile_at and self._membership.reconcile():
            self._nap.call()
        self._take_on_work()
        if not self._is_stopping:
            has_room = self._alone.claim is None and self._room() > 0
            self._nap.sleep(self._seconds_to_sleep(has_room), self._bell.wait, has_room=has_room)

    def _take_on_work(self) -> None:
        if self._has_started_its_tasks():
            self._retirement.ask("max-tasks")
        if self._retirement.is_asked:
            self._make_way()
        elif self._alone.waiting:
            self._make_room_for_one()
        elif self._alone.claim is None:
            self._claim_into_free_slots()

    def _claim_into_free_slots(self) -> None:
        room = self._room()
        if room <= 0 or self._nap.seconds_left > 0:
            return
        # Asked first: a call that ends while we look may have scheduled more.
        self._nap.begin_look()
        was_idle = self._is_idle and self._ticker.has_caught_up
        claims = self._claimer.claim(room, consumer=self._membership.id)
        if claims:
            self._nap.end_look(has_found=True)
            self._slots.pace.claimed(room)
            if self._tasks_left is not None:
                self._tasks_left -= len(claims)
            self._release(self._slots.hand_out(claims))
        elif self._claimer.has_given_up:
            self._nap.end_look(has_found=True)
        elif self._burst and was_idle:
            self._is_stopping = True
        else:
            self._nap.end_look(has_found=False)

    def _room(self) -> int:
        if self._retirement.is_asked:
            return 0
        room = self._slots.room()
        return room if self._tasks_left is None else min(room, self._tasks_left)

    def _has_started_its_tasks(self) -> bool:
        # The last of them is to be run here, not given back.
        are_waiting = self._holdings.waiting or self._alone.waiting
        return self._tasks_left is not None and self._tasks_left <= 0 and not are_waiting

    def _make_way(self) -> None:
        """Give back what has not started, and stop once the rest has ended."""
        self._retirement.announce(self._membership.id)
        if self._alone.waiting:
            self._give_back_alone()
        self._release(self._holdings.take_waiting())
        if self._is_idle:
            self._is_stopping = True

    def _make_room_for_one(self) -> None:
        """Start the task that was lost too often, once nothing else waits or runs here."""
        self._release(self._holdings.take_waiting())
        if not self._holdings.running:
            self._settler.flush(consumer=self._membership.id)
            self._slots.start_alone()
        elif self._alone.is_overdue:
            # Others run for too long here.  Another consumer may have room, so let it
            # try before we do; and everything else waits meanwhile.
            self._give_back_alone(delay_seconds=self._alone.next_pause())

    def _seconds_to_sleep(self, has_room: bool) -> float:
        now = monotonic()
        moments = [now + 1.0, self._membership.next_reconcile_at]
        if has_room:
            moments.append(now + self._nap.seconds_left)
        if (due := self._settler.seconds_until_due(is_quiet=self._is_quiet)) is not None:
            moments.append(now + due)
        if self._holdings.waiting:
            moments.append(now + WAITING_SECONDS_MAX / 4)
        return min(moments) - now

    @property
    def _is_quiet(self) -> bool:
        return not self._holdings.waiting and not self._holdings.running

    @property
    def _is_idle(self) -> bool:
        return self._holdings.is_empty and not len(self._settler)

    # --- what executors report (see executors.work)

    def owner(self) -> int:
        """Return the consumer's id."""
        return self._membership.id

    def may_start(self) -> bool:
        """Whether the lease is fresh, so that nobody can have rescued what was claimed."""
        return self._heartbeat.is_fresh()

    def next_sync(self) -> Claim | None:
        """Return the next claim for a sync lane."""
        return self._holdings.next_sync()

    def may_join_group(self, claim: Claim) -> bool:
        """Whether ``claim`` may share a transaction with others."""
        task = registry.get(claim.func_name)
        own = None if task is None else task.options.group_commit
        return (
            task is not None
            and (self._group_commit if own is None else own)
            and task.options.atomic
            and not claim.runs_alone
            and not claim.is_bounded
            and self._durations.are_short(claim.func_name)
        )

    def left_group(self, claim: Claim) -> None:
        """Take note that calls of this task cannot share a transaction."""
        self._durations.exclude(claim.func_name)

    def next_for_group(self) -> Claim | None:
        """Return the next claim if it is at hand and may join a group, without waiting."""
        return self._holdings.next_at_hand(self.may_join_group)

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note of a call that was settled in its own transaction."""
        self._observe(claim, completion.duration)
        self._holdings.done(claim)
        log_completed(claim, completion.duration)
        messenger.completed(
            claim, completion.duration, using=self._using, consumer=self._membership.id
        )
        self._after(claim)

    def dropped(self, claim: Claim) -> None:
        """Take note of a call whose lease was lost."""
        self._holdings.done(claim)
        self._after(claim)

    def ended(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome that is still to be settled."""
        if outcome.has_started:
            self._observe(outcome.claim, outcome.duration)
        self._settler.add(outcome, is_urgent=is_urgent)
        self._holdings.returned(outcome.claim)
        if self._settler.is_urgent or self._is_quiet:
            self._bell.ring()

    def _observe(self, claim: Claim, duration: float) -> None:
        # Coroutines mostly wait; they say nothing about how fast the lane is.
        task = registry.get(claim.func_name)
        if task is not None and not task.is_async:
            self._slots.pace.observe(duration)
            self._durations.observe(claim.func_name, duration)

    def outgrew(self) -> None:
        """Make way: what a call has left behind would be taken for that of the next."""
        if current_watch().is_enforced:
            self.retire("memory-limit")

    def crashed(self) -> None:
        """Stop with an error, such as an executor's that ended by a mistake of its own."""
        self._has_failed = True
        self.stop()

    def _on_settled(self, claim: Claim, settlement: Settlement | None) -> None:
        self._holdings.done(claim)
        self._after(claim)
        if settlement is not None and settlement.status is Status.CREATED:
            # When it is due again, only the database knows.
            self._nap.call()
        is_failure = settlement is not None and settlement.ended in {Ended.FAILED, Ended.RETRIED}
        if is_failure and not self._settings.FAIL_SILENTLY:
            logger.error("Stopping at the first failure, as FAIL_SILENTLY is off")
            self.crashed()

    def _after(self, claim: Claim) -> None:
        self._alone.forget(claim)
        self._ticker.ended(claim)
        if self._alone.waiting and not self._holdings.running:
            self._bell.ring()
        if claim.is_limited or self._holdings.is_empty:
            # Another may have been let go in its place.  And the last one may have scheduled
            # more; and a burst ends with a look in vain.
            self._look_again()

    def _look_again(self) -> None:
        self._nap.call()
        self._bell.ring()

    # --- leases

    def _register(self) -> None:
        before = awake_seconds()
        self._membership.register()
        self._heartbeat.watch(self._membership.id, since=before)
        self._link.registered(self._membership.id)

    def _rescued(self, consumer: int) -> None:
        self._rescued_id = consumer
        self._bell.ring()

    def _register_anew(self) -> None:
        """Start over under a new id: others took this consumer for dead and have its rows."""
        lost = self._holdings.take_waiting()
        logger.warning(
            "This consumer was taken for dead and its tasks were rescued; it goes on as a new "
            "one. %s tasks had not started and are dropped.",
            len(lost),
            extra={"consumer": self._membership.id},
        )
        if waiting := self._alone.waiting:
            self._holdings.done(waiting)
            self._alone.forget(waiting)
        # A claim may have come in between the rescue and this moment.  Others would find
        # such orphans too, but only at their second look.
        self._release(lost)
        self._membership.reconcile()
        self._register()

    def _release(self, claims: list[Claim]) -> None:
        if claims:
            self._membership.release(claims)
            self._nap.call()
            for claim in claims:
                self._alone.forget(claim)
            if self._tasks_left is not None:
                self._tasks_left += len(claims)

    def _give_back_alone(self, *, delay_seconds: float | None = None) -> None:
        claim = self._alone.waiting
        if claim is not None:
            self._membership.give_back(claim, has_started=False, delay_seconds=delay_seconds)
            self._nap.call()
            self._alone.forget(claim)
            if self._tasks_left is not None:
                self._tasks_left += 1

    def _reconnect(self, error: Exception, pause: float) -> None:
        """Drop the dispatcher's connection; what it was doing is found out anew."""
        is_busy = self._database.is_busy(error) or self._database.is_conflict(error)
        logger.log(
            logging.DEBUG if is_busy else logging.WARNING,
            "The consumer's loop was interrupted, goes on in %.1fs: %s",
            pause,
            error,
            exc_info=None if isinstance(error, Error) else error,
            extra={"consumer": self._membership.id},
        )
        if not is_busy:
            self._connection.close()
        self._claimer.forget()
        self._nap.call()
        self._membership.next_reconcile_at = 0.0

    # --- stopping

    def _drain(self) -> None:
        """Give back what has not started, and let the rest end."""
        logger.info(
            "Consumer %s stops", self._membership.id, extra={"consumer": self._membership.id}
        )
        deadline = monotonic() + self._shutdown_timeout
        self._ticker.stop()
        if self._alone.waiting:
            self._connection.insist(self._give_back_alone)
        waiting = self._holdings.take_waiting()
        self._connection.insist(lambda: self._release(waiting))
        drain = Drain(
            self._slots,
            self._holdings,
            self._settler,
            self._membership,
            connection=self._connection,
            bell=self._bell,
        )
        # Of a thread that broke, nobody can say when its call ends.
        drain.run(timeout_seconds=self._shutdown_timeout if self._slots.is_healthy else 0.0)
        self._heartbeat.stop()
        for thread in (self._ticker, self._heartbeat):
            thread.join(timeout=INTERRUPT_SECONDS)
        # Before the sessions are ended, its own among them.
        self._nap.stop()
        drain.leave()
        # Others are to hear what was given back.
        flush()
        messenger.stop(max(deadline - monotonic(), INTERRUPT_SECONDS))
        self._connection.close()
