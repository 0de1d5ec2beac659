"""Group commit: short calls share one transaction, a savepoint each, and one COMMIT.

What a database can commit per second is little beside what it can insert.  So calls that
are known to be short run one after the other in one transaction; one UPDATE settles all of
them under their fences, one COMMIT makes effects and completions last.  A call that fails
is rolled back to its savepoint and settled like any other failure.  If the transaction as
a whole is lost (a lease that was taken over, a COMMIT that fails, a deadlock), nothing of
it has happened, and what is still held runs again, one by one.  A call that would end the
transaction itself is kept from it, undone, and runs again in one of its own.

The idea is old: P. Helland et al., "Group Commit Timers and High Volume Transaction
Systems", HPTS 1987.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter

from django.db import Error

from firefly_jobs import fencing, lifecycle, messenger, registry
from firefly_jobs.attempts import Claim, Outcome, Settlement
from firefly_jobs.checkpoints import reach
from firefly_jobs.databases import STATEMENT_BYTES_MAX, Completion
from firefly_jobs.exceptions import CommitUncertain, LeaseLost, StopRequested
from firefly_jobs.reporting import log_lease_lost
from firefly_jobs.transactions import CallTransaction

from . import calls
from .ending import Ending
from .hooking import Run, changed_settlement
from .interrupts import Interrupt
from .work import Work

logger = logging.getLogger("firefly_jobs")

MEMBERS_MAX = 100
GROUP_SECONDS = 0.05


class Group:
    """The groups of one lane, one after the other.

    Args:
        work: The consumer's side of the lane.
        transaction: The lane's.
        ending: The lane's.
        interrupt: Lets a shutdown reach the calls.
        report: Told of calls that did not succeed, when the transaction may have an end.
    """

    def __init__(
        self,
        work: Work,
        transaction: CallTransaction,
        ending: Ending,
        *,
        interrupt: Interrupt,
        report: Callable[[Run | None, Outcome], None],
    ) -> None:
        self._work = work
        self._transaction = transaction
        self._ending = ending
        self._interrupt = interrupt
        self._report = report
        # Their hooks are called once the transaction, which is not theirs, has ended.
        self._to_report: list[tuple[Run, Outcome]] = []
        self._changed: dict[tuple[int, int], Settlement] = {}
        self._members: list[tuple[Claim, Completion]] = []
        self._left: list[Claim] = []
        self._bytes = 0
        self._is_closed = self._is_broken = False

    def run(self, first: Claim) -> list[Claim]:
        """Execute ``first`` and what may join it; settle and commit them together.

        Returns:
            Claims that have to run again, each in a transaction of its own: nothing of what
            they did has happened.
        """
        self._members, self._left, self._bytes = [], [], 0
        self._to_report, self._changed = [], {}
        self._is_closed = self._is_broken = False
        again = self._run_all(first)
        if self._to_report:
            # Their hooks are called in autocommit mode, also if there was nothing to commit.
            self._transaction.rollback()
        for run, outcome in self._to_report:
            self._report(run, outcome)
        return again

    def _run_all(self, first: Claim) -> list[Claim]:
        started = perf_counter()
        try:
            self._transaction.begin(atomic=True)
        except Error:
            return [first]  # by itself it fails in the same way, and is settled as such
        claim: Claim | None = first
        while claim is not None:
            self._execute(claim)
            is_full = len(self._members) >= MEMBERS_MAX or self._bytes >= STATEMENT_BYTES_MAX
            if is_full or self._is_closed or perf_counter() - started >= GROUP_SECONDS:
                break
            claim = self._work.next_for_group()
        if self._is_broken:
            self._transaction.rollback()
            return [claim for claim, _ in self._members] + self._left
        return (self._commit() if self._members else []) + self._left

    def _execute(self, claim: Claim) -> None:
        started = perf_counter()
        transaction = self._transaction
        run: Run | None = None
        try:
            transaction.begin_member()
            calls.refuse_if_withdrawn(claim)
            task = registry.find(claim.func_name)
            messenger.started(claim, using=transaction.using, owner=self._work.owner)
            run = this_run = Run(task, claim, using=transaction.using)
            returned = self._interrupt.run(lambda: calls.call(this_run, transaction))
            reach("called")
            transaction.refuse_if_doomed()
        except BaseException as error:  # noqa: BLE001 - user code: sys.exit() ends the task, not the lane
            self._failed(claim, error, started, run)
            return
        if transaction.is_touched:
            completion = calls.completion(claim, returned, started)
            self._members.append((claim, completion))
            if also := changed_settlement(run, completion):
                self._changed[claim.key] = also
            self._bytes += len(returned)
            # What was done elsewhere is committed already; the sooner this is, the better.
            self._is_closed = transaction.is_touched_elsewhere or transaction.has_set_state
        else:
            duration = perf_counter() - started
            outcome = Outcome(
                claim=claim, duration=duration, returned=returned, changes=run.changes()
            )
            self._work.ended(outcome, is_urgent=False)

    def _failed(self, claim: Claim, error: BaseException, started: float, run: Run | None) -> None:
        """Undo one member; without its savepoint all of them are undone."""
        is_usable, has_refused = True, self._transaction.has_refused
        is_shared = bool(self._members)
        if not self._transaction.rollback_member():
            is_usable = self._transaction.rollback()
            self._is_broken = self._is_closed = True
        if has_refused:
            self._work.left_group(claim)
        if has_refused or (is_shared and isinstance(error, Error)):
            # What others did in the transaction may be the reason: a temporary table of
            # theirs, a lock.  By itself it tells.
            self._left.append(claim)
            return
        self._is_closed |= isinstance(error, StopRequested)
        duration = perf_counter() - started
        outcome = self._ending.failed(claim, error, duration, is_usable=is_usable)
        if run is not None and run.hooks:
            self._is_closed = True
            self._to_report.append((run, outcome))
        else:
            self._report(run, outcome)

    def _commit(self) -> list[Claim]:
        claims = [claim for claim, _ in self._members]
        try:
            self._transaction.commit(self._settle)
        except CommitUncertain as error:
            return self._find_out(error)
        except LeaseLost as event:
            self._transaction.rollback()
            return self._still_held(claims, event)
        except BaseException as error:  # noqa: BLE001 - deferred constraints: whose, running alone tells
            logger.debug("A group of %s tasks runs again, one by one: %s", len(claims), error)
            self._transaction.rollback()
            return claims
        for claim, completion in self._members:
            self._work.settled(completion, claim)
        return []

    def _settle(self) -> None:
        using, consumer = self._transaction.using, self._work.owner()
        plain = [
            completion for claim, completion in self._members if claim.key not in self._changed
        ]
        if plain:
            lifecycle.complete_group(plain, using=using, consumer=consumer)
        for claim, completion in self._members:
            if (also := self._changed.get(claim.key)) is not None:
                lifecycle.complete(completion, using=using, also=also, consumer=consumer)

    def _still_held(self, claims: list[Claim], event: LeaseLost) -> list[Claim]:
        """Drop the claims that others have taken over; return the rest."""
        try:
            held = fencing.held_among(claims, using=self._transaction.using)
        except Error:
            return claims  # their fences tell
        for claim in claims:
            if claim not in held:
                log_lease_lost(claim, event)
                self._work.dropped(claim)
        return held

    def _find_out(self, error: CommitUncertain) -> list[Claim]:
        """Ask on a fresh connection whether the COMMIT arrived: for all of them, or for none.

        If nobody answers they run again, and settling finds no row of theirs in case it did.
        """
        self._transaction.abandon()
        if not self._ending.has_arrived(self._members[0][0], error):
            return [claim for claim, _ in self._members]
        for claim, completion in self._members:
            self._work.settled(completion, claim)
        return []
