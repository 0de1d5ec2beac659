"""Keep a number of consumer processes running; take back at once what a dead one held.

The supervisor claims nothing.  It starts processes, hears what they report, ends those
that exceed a limit, and has the dead buried (``burials``), on a connection that is open
only for that.  Its own loop never waits for a database, so a signal and a deadline are
heard at once.

What a process says and what that means is in ``children``; what it does is in
``supervised``.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from time import monotonic
from typing import Any

from . import messenger
from .attempts import Ended, Settlement
from .burials import Burials, Death
from .children import Child
from .conf import get_settings
from .databases import leave_pools
from .stopping import INTERRUPT_SECONDS, stop_signals
from .supervised import Orders

logger = logging.getLogger("firefly_jobs")

# A process that lives for a shorter time is started again after a growing pause.
QUICK_SECONDS = 10.0
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.5, 30.0
_DOUBLINGS_MAX = 6

TURN_SECONDS = 1.0
MEMORY_LIMIT_SECONDS = 0.2
# A process closes its pipe a moment before it is gone.
_ENDING_SECONDS = 0.02
# How long the end of the supervisor waits for rows of the dead to be rescued.
BURIAL_SECONDS = 10.0


class Supervisor:
    """Run consumers in processes of their own; repeat until asked to stop.

    Args:
        orders: What each process is told.
        processes: How many.
        burst: Whether a process that ends has found nothing due, and is not replaced.
    """

    def __init__(self, orders: Orders, *, processes: int, burst: bool = False) -> None:
        self._orders = orders
        self._processes = processes
        self._burst = burst
        self._places = [Place() for _ in range(processes)]
        # Those that retire: they have a successor already, or will have one.
        self._retired: list[Child] = []
        self._burials = Burials(using=orders.using, on_buried=self._on_buried)
        self._is_stopping = self._has_failed = self._is_over_at_once = False
        # Held while a process is started, so that none is missed when all are ended.
        self._starting = threading.Lock()
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)

    def run(self) -> int:
        """Supervise until asked to stop, or until every process has done its work.

        Returns:
            0, or 1 if a process ended with a failure; that stops the others.
        """
        leave_pools()
        # Started by the first process otherwise, and it would unblock the signals then.
        resource_tracker.ensure_running()
        with stop_signals(self.stop, at_once=self._end_at_once), self._helpers():
            logger.info("Supervising %s processes", self._processes)
            while not self._is_done():
                self._turn()
        return int(self._has_failed)

    def stop(self) -> None:
        """Ask all processes to stop; returns at once, from any thread."""
        self._is_stopping = True
        self._wake()

    def _fail(self) -> None:
        if not self._is_stopping:
            logger.error("A process ended with a failure, so the others are stopped")
        self._has_failed = True
        self.stop()

    # --- one turn

    def _turn(self) -> None:
        """Do what is due, then wait until something happens."""
        now = monotonic()
        for place, start_at in self._startable():
            if now >= start_at:
                self._start(place)
        for child in self._children():
            child.receive()
            self._enforce_limits(child, now)
            if self._is_stopping:
                child.ask_to_stop()
            if child.kill_at is not None and now >= child.kill_at:
                self._kill_overdue(child)
        for place in self._places:
            self._look_after(place)
        for child in [child for child in self._retired if child.has_ended]:
            self._retired.remove(child)
            self._has_ended(child, None)
        self._wait()

    def _startable(self) -> list[tuple[Place, float]]:
        """Return the places whose process is started, as soon as its moment has come."""
        if self._is_stopping or len(self._retired) > self._processes:
            # Slow calls must not fill the machine with processes that only wait for them.
            return []
        if self._burst and self._burials.pending:
            # A fresh process would find nothing due yet, and end.
            return []
        return [
            (place, place.start_at)
            for place in self._places
            if place.child is None and place.start_at is not None
        ]

    def _start(self, place: Place) -> None:
        with self._starting:
            if self._is_over_at_once:
                return
            try:
                place.child = Child(self._orders)
            except OSError as error:
                place.start_at = monotonic() + place.back_off.pause_seconds(0.0)
                logger.error("A process could not be started: %s", error)  # noqa: TRY400 - the system's reason says it all
                return
        place.start_at = None
        logger.info("Started process %s", place.child)

    def _enforce_limits(self, child: Child, now: float) -> None:
        verdict = child.judge(now)
        if verdict is not None:
            child.condemn(verdict)
            logger.error(
                "Ended process %s because of task %s: %s",
                child,
                verdict.task_id,
                verdict.error,
                extra={"task_id": verdict.task_id},
            )

    def _kill_overdue(self, child: Child) -> None:
        child.kill_at = None
        child.kill()
        if child.finished is None:
            logger.error("Ended process %s, which did not stop in time", child)
            self._has_failed = True

    def _look_after(self, place: Place) -> None:
        child = place.child
        if child is None:
            return
        if child.has_ended:
            place.child = None
            self._has_ended(child, place)
        elif child.retires_because is not None:
            # In this order, so that the signals' thread sees it in one place or in both.
            self._retired.append(child)
            place.child = None
            self._replace_retired(child, place)

    # --- what the end of a process means

    def _has_ended(self, child: Child, place: Place | None) -> None:
        """Bury it if it has died, and see to its successor if it still has a place."""
        self._take_leave(child)
        if self._is_stopping:
            return
        if place is None:
            if child.finished is None and self._burst:
                # What it held is due again, and the others may have ended by now.
                self._restart_one()
        elif child.retires_because is not None:
            # It retired and ended within one turn.
            self._replace_retired(child, place)
        elif child.finished is None and child.verdict is None:
            self._start_later(child, place)
        elif child.verdict is not None or (child.finished and child.finished.wants_restart):
            place.start_at = monotonic()
        elif not self._burst:
            # Somebody has stopped this one only.
            self._start_later(child, place)

    def _take_leave(self, child: Child) -> None:
        child.receive()
        child.close()
        if child.finished is not None and child.finished.code:
            self._fail()
        if child.finished is None:
            if not self._is_stopping and child.verdict is None:
                logger.error("Process %s has died: %s", child, child.ended_by)
            self._burials.add(Death(consumers=tuple(child.consumers), verdict=child.verdict))

    def _restart_one(self) -> None:
        empty = [place for place in self._places if place.child is None]
        if empty and all(place.start_at is None for place in empty):
            empty[0].start_at = monotonic()

    def _replace_retired(self, child: Child, place: Place) -> None:
        if self._orders.reloads or self._is_stopping:
            # One process under --reload ends for good where one without would.
            return
        if child.retires_because in {"max-memory", "memory-limit"}:
            # It may be that the project alone takes more, and then this would never end.
            self._start_later(child, place)
        else:
            place.start_at = monotonic()

    def _start_later(self, child: Child, place: Place) -> None:
        pause = place.back_off.pause_seconds(monotonic() - child.started_at)
        place.start_at = monotonic() + pause
        if pause:
            logger.warning("A process is started in %.1fs, as those before ended soon", pause)

    def _on_buried(self, settlements: list[Settlement]) -> None:
        is_failure = any(
            item.ended is Ended.RETRIED or (item.ended is Ended.FAILED and not item.rescues)
            for item in settlements
        )
        if is_failure and not get_settings().FAIL_SILENTLY:
            logger.error("Stopping at the first failure, as FAIL_SILENTLY is off")
            self._fail()
        self._wake()

    # --- stopping

    def _is_done(self) -> bool:
        if self._children():
            return False
        if self._is_stopping:
            return True
        return all(place.start_at is None for place in self._places)

    def _end_at_once(self) -> None:
        """End every process; called on the signals' thread at the second signal."""
        self._is_over_at_once = True
        with self._starting:
            children = self._children()
        for child in children:
            child.kill()
        deadline = monotonic() + INTERRUPT_SECONDS
        while not all(child.has_ended for child in children) and monotonic() < deadline:
            threading.Event().wait(_ENDING_SECONDS)

    @contextmanager
    def _helpers(self) -> Iterator[None]:
        messenger.start()
        self._burials.start()
        try:
            yield
        finally:
            # After a mistake of ours the processes must not wait for orders for ever.
            for child in self._children():
                child.close()
            self._burials.stop(timeout_seconds=BURIAL_SECONDS)
            messenger.stop(BURIAL_SECONDS)
            self._alarm.close()
            self._bell.close()

    # --- waiting

    def _children(self) -> list[Child]:
        return [place.child for place in self._places if place.child is not None] + self._retired

    def _wait(self) -> None:
        if self._is_done():
            return
        children = self._children()
        now = monotonic()
        moments = [now + TURN_SECONDS]
        moments += [start_at for _, start_at in self._startable()]
        for child in children:
            moments += [at for at in (child.next_deadline, child.kill_at) if at is not None]
            if child.has_memory_limit:
                moments.append(now + MEMORY_LIMIT_SECONDS)
        pipes = [child.pipe for child in children if child.pipe is not None]
        if len(pipes) < len(children):
            moments.append(now + _ENDING_SECONDS)
        self._listen(pipes, min(moments) - now)

    def _listen(self, pipes: list[Any], seconds: float) -> None:
        wait([self._bell, *pipes], timeout=max(seconds, 0.0))
        try:
            while self._bell.recv(1024):
                pass
        except BlockingIOError:
            return

    def _wake(self) -> None:
        try:
            self._alarm.send(b"\0")
        except OSError:
            # It is full and will be heard, or closed because all is over.
            return


class BackOff:
    """How long to wait before a process is started again."""

    def __init__(self) -> None:
        self._quick_ends = 0

    def pause_seconds(self, lifetime_seconds: float) -> float:
        """Return the pause after a process that has lived for so long."""
        if lifetime_seconds >= QUICK_SECONDS:
            self._quick_ends = 0
            return 0.0
        self._quick_ends += 1
        if self._quick_ends == 1:
            return 0.0
        doublings = min(self._quick_ends - 2, _DOUBLINGS_MAX)
        return min(PAUSE_SECONDS_MIN * float(2**doublings), PAUSE_SECONDS_MAX)


@dataclass(slots=True)
class Place:
    """One of the processes that are to run.

    Attributes:
        child: Who has it now.
        start_at: When the next one is due; ``None`` while there is one, or for good.
    """

    back_off: BackOff = field(default_factory=BackOff)
    child: Child | None = None
    start_at: float | None = 0.0
