"""Run sync tasks: a lane is a thread with a connection of its own, one call at a time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

from django.db import Error

from firefly_jobs import messenger, registry
from firefly_jobs.attempts import Claim, Outcome
from firefly_jobs.checkpoints import reach
from firefly_jobs.transactions import CallTransaction

from . import calls, hooking
from .allowances import Allowances
from .ending import Ending
from .groups import Group
from .hooking import Run
from .interrupts import Interrupt
from .work import NO_CONNECTION_SECONDS, Work

logger = logging.getLogger("firefly_jobs")

_Result = TypeVar("_Result")


class SyncLane(threading.Thread):
    """Execute claims one after the other on this thread.

    Args:
        work: Where claims come from and outcomes go.
        allowances: Watch the calls that may not take everything.
        using: Database alias.
        name: Name of the thread.
    """

    def __init__(self, work: Work, allowances: Allowances, *, using: str, name: str) -> None:
        # A daemon, so that a call that cannot be interrupted does not keep the process.
        super().__init__(name=name, daemon=True)
        self._work = work
        self._allowances = allowances
        self._using = using
        self._interrupt = Interrupt()
        self._transaction: CallTransaction | None = None
        # Never set: a pause that no signal and no other thread ends.
        self._pause = threading.Event()
        self._ending = Ending(work, using=using)

    def run(self) -> None:
        """Take claims until there are no more."""
        try:
            transaction = self._transaction = CallTransaction(self._using, owner=self._work.owner)
            group = Group(
                self._work,
                transaction,
                self._ending,
                interrupt=self._interrupt,
                report=self._report,
            )
            while (claim := self._work.next_sync()) is not None:
                alone = [claim]
                if self._work.may_join_group(claim):
                    alone = group.run(claim)
                for claim in alone:
                    self._execute(claim, transaction)
                transaction.drop_what_is_open()
        except BaseException:
            # A mistake of ours: without its lane the consumer would look alive and do nothing.
            logger.exception("A lane ended unexpectedly; the consumer stops")
            self._work.crashed()
        finally:
            if self._transaction is not None:
                self._transaction.close()

    def interrupt(self) -> None:
        """Interrupt the running call, if one runs."""
        if self._transaction is not None:
            self._interrupt.interrupt(also=self._transaction.interruption)

    def break_off(self) -> None:
        """Free what a call that did not hear :meth:`interrupt` holds in the database."""
        if self._interrupt.is_call_running and self._transaction is not None:
            self._transaction.break_off()

    def _execute(self, claim: Claim, transaction: CallTransaction) -> None:
        """Call the function in a transaction of its own."""
        started = perf_counter()
        run: Run | None = None
        try:
            calls.refuse_if_withdrawn(claim)
            task = registry.find(claim.func_name)
            if not self._begin(claim, transaction, atomic=task.options.atomic):
                return
            messenger.started(claim, using=self._using, owner=self._work.owner)
            run = this_run = Run(task, claim, using=self._using)
            returned = self._guarded(claim, lambda: calls.call(this_run, transaction))
            reach("called")
        except BaseException as error:  # noqa: BLE001 - user code: sys.exit() ends the task, not the lane
            outcome = self._ending.raised(claim, error, started, transaction)
        else:
            outcome = self._ending.returned(run, returned, started, transaction)
        if outcome is not None:
            self._report(run, outcome)

    def _report(self, run: Run | None, outcome: Outcome) -> None:
        """Report an attempt that did not succeed, once its hooks have heard of it."""
        if run is not None:
            if run.hooks:
                outcome = hooking.decided(outcome)
                self._finish(run, outcome)
            outcome = hooking.with_later_changes(run, outcome)
        self._work.ended(outcome, is_urgent=False)

    def _finish(self, run: Run, outcome: Outcome) -> None:
        """Call the hooks in autocommit mode: what they write stays, whatever comes."""
        if self._transaction is not None:
            self._transaction.leave()
        try:
            self._guarded(run.claim, lambda: hooking.finish_sync(run, outcome))
        except BaseException as error:  # noqa: BLE001 - a limit, or our own shutdown; all is decided
            hooking.log_stopped(run, error)

    def _guarded(self, claim: Claim, call: Callable[[], _Result]) -> _Result:
        """Return what ``call`` returns; meanwhile a shutdown, and the claim's limits, reach it."""
        if not claim.is_bounded:
            return self._interrupt.run(call, of=claim)
        allowance = self._allowances.begin(claim, lambda error: self._stop_call(claim, error))
        try:
            return self._interrupt.run(call, of=claim)
        except BaseException as raised:  # noqa: BLE001 - user code; it is raised again, or is the cause
            raise allowance.blame(raised)  # noqa: B904 - likewise
        finally:
            allowance.end()

    def _stop_call(self, claim: Claim, error: type[Exception]) -> None:
        """Raise ``error`` inside the call of ``claim``, and end its statement; from afar."""
        transaction = self._transaction
        if transaction is not None:
            self._interrupt.interrupt(
                error, of=claim, also=lambda: transaction.interruption(may_connect=True)
            )

    def _begin(self, claim: Claim, transaction: CallTransaction, *, atomic: bool) -> bool:
        """Get ready for a call; give the claim back if there is no connection for it."""
        try:
            transaction.begin(atomic=atomic)
        except Error as error:
            transaction.abandon()
            self._work.ended(calls.not_started(claim, error), is_urgent=False)
            # The next one would fare no better at once.
            self._pause.wait(NO_CONNECTION_SECONDS)
            return False
        return True
