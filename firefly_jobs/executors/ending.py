"""End a call: settle it in its own transaction, or report what is still to be settled.

The same for sync calls and coroutines.  It runs on the thread that has the call's
transaction: a sync lane, or the lane that a coroutine took at its first query.
"""

from __future__ import annotations

from time import perf_counter

from firefly_jobs import databases, lifecycle
from firefly_jobs.attempts import Claim, Outcome
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import CommitUncertain, LeaseLost
from firefly_jobs.reporting import log_lease_lost
from firefly_jobs.transactions import CallTransaction

from . import calls
from .hooking import Run, changed_settlement
from .uncertain import UncertainCommit
from .work import Work


class Ending:
    """How the calls of one executor end.

    Args:
        work: The consumer's side of the executor.
        using: Database alias.
    """

    def __init__(self, work: Work, *, using: str) -> None:
        self._work = work
        self._using = using
        self._database = databases.of(using)
        self._uncertain = UncertainCommit(using=using)

    def returned(
        self,
        run: Run,
        returned: str,
        started: float,
        transaction: CallTransaction | None,
    ) -> Outcome | None:
        """Settle and commit what the call did; without effects, leave it to the settler.

        Args:
            run: What was executed.
            returned: Its result as it is stored.
            started: ``perf_counter()`` at its start.
            transaction: The call's, or ``None`` if it has never queried.

        Returns:
            What is to be reported, if that failed.
        """
        claim, atomic = run.claim, run.context.task.options.atomic
        duration = perf_counter() - started
        completion: Completion | None = None
        try:
            if transaction is not None and not atomic:
                transaction.rollback()  # whatever the call itself left open
            elif transaction is not None and transaction.is_touched:
                completion = Completion.of(claim, duration, returned)
                self._commit(run, completion, transaction)
        except BaseException as error:  # noqa: BLE001 - deferred constraints, a lost lease, a broken connection
            return self.raised(claim, error, started, transaction)
        if completion is not None:
            self._work.settled(completion, claim)
        else:
            changes = run.changes()
            outcome = Outcome(claim=claim, duration=duration, returned=returned, changes=changes)
            self._work.ended(outcome, is_urgent=not atomic)
        return None

    def _commit(self, run: Run, completion: Completion, transaction: CallTransaction) -> None:
        also = changed_settlement(run, completion)
        transaction.commit(
            lambda: lifecycle.complete(
                completion, using=self._using, also=also, consumer=self._work.owner()
            )
        )

    def raised(
        self,
        claim: Claim,
        error: BaseException,
        started: float,
        transaction: CallTransaction | None,
        *,
        is_usable: bool = True,
    ) -> Outcome | None:
        """Undo what the call did.

        Args:
            claim: What was executed.
            error: What the call raised, or settling it.
            started: ``perf_counter()`` at its start.
            transaction: The call's, or ``None`` if it has never queried.
            is_usable: Whether the call had a connection whenever it needed one.

        Returns:
            What is to be reported; nothing if the row is settled, or lost to others.
        """
        if transaction is not None:
            is_usable &= transaction.rollback()
        if isinstance(error, LeaseLost):
            log_lease_lost(claim, error)
            self._work.dropped(claim)
            return None
        duration = perf_counter() - started
        if isinstance(error, CommitUncertain) and transaction is not None:
            transaction.abandon()
            if self.has_arrived(claim, error):
                self._work.settled(calls.completion(claim, "", started), claim)
                return None
        return self.failed(claim, error, duration, is_usable=is_usable)

    def failed(
        self, claim: Claim, error: BaseException, duration: float, *, is_usable: bool
    ) -> Outcome:
        """Return the outcome of a call whose effects are undone.

        Args:
            claim: What was executed.
            error: What it raised, or settling it.
            duration: Seconds that it took.
            is_usable: Whether its connection survived.
        """
        return calls.failed_outcome(
            claim, error, duration=duration, is_usable=is_usable, database=self._database
        )

    def has_arrived(self, claim: Claim, error: CommitUncertain) -> bool:
        """Whether the COMMIT arrived whose answer was lost; run its callbacks then."""
        return self._uncertain.has_arrived(claim, error)
