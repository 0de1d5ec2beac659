"""Run async tasks: one event loop on a thread of its own, many calls at once."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from time import perf_counter

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.core.exceptions import SynchronousOnlyOperation

from firefly_jobs import messenger, registry
from firefly_jobs.attempts import Claim, Outcome
from firefly_jobs.checkpoints import reach
from firefly_jobs.conf import get_settings
from firefly_jobs.contexts import enter_context
from firefly_jobs.exceptions import StopRequested
from firefly_jobs.holdings import LEASE_POLL_SECONDS
from firefly_jobs.transactions import CallTransaction

from . import calls, hooking
from .allowances import Allowance, Allowances
from .ending import Ending
from .hooking import Run
from .lanes import LaneBinding, LanePool
from .work import NO_CONNECTION_SECONDS, Work

logger = logging.getLogger("firefly_jobs")


class CoroutineLoop(threading.Thread):
    """The event loop of a consumer; claims are handed in from the dispatcher's thread.

    Args:
        work: Where outcomes go.
        allowances: Watch the calls that may not take everything.
        using: Database alias.
        connections: How many the coroutines share.
    """

    def __init__(self, work: Work, allowances: Allowances, *, using: str, connections: int) -> None:
        super().__init__(name="firefly-coroutines", daemon=True)
        self._work = work
        self._using = using
        self._allowances = allowances
        self._ending = Ending(work, using=using)
        self._settings = get_settings()
        self._pool = LanePool(using=using, size=connections, owner=work.owner)
        self._running: dict[Claim, asyncio.Task[None]] = {}
        self._interrupted: set[Claim] = set()
        # The calls that a limit may cancel.
        self._bounded: set[Claim] = set()
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._is_over: asyncio.Event

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
        self._is_over = asyncio.Event()
        self._ready.set_result(asyncio.get_running_loop())
        await self._is_over.wait()

    def start_call(self, claim: Claim) -> None:
        """Start executing ``claim``; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._spawn, claim, self._work.owner())

    def interrupt(self) -> None:
        """Cancel every running call; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._cancel_all)

    def break_off(self) -> None:
        """Free what calls that did not hear their cancellation hold in the database."""
        self._pool.break_off()

    def stop(self) -> None:
        """End the loop; called from the dispatcher's thread."""
        self._ready.result().call_soon_threadsafe(self._is_over.set)

    def _spawn(self, claim: Claim, owner: int) -> None:
        running = asyncio.get_running_loop().create_task(self._start(claim, owner))
        self._running[claim] = running
        running.add_done_callback(lambda done: self._done(claim, done))

    def _done(self, claim: Claim, done: asyncio.Task[None]) -> None:
        self._running.pop(claim, None)
        if done.cancelled():
            # Cancelled before its first step, so nothing was reported.
            self._work.ended(
                Outcome(
                    claim=claim,
                    duration=0.0,
                    error=asyncio.CancelledError("The call cancelled its own asyncio task."),
                    is_interrupted=claim in self._interrupted,
                ),
                is_urgent=False,
            )
        elif (error := done.exception()) is not None:
            # A mistake of ours: the claim would be held, and never settled.
            logger.error("Settling a coroutine failed; the consumer stops", exc_info=error)
            self._work.crashed()
        self._interrupted.discard(claim)

    def _cancel_all(self) -> None:
        for claim, running in self._running.items():
            self._interrupted.add(claim)
            running.cancel()

    def _hold(self, claim: Claim, binding: LaneBinding) -> Allowance:
        """Let a limit cancel the call, and interrupt what it does on its lane."""
        loop = asyncio.get_running_loop()

        def stop(error: type[Exception]) -> None:
            loop.call_soon_threadsafe(self._cancel_bounded, claim)
            binding.interrupt(error)

        self._bounded.add(claim)
        return self._allowances.begin(claim, stop)

    def _cancel_bounded(self, claim: Claim) -> None:
        # Not once it is over: what follows is ours.
        if claim in self._bounded and claim in self._running:
            self._running[claim].cancel()

    def _reason(
        self, claim: Claim, raised: BaseException, allowance: Allowance | None
    ) -> BaseException:
        """Return why a call ended that raised ``raised``, which may be our cancellation."""
        if claim in self._interrupted:
            return StopRequested()
        return raised if allowance is None else allowance.blame(raised)

    async def _start(self, claim: Claim, owner: int) -> None:
        """Execute a claim of ``owner``, once it is sure that nobody has rescued it."""
        try:
            while not self._work.may_start():  # noqa: ASYNC110 - the heartbeat is a thread
                await asyncio.sleep(LEASE_POLL_SECONDS)
        except asyncio.CancelledError as error:
            reason = StopRequested() if claim in self._interrupted else error
            outcome = self._ending.raised(claim, reason, perf_counter(), None)
            if outcome is not None:
                self._work.ended(outcome, is_urgent=False)
            return
        if owner == self._work.owner():
            await self._execute(claim)
        else:
            # Rescued meanwhile; the row is not this consumer's any more.
            self._work.dropped(claim)

    async def _execute(self, claim: Claim) -> None:
        """Call the coroutine function, in a transaction of its own once it queries."""
        started = perf_counter()
        run: Run | None = None
        binding: LaneBinding | None = None
        allowance: Allowance | None = None
        try:
            calls.refuse_if_withdrawn(claim)
            task = registry.find(claim.func_name)
            messenger.started(claim, using=self._using, owner=self._work.owner)
            run = this_run = Run(task, claim, using=self._using)
            binding = self._bind(claim, atomic=task.options.atomic)
            if claim.is_bounded:
                allowance = self._hold(claim, binding)
            async with ThreadSensitiveContext(executor=binding):
                returned = await self._call(run, binding)
            self._bounded.discard(claim)
            binding.refuse_if_unserved()
            reach("called")
        except BaseException as raised:  # noqa: BLE001 - user code: sys.exit() ends the task, not the loop
            self._bounded.discard(claim)
            error = self._reason(claim, raised, allowance)
            if binding is not None and binding.has_no_connection:
                await self._give_back(claim, error, binding)
                return
            is_usable = binding is None or not binding.timed_out
            outcome = await _end(
                binding,
                allowance,
                lambda transaction: self._ending.raised(
                    claim, error, started, transaction, is_usable=is_usable
                ),
            )
        else:
            outcome = await _end(
                binding,
                allowance,
                lambda transaction: self._ending.returned(this_run, returned, started, transaction),
            )
        finally:
            if allowance is not None:
                allowance.end()
            if binding is not None:
                binding.close()
        if outcome is not None:
            await self._report(run, outcome)

    def _bind(self, claim: Claim, *, atomic: bool) -> LaneBinding:
        return LaneBinding(
            self._pool,
            holder=f"task {claim.id} ({claim.func_name})",
            atomic=atomic,
            timeout_seconds=self._settings.LANE_TIMEOUT,
            is_bounded=claim.is_bounded,
        )

    async def _report(self, run: Run | None, outcome: Outcome) -> None:
        """Report an attempt that did not succeed, once its hooks have heard of it."""
        if run is not None:
            if run.hooks:
                outcome = hooking.decided(outcome)
                await self._finish(run, outcome)
            outcome = hooking.with_later_changes(run, outcome)
        self._work.ended(outcome, is_urgent=False)

    async def _finish(self, run: Run, outcome: Outcome) -> None:
        """Await the hooks in autocommit mode: what they write stays, whatever comes."""
        claim = run.claim
        binding = self._bind(claim, atomic=False)
        allowance: Allowance | None = None
        try:
            if claim.is_bounded:
                # A cancellation that was meant for the call comes before, and to nothing.
                await asyncio.sleep(0)
                allowance = self._hold(claim, binding)
            async with ThreadSensitiveContext(executor=binding):
                await hooking.finish_async(run, outcome, binding=binding)
        except BaseException as error:  # noqa: BLE001 - a limit, or our own shutdown; all is decided
            hooking.log_stopped(run, error)
        finally:
            self._bounded.discard(claim)
            if allowance is not None:
                allowance.end()
            binding.close()

    async def _give_back(self, claim: Claim, error: BaseException, binding: LaneBinding) -> None:
        """Give a claim back for which there was no connection: it is not to blame."""
        await binding.on_lane(lambda transaction: transaction.abandon())
        if not isinstance(error, StopRequested):
            # The next one would fare no better at once.
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(NO_CONNECTION_SECONDS)
        self._work.ended(calls.not_started(claim, error), is_urgent=False)

    async def _call(self, run: Run, binding: LaneBinding) -> str:
        reach("executing")
        context, claim, task = run.context, run.claim, run.context.task
        enter_context(context)
        try:
            args, kwargs = calls.load_arguments(claim, self._using)
        except SynchronousOnlyOperation:
            # Model instances among the arguments: loading them is a query, and belongs
            # to the call's transaction.
            args, kwargs = await sync_to_async(calls.load_arguments)(claim, self._using)
        context.args, context.kwargs = args, kwargs
        with calls.OwnProcess():
            if run.hooks:
                await hooking.before_async(run, binding=binding)
            if task.options.takes_context:
                value = await task.func(context, *args, **kwargs)
            else:
                value = await task.func(*args, **kwargs)
            try:
                returned = calls.store_returned(claim, value)
            except SynchronousOnlyOperation:
                returned = await sync_to_async(calls.store_returned)(claim, value)
            if run.hooks:
                await hooking.returned_async(run, value, binding=binding)
        return returned


async def _end(
    binding: LaneBinding | None,
    allowance: Allowance | None,
    finish: Callable[[CallTransaction | None], Outcome | None],
) -> Outcome | None:
    """End the call where its transaction is; without one, here."""

    def end(transaction: CallTransaction | None) -> Outcome | None:
        # What the call has left running on the lane was watched until now.
        if allowance is not None:
            allowance.end()
        outcome = finish(transaction)
        if transaction is not None:
            transaction.drop_what_is_open()
        return outcome

    if binding is None or binding.lane is None:
        return end(None)
    outcome: Outcome | None = await binding.on_lane(end)
    return outcome
