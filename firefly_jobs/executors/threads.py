"""Run sync tasks: a lane is a thread with a connection of its own, one call at a time."""

from __future__ import annotations

import ctypes
import logging
import threading
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from django.db import Error

from firefly_jobs import lifecycle
from firefly_jobs.attempts import Claim, Outcome, enter_context, leave_context
from firefly_jobs.checkpoints import reach
from firefly_jobs.exceptions import CommitUncertain, LeaseLost, StopRequested
from firefly_jobs.reporting import log_lease_lost
from firefly_jobs.transactions import CallTransaction, run_callbacks

from . import calls

if TYPE_CHECKING:
    from firefly_jobs.databases import Completion

logger = logging.getLogger("firefly_jobs")


class Work(Protocol):
    """Where a lane gets claims from and reports to; the consumer's side of the lane."""

    def owner(self) -> int:
        """Return the consumer's id."""

    def next_sync(self) -> Claim | None:
        """Return the next claim to start, waiting for one; ``None`` ends the lane."""

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note of a call that was settled in its own transaction."""

    def dropped(self, claim: Claim) -> None:
        """Take note of a call whose lease was lost."""

    def ended(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome that is still to be settled."""

    def crashed(self) -> None:
        """Stop with an error: an executor ended by a mistake of its own."""


class SyncLane(threading.Thread):
    """Execute claims one after the other on this thread.

    Args:
        work: Where claims come from and outcomes go.
        using: Database alias.
        name: Name of the thread.
    """

    def __init__(self, work: Work, *, using: str, name: str) -> None:
        # A daemon, so that a call that cannot be interrupted does not keep the process.
        super().__init__(name=name, daemon=True)
        self._work = work
        self._using = using
        self._guard = threading.Lock()
        self._current: Claim | None = None
        self._transaction: CallTransaction | None = None

    def run(self) -> None:
        """Take claims until there are no more."""
        try:
            transaction = self._transaction = CallTransaction(self._using, owner=self._work.owner)
            while (claim := self._work.next_sync()) is not None:
                with self._guard:
                    self._current = claim
                try:
                    self._execute(claim, transaction)
                finally:
                    with self._guard:
                        self._current = None
        except StopRequested:
            logger.debug("A lane was stopped between two calls")
        except BaseException:
            # A mistake of ours: without its lane the consumer would look alive and do nothing.
            logger.exception("A lane ended unexpectedly; the consumer stops")
            self._work.crashed()
        finally:
            if self._transaction is not None:
                self._transaction.close()

    def interrupt(self) -> bool:
        """Raise :class:`StopRequested` inside the running call; return whether one runs.

        It arrives with the next bytecode: a call blocked in C code sees it only when it
        comes back.  The consumer does not wait for that (see ``Consumer``).
        """
        with self._guard:
            if self._current is None or self.ident is None:
                return False
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self.ident), ctypes.py_object(StopRequested)
            )
        if self._transaction is not None:
            self._transaction.interrupt()
        return True

    def break_off(self) -> None:
        """Free what a call that did not hear :meth:`interrupt` holds in the database."""
        if self._current is not None and self._transaction is not None:
            self._transaction.break_off()

    def _execute(self, claim: Claim, transaction: CallTransaction) -> None:
        """Call the function and settle what it touched; report the rest."""
        started = perf_counter()
        is_urgent = False
        try:
            task = calls.find_task(claim)
            is_urgent = not task.options.atomic
            transaction.begin(atomic=task.options.atomic)
            reach("executing")
            args, kwargs = calls.load_arguments(claim)
            context = calls.make_context(task, claim, args, kwargs)
            token = enter_context(context)
            try:
                if task.options.takes_context:
                    value = task.func(context, *args, **kwargs)
                else:
                    value = task.func(*args, **kwargs)
                returned = calls.store_returned(claim, value)
            finally:
                leave_context(token)
            reach("called")
            if not task.options.atomic or not transaction.is_touched:
                if not task.options.atomic:
                    transaction.rollback()  # whatever the call itself left open
                duration = perf_counter() - started
                self._work.ended(
                    Outcome(claim=claim, duration=duration, returned=returned),
                    is_urgent=is_urgent,
                )
                return
            completion = calls.completion(claim, returned, started)
            transaction.commit(lambda: lifecycle.complete(completion, using=self._using))
        except LeaseLost as event:
            transaction.rollback()
            log_lease_lost(claim, event)
            self._work.dropped(claim)
        except BaseException as error:  # noqa: BLE001 - user code: sys.exit() ends the task, not the lane
            self._failed(claim, error, started, transaction)
        else:
            self._work.settled(completion, claim)

    def _failed(
        self, claim: Claim, error: BaseException, started: float, transaction: CallTransaction
    ) -> None:
        is_usable = transaction.rollback()
        outcome = calls.failed_outcome(
            claim, error, started=started, is_usable=is_usable, database=transaction.database
        )
        if isinstance(error, CommitUncertain):
            transaction.abandon()
            try:
                if calls.was_committed(claim, using=self._using):
                    run_callbacks(error.callbacks)
                    self._work.settled(calls.completion(claim, "", started), claim)
                    return
            except Error:
                # The server is still away.  The settler writes "lost" under the fence
                # later, and that matches no row if the COMMIT did arrive.
                logger.debug("Could not ask the row after an uncertain COMMIT", exc_info=True)
        self._work.ended(outcome, is_urgent=False)
