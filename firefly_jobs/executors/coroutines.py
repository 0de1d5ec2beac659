"""Run async tasks: one event loop on a thread of its own, many calls at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future
from time import perf_counter
from typing import Any

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error

from firefly_jobs import databases, lifecycle
from firefly_jobs.attempts import Claim, Outcome, enter_context, leave_context
from firefly_jobs.checkpoints import reach
from firefly_jobs.conf import get_settings
from firefly_jobs.exceptions import CommitUncertain, LeaseLost, StopRequested
from firefly_jobs.reporting import log_lease_lost
from firefly_jobs.transactions import CallTransaction, run_callbacks

from . import calls
from .lanes import LaneBinding, LanePool
from .threads import Work

logger = logging.getLogger("firefly_jobs")


class CoroutineLoop(threading.Thread):
    """The event loop of a consumer; claims are handed in from the dispatcher's thread.

    Args:
        work: Where outcomes go.
        using: Database alias.
    """

    def __init__(self, work: Work, *, using: str) -> None:
        super().__init__(name="firefly-coroutines", daemon=True)
        self._work = work
        self._using = using
        self._database = databases.of(using)
        self._settings = get_settings()
        self._pool = LanePool(using=using, size=self._settings.ASYNC_CONNECTIONS, owner=work.owner)
        self._running: dict[Claim, asyncio.Task[None]] = {}
        self._interrupted: set[Claim] = set()
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._ending: asyncio.Event

    def run(self) -> None:
        """Run the event loop until :meth:`stop`."""
        try:
            with asyncio.Runner() as runner:
                loop = runner.get_loop()
                main = loop.create_task(self._main())
                while not main.done():
                    try:
                        loop.run_until_complete(main)
                    except (SystemExit, KeyboardInterrupt):
                        # asyncio lets these out of the loop when a child task raises them;
                        # whoever awaits the child gets them as well.
                        logger.debug("A child task raised SystemExit or KeyboardInterrupt")
        except BaseException as error:
            logger.exception("The event loop ended unexpectedly; the consumer stops")
            if not self._ready.done():
                self._ready.set_exception(error)
            self._work.crashed()
        self._pool.close()

    async def _main(self) -> None:
        self._ending = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._ending.wait()

    def start_call(self, claim: Claim) -> None:
        """Start executing ``claim``; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._spawn, claim)

    def interrupt(self) -> None:
        """Cancel every running call; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._cancel_all)

    def break_off(self) -> None:
        """Free what calls that did not hear their cancellation hold in the database."""
        self._pool.break_off()

    def stop(self) -> None:
        """End the loop; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._ending.set)

    def _spawn(self, claim: Claim) -> None:
        running = asyncio.get_running_loop().create_task(self._execute(claim))
        self._running[claim] = running
        running.add_done_callback(lambda done: self._done(claim, done))

    def _done(self, claim: Claim, done: asyncio.Task[None]) -> None:
        self._running.pop(claim, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            # A mistake of ours: the claim would be held, and never settled.
            logger.error("Settling a coroutine failed; the consumer stops", exc_info=error)
            self._work.crashed()

    def _cancel_all(self) -> None:
        for claim, running in self._running.items():
            self._interrupted.add(claim)
            running.cancel()

    async def _execute(self, claim: Claim) -> None:
        """Call the coroutine function and settle what it touched; report the rest."""
        started = perf_counter()
        binding: LaneBinding | None = None
        try:
            task = calls.find_task(claim)
            binding = LaneBinding(
                self._pool,
                holder=f"task {claim.id} ({claim.func_name})",
                atomic=task.options.atomic,
                timeout_seconds=self._settings.LANE_TIMEOUT,
            )
            async with ThreadSensitiveContext(executor=binding):
                returned = await self._call(task, claim)
            binding.refuse_if_timed_out()
            reach("called")
            completion = calls.completion(claim, returned, started)
            if task.options.atomic and await self._commit(binding, completion):
                self._work.settled(completion, claim)
            else:
                self._work.ended(
                    Outcome(claim=claim, duration=completion.duration, returned=returned),
                    is_urgent=not task.options.atomic,
                )
        except LeaseLost as event:
            await self._rollback(binding)
            log_lease_lost(claim, event)
            self._work.dropped(claim)
        except BaseException as error:  # noqa: BLE001 - user code: sys.exit() ends the task, not the loop
            await self._failed(claim, error, started, binding)
        finally:
            self._interrupted.discard(claim)
            if binding is not None:
                binding.close()

    async def _call(self, task: Any, claim: Claim) -> str:
        reach("executing")
        try:
            args, kwargs = calls.load_arguments(claim)
        except SynchronousOnlyOperation:
            # Model instances among the arguments: loading them is a query, and belongs
            # to the call's transaction.
            args, kwargs = await sync_to_async(calls.load_arguments)(claim)
        context = calls.make_context(task, claim, args, kwargs)
        token = enter_context(context)
        try:
            if task.options.takes_context:
                value = await task.func(context, *args, **kwargs)
            else:
                value = await task.func(*args, **kwargs)
            try:
                return calls.store_returned(claim, value)
            except SynchronousOnlyOperation:
                return await sync_to_async(calls.store_returned)(claim, value)
        finally:
            leave_context(token)

    async def _commit(self, binding: LaneBinding, completion: Any) -> bool:
        """Settle and commit on the lane if the call touched the database; say if it did."""
        if binding.lane is None:
            return False

        def commit(transaction: CallTransaction) -> bool:
            if not transaction.is_touched:
                return False
            transaction.commit(lambda: lifecycle.complete(completion, using=self._using))
            return True

        return bool(await binding.on_lane(commit))

    async def _rollback(self, binding: LaneBinding | None) -> bool:
        if binding is None or binding.lane is None:
            return True
        return bool(await binding.on_lane(lambda transaction: transaction.rollback()))

    async def _failed(
        self, claim: Claim, error: BaseException, started: float, binding: LaneBinding | None
    ) -> None:
        if claim in self._interrupted:
            error = StopRequested()
        is_usable = await self._rollback(binding)
        if binding is not None and binding.timed_out:
            is_usable = False
        outcome = calls.failed_outcome(
            claim, error, started=started, is_usable=is_usable, database=self._database
        )
        if isinstance(error, CommitUncertain) and binding is not None:

            def ask(transaction: CallTransaction) -> bool:
                transaction.abandon()
                committed = calls.was_committed(claim, using=self._using)
                if committed:
                    run_callbacks(error.callbacks)
                return committed

            try:
                if await binding.on_lane(ask):
                    self._work.settled(calls.completion(claim, "", started), claim)
                    return
            except Error:
                logger.debug("Could not ask the row after an uncertain COMMIT", exc_info=True)
        self._work.ended(outcome, is_urgent=False)
