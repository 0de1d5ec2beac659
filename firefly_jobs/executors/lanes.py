"""Give each coroutine that queries a database connection, and its own transaction on it.

A *lane* is a thread with a connection.  A coroutine is bound to one at its first
thread-sensitive call (every query of Django's is one) and keeps it until it ends, so
all its queries run in one transaction.  A coroutine that only awaits never takes one:
thousands can wait while eight lanes serve those that query.

:class:`LaneBinding` is what asgiref's ``ThreadSensitiveContext`` is given as executor;
it needs asgiref 3.13, the first release that takes one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from django.db import Error

from firefly_jobs.exceptions import LaneTimeoutError
from firefly_jobs.transactions import CallTransaction

from .interrupts import Interrupt

logger = logging.getLogger("firefly_jobs")

_Work = tuple["Future[Any]", Callable[[CallTransaction], Any]]


class Lane(threading.Thread):
    """A thread with a connection that runs what it is given, in order."""

    def __init__(self, *, using: str, name: str, owner: Callable[[], int]) -> None:
        super().__init__(name=name, daemon=True)
        self._using = using
        self._owner = owner
        self._inbox: SimpleQueue[_Work | None] = SimpleQueue()
        # Made on this thread, to which its connection belongs.
        self._transaction: CallTransaction | None = None
        self.start()

    def put(self, future: Future[Any], work: Callable[[CallTransaction], Any]) -> None:
        """Run ``work`` on this thread and resolve ``future`` with what it returns or raises."""
        self._inbox.put((future, work))

    def break_off(self) -> None:
        """Free what a call that did not hear its cancellation holds in the database."""
        if self._transaction is not None:
            self._transaction.break_off()

    def stop(self) -> None:
        """End the thread after what is queued."""
        self._inbox.put(None)

    def run(self) -> None:
        """Work until stopped."""
        transaction = self._transaction = CallTransaction(self._using, owner=self._owner)
        try:
            while (item := self._inbox.get()) is not None:
                future, work = item
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(work(transaction))
                except BaseException as error:  # noqa: BLE001 - user code; its error belongs to its caller
                    future.set_exception(error)
                del item, future, work
        finally:
            transaction.close()


class LanePool:
    """At most ``size`` lanes, given to bindings in the order they asked.

    Args:
        using: Database alias.
        size: Connections at most.
        owner: Returns the consumer's id.
    """

    def __init__(self, *, using: str, size: int, owner: Callable[[], int]) -> None:
        self._using = using
        self._owner = owner
        self._size = size
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._lanes: list[Lane] = []
        self._asking: deque[LaneBinding] = deque()
        self.holders: dict[Lane, str] = {}

    def ask(self, binding: LaneBinding) -> None:
        """Give ``binding`` a lane now, or as soon as one is free."""
        with self._lock:
            if not self._free and len(self._lanes) < self._size:
                name = f"firefly-async-lane-{len(self._lanes) + 1}"
                lane = Lane(using=self._using, name=name, owner=self._owner)
                self._lanes.append(lane)
                self._free.append(lane)
            if not self._free:
                self._asking.append(binding)
                return
            lane = self._free.pop()
            self.holders[lane] = binding.holder
        binding.granted(lane)

    def withdraw(self, binding: LaneBinding) -> bool:
        """Take back a request that was not granted yet; return whether it was not."""
        with self._lock:
            if binding not in self._asking:
                return False
            self._asking.remove(binding)
            return True

    def give_back(self, lane: Lane) -> None:
        """Hand ``lane`` to who has waited longest, or keep it."""
        with self._lock:
            self.holders.pop(lane, None)
            if not self._asking:
                self._free.append(lane)
                return
            binding = self._asking.popleft()
            self.holders[lane] = binding.holder
        binding.granted(lane)

    def break_off(self) -> None:
        """Free what calls that did not hear their cancellation hold in the database."""
        with self._lock:
            held = list(self.holders)
        for lane in held:
            lane.break_off()

    def close(self) -> None:
        """End the free lanes; those in use end with the process."""
        with self._lock:
            lanes, self._free = self._free, []
        for lane in lanes:
            lane.stop()
            lane.join()


class LaneBinding(Executor):
    """The executor of one coroutine's thread-sensitive calls.

    Args:
        pool: Where lanes come from.
        holder: What to call the coroutine in messages.
        atomic: With it, the lane is kept and one transaction spans all calls; without,
            a lane is borrowed for each call and nothing spans them.
        timeout_seconds: How long to wait for a lane.
        is_bounded: Whether :meth:`interrupt` has to reach the calls.
    """

    def __init__(
        self,
        pool: LanePool,
        *,
        holder: str,
        atomic: bool,
        timeout_seconds: float,
        is_bounded: bool = False,
    ) -> None:
        self._pool = pool
        self._atomic = atomic
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._lane: Lane | None = None
        self._has_asked = False
        self._is_closed = self._is_ended = False
        self._begin: Future[None] = Future()
        self._backlog: deque[_Work] = deque()
        self._loop: asyncio.AbstractEventLoop
        self._timer: asyncio.TimerHandle | None = None
        self._interrupt = Interrupt() if is_bounded else None
        self._calls_on: CallTransaction | None = None
        self.holder = holder
        self.timed_out = False

    @property
    def lane(self) -> Lane | None:
        """The lane this coroutine is bound to, if it has queried."""
        return self._lane

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue a call; asgiref calls this from the event loop, so it never blocks."""
        future: Future[Any] = Future()
        work = (future, lambda transaction: self._call(transaction, partial(fn, *args, **kwargs)))
        with self._lock:
            if self.timed_out:
                message = f"{self.holder} got no database connection for an earlier query."
                future.set_exception(LaneTimeoutError(message))
                return future
            if self._lane is not None:
                # Guarded as the first ones: after a failed begin there is no transaction.
                self._lane.put(future, _unless_failed(self._begin, work[1]))
                return future
            self._backlog.append(work)
            if self._has_asked:
                return future
            self._has_asked = True
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._timeout_seconds, self._give_up)
        self._pool.ask(self)
        return future

    def _call(self, transaction: CallTransaction, call: Callable[[], Any]) -> Any:
        """Run one of the coroutine's calls; on a lane."""
        if self._interrupt is None:
            return call()
        self._calls_on = transaction
        return self._interrupt.run(call)

    def interrupt(self, error: type[Exception]) -> None:
        """Raise ``error`` inside the running call, and end its statement; from any thread."""
        transaction = self._calls_on
        if self._interrupt is not None and transaction is not None:
            self._interrupt.interrupt(
                error, also=lambda: transaction.interruption(may_connect=True)
            )

    def granted(self, lane: Lane) -> None:
        """Take the lane, enter the transaction, and run what has been queued."""
        with self._lock:
            if self._atomic:
                self._lane = lane
            backlog, self._backlog = self._backlog, deque()
            self._has_asked = self._atomic
            if self._is_closed:
                for future, _ in backlog:
                    future.cancel()
                backlog.clear()
            begin = self._begin = Future()
            lane.put(begin, lambda call: call.begin(atomic=self._atomic))
            for future, work in backlog:
                lane.put(future, _unless_failed(begin, work))
            # Decided under the lock: close() may come next, and gives back what it finds.
            goes_back = not self._atomic or self._is_closed
            if goes_back:
                self._lane = None
            # That of this request; the next one makes its own.
            timer, self._timer = self._timer, None
        if timer is not None:
            # Lanes are granted from whichever thread gave one back.
            self._loop.call_soon_threadsafe(timer.cancel)
        if goes_back:
            self._give_back_clean(lane)

    def _give_back_clean(self, lane: Lane) -> None:
        """Give a lane back without whatever the call has left open on it."""
        clean: Future[Any] = Future()
        lane.put(clean, lambda call: call.rollback())
        clean.add_done_callback(lambda _: self._pool.give_back(lane))

    def _give_up(self) -> None:
        if not self._pool.withdraw(self):
            return
        self.timed_out = True
        holders = ", ".join(sorted(self._pool.holders.values()))
        message = (
            f"{self.holder} waited {self._timeout_seconds:g} s for a database connection. All "
            f"are held by: {holders}. A coroutine keeps its connection from its first query to "
            f"its end; raise ASYNC_CONNECTIONS, or query late and finish soon."
        )
        with self._lock:
            backlog, self._backlog = self._backlog, deque()
        for future, _ in backlog:
            if future.set_running_or_notify_cancel():
                future.set_exception(LaneTimeoutError(message))

    @property
    def has_no_connection(self) -> bool:
        """Whether the lane could not connect, so that no query of the call was sent."""
        begin = self._begin
        return self._atomic and begin.done() and isinstance(begin.exception(), Error)

    def refuse_if_unserved(self) -> None:
        """Raise if a query got no lane or no connection, though the coroutine went on.

        Raises:
            LaneTimeoutError: If no lane was free in time.
            Error: What connecting raised.
        """
        if self.has_no_connection:
            self._begin.result()
        if self.timed_out:
            message = f"A query of {self.holder} got no database connection in time."
            raise LaneTimeoutError(message)

    async def on_lane(self, work: Callable[[CallTransaction], Any]) -> Any:
        """Run ``work`` with the bound lane's transaction and return what it returns.

        A cancelled coroutine still has to settle or roll back, once and to the end.
        """
        self._is_ended = True
        return await self.with_transaction(work)

    async def with_transaction(self, work: Callable[[CallTransaction], Any]) -> Any:
        """Do the same in the midst of the call, which goes on afterwards."""
        lane = self._lane
        if lane is None:
            message = "This coroutine has no lane."
            raise RuntimeError(message)
        future: Future[Any] = Future()
        lane.put(future, work)
        done = asyncio.wrap_future(future)
        while not done.done():
            with suppress(asyncio.CancelledError):
                await asyncio.shield(done)
        return done.result()

    def close(self) -> None:
        """Give the lane back."""
        if self._timer is not None:
            self._timer.cancel()
        self._pool.withdraw(self)
        with self._lock:
            self._is_closed = True
            lane, self._lane = self._lane, None
        if lane is None:
            return
        if self._is_ended:
            self._pool.give_back(lane)
        else:
            # Granted after the call had ended.
            self._give_back_clean(lane)


def _unless_failed(
    begin: Future[None], work: Callable[[CallTransaction], Any]
) -> Callable[[CallTransaction], Any]:
    """Run ``work`` unless the transaction could not be entered: then raise that error."""

    def run(transaction: CallTransaction) -> Any:
        begin.result()
        return work(transaction)

    return run
