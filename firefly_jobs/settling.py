"""Settle the outcomes that calls did not settle in their own transaction.

Calls that touched no database are completed many at a time, in one statement, at most
50 ms later.  Failures, retries, snoozes, cancellations and what a shutdown interrupted are
written with their history, those that are here together in one transaction.  What could
not be written because the database was away stays here and is written on a fresh
connection; what happened to it meanwhile, the fence tells.  An outcome whose row another
session has locked steps aside for those behind it; so does one of which something else is
wrong, until its row is written as failed.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from django.db import DataError, Error, IntegrityError

from . import databases, fencing, lifecycle, messenger
from .attempts import Claim, Outcome, Settlement, decide
from .conf import get_settings
from .databases import STATEMENT_BYTES_MAX, Completion
from .exceptions import LeaseLost
from .reporting import log_completed, log_lease_lost, log_settled

logger = logging.getLogger("firefly_jobs")

FLUSH_SECONDS = 0.05
BATCH_SIZE = 500
# So often one outcome by itself is tried on a connection that works.
_TRIES_MAX = 5
# Each lock costs the dispatcher a second of waiting.  After so many in one flush all that
# is left steps aside, and it is tried again after a pause that grows.
_LOCKS_MAX = 3
_ASIDE_SECONDS_MIN, _ASIDE_SECONDS_MAX = 1.0, 15.0


class Settler:
    """Collect outcomes from any thread; write them from the dispatcher's.

    Args:
        using: Database alias.
        on_settled: Told of every claim that is settled or lost; with its settlement,
            unless it simply completed or was lost.
    """

    def __init__(
        self, *, using: str, on_settled: Callable[[Claim, Settlement | None], None]
    ) -> None:
        self._using = using
        self._on_settled = on_settled
        self._database = databases.of(using)
        self._outcomes: deque[Outcome] = deque()
        self._oldest_at = 0.0
        self._limit, self._failures = BATCH_SIZE, 0
        # Keys of what the current batch has not written yet.
        self._unsettled: set[tuple[int, int]] = set()
        self._aside: list[Outcome] = []
        # How often outcomes were tried that raised something which is no database error.
        self._tries: Counter[tuple[int, int]] = Counter()
        self._aside_until = 0.0
        self._aside_pause = _ASIDE_SECONDS_MIN
        self.is_urgent = False

    def __len__(self) -> int:
        return len(self._outcomes) + len(self._aside)

    def add(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome; called from lanes and from the event loop."""
        if not self._outcomes:
            self._oldest_at = monotonic()
        self._outcomes.append(outcome)
        if is_urgent or outcome.error is not None or len(self._outcomes) >= BATCH_SIZE:
            self.is_urgent = True

    def seconds_until_due(self, *, is_quiet: bool) -> float | None:
        """Return how long the oldest outcome may still wait; ``None`` if there is none.

        Args:
            is_quiet: Whether nothing else runs that could share its statement.
        """
        if self._outcomes and (self.is_urgent or is_quiet):
            return 0.0
        moments = [self._oldest_at + FLUSH_SECONDS] if self._outcomes else []
        if self._aside:
            moments.append(self._aside_until)
        return min(moments) - monotonic() if moments else None

    def is_due(self, *, is_quiet: bool) -> bool:
        """Whether to flush now; see :meth:`seconds_until_due`."""
        due = self.seconds_until_due(is_quiet=is_quiet)
        return due is not None and due <= 0

    def flush(self, *, consumer: int, is_last: bool = False) -> None:
        """Write everything that is here, unless it stepped aside a moment ago.

        Args:
            consumer: The consumer's id.
            is_last: Try what stepped aside as well.

        Raises:
            Error: If the database is away; what was not written stays.
        """
        self.is_urgent = False
        if self._aside and (is_last or monotonic() >= self._aside_until):
            self._outcomes.extendleft(reversed(self._aside))
            self._aside = []
        locks, is_careful = 0, False
        while self._outcomes:
            batch = self._next_batch()
            try:
                self._settle_batch(batch, consumer)
            except BaseException as error:
                self._put_back(batch)
                if self._database.is_busy(error):
                    raise
                if self._is_defect(error):
                    self._limit, is_careful = 1, True
                    if len(batch) == 1:
                        self._put_off(self._outcomes.popleft(), error)
                    continue
                if not self._database.is_conflict(error):
                    # It may have been the batch that broke the connection, by its length.
                    self._limit = max(len(batch) // 2, 1)
                    self._failures += 1
                    raise
                locks += 1
                self._yield_to_lock(batch, locks)
            else:
                self._failures = 0
                self._limit = 1 if locks or is_careful else BATCH_SIZE
        self._limit = BATCH_SIZE
        if not self._aside:
            self._aside_pause = _ASIDE_SECONDS_MIN
            self._tries.clear()

    def _put_back(self, batch: list[Outcome]) -> None:
        self._outcomes.extendleft(
            outcome for outcome in reversed(batch) if outcome.claim.key in self._unsettled
        )

    def _is_defect(self, error: BaseException) -> bool:
        """Whether it is not the database that did not take something of the current batch."""
        return (
            isinstance(error, Exception) and not isinstance(error, Error) and bool(self._unsettled)
        )

    def _put_off(self, outcome: Outcome, error: BaseException) -> None:
        """Let the others pass an outcome that could not be stored; after some tries, give up."""
        claim, kind = outcome.claim, type(error).__name__
        self._tries[claim.key] += 1
        if self._tries[claim.key] < _TRIES_MAX:
            self._set_aside([outcome], f"that of task {claim.id} raised {kind}")
            return
        del self._tries[claim.key]
        try:
            # A row that has ended is mended by sweeps; one that is left as it is runs again.
            lifecycle.write_alone(_broken(outcome, error), using=self._using)
        except Exception:
            logger.exception("The end of task %s cannot be written", claim.id)
        logger.error("Gave up what follows from the end of task %s: it raised %s", claim.id, kind)
        self._on_settled(claim, None)

    def _yield_to_lock(self, batch: list[Outcome], locks: int) -> None:
        """Find out whose row another session has locked, and let those behind it pass."""
        self._limit = 1
        count = len(self._outcomes) if locks > _LOCKS_MAX else len(batch)
        if locks > _LOCKS_MAX or len(batch) == 1:
            passed = [self._outcomes.popleft() for _ in range(count)]
            self._set_aside(passed, "another session has locked their rows")

    def _set_aside(self, outcomes: list[Outcome], reason: str) -> None:
        if not self._aside:
            message = "Outcomes wait because %s; they are tried again in %.0fs"
            logger.warning(message, reason, self._aside_pause)
            self._aside_until = monotonic() + self._aside_pause
            self._aside_pause = min(self._aside_pause * 2, _ASIDE_SECONDS_MAX)
        self._aside += outcomes

    def _next_batch(self) -> list[Outcome]:
        batch = [self._outcomes.popleft()]
        length = len(batch[0].returned or "")
        while self._outcomes and len(batch) < self._limit:
            length += len(self._outcomes[0].returned or "")
            if length > STATEMENT_BYTES_MAX:
                break
            batch.append(self._outcomes.popleft())
        return batch

    def _settle_batch(self, batch: list[Outcome], consumer: int) -> None:
        self._unsettled = {outcome.claim.key for outcome in batch}
        plain = [outcome for outcome in batch if not outcome.changes]
        returned = [outcome for outcome in plain if outcome.error is None]
        if returned:
            self._complete(returned, consumer)
        for outcome in batch:
            if outcome.changes:
                self._settle(outcome, consumer)
        others = [outcome for outcome in plain if outcome.error is not None]
        if len(others) > 1:
            self._settle_together(others, consumer)
        elif others:
            # One statement fewer.
            self._settle(others[0], consumer)

    def _settle_together(self, outcomes: list[Outcome], consumer: int) -> None:
        """Write what is no plain success: a COMMIT for each would take long after a shutdown."""
        max_rescues = get_settings().MAX_RESCUES
        settlements = [o.decided or decide(o, max_rescues=max_rescues) for o in outcomes]
        try:
            held = lifecycle.settle_many(settlements, using=self._using, consumer=consumer)
        except Exception as error:
            if self._may_pass(error):
                raise
            for outcome in outcomes:
                self._settle(outcome, consumer)
            return
        are_held = {settlement.claim.key for settlement in held}
        for settlement in settlements:
            if settlement.claim.key in are_held:
                self._done(settlement, consumer)
            else:
                self._lost(settlement.claim, fencing.lease_lost(settlement.claim))

    def _complete(self, outcomes: list[Outcome], consumer: int) -> None:
        completions = [Completion.of(o.claim, o.duration, o.returned or "") for o in outcomes]
        try:
            missed = lifecycle.complete_many(completions, using=self._using, consumer=consumer)
        except Exception as error:
            if self._may_pass(error):
                raise
            # One of them cannot be stored; find out which, and let it fail alone.
            for outcome in outcomes:
                self._settle(outcome, consumer)
            return
        lost = {(c.id, c.fence) for c in missed}
        for outcome in outcomes:
            if lost and outcome.claim.key in lost:
                self._lost(outcome.claim, fencing.lease_lost(outcome.claim))
            else:
                self._unsettled.discard(outcome.claim.key)
                log_completed(outcome.claim, outcome.duration)
                messenger.completed(
                    outcome.claim, outcome.duration, using=self._using, consumer=consumer
                )
                self._on_settled(outcome.claim, None)

    def _settle(self, outcome: Outcome, consumer: int) -> None:
        claim = outcome.claim
        max_rescues = get_settings().MAX_RESCUES
        settlement = outcome.decided or decide(outcome, max_rescues=max_rescues)
        try:
            lifecycle.settle(settlement, using=self._using, consumer=consumer)
        except LeaseLost as event:
            self._lost(outcome.claim, event)
            return
        except Exception as error:
            if self._may_pass(error):
                raise
            # What cannot be stored must not keep everything behind it from being settled.
            logger.exception("Settling task %s failed; storing the kind of error only", claim.id)
            settlement = _broken(outcome, error)
            try:
                lifecycle.settle(settlement, using=self._using, consumer=consumer)
            except LeaseLost as event:
                self._lost(claim, event)
                return
        self._done(settlement, consumer)

    def _may_pass(self, error: Exception) -> bool:
        """Whether the same outcome may be stored later: nothing is wrong with itself."""
        if not isinstance(error, Error) or isinstance(error, DataError | IntegrityError):
            return False
        if self._database.is_busy(error) or self._database.is_conflict(error):
            return True
        # A server that lets us connect and breaks the connection over one outcome, each
        # time, will never take it.
        return self._failures < _TRIES_MAX or self._limit > 1

    def _lost(self, claim: Claim, event: LeaseLost) -> None:
        # No row matched: another consumer has it, or the answer of our own earlier
        # statement never arrived.
        if not fencing.was_settled(claim, using=self._using):
            log_lease_lost(claim, event)
        self._unsettled.discard(claim.key)
        self._on_settled(claim, None)

    def _done(self, settlement: Settlement, consumer: int) -> None:
        self._unsettled.discard(settlement.claim.key)
        log_settled(settlement)
        messenger.settled(settlement, using=self._using, consumer=consumer)
        self._on_settled(settlement.claim, settlement)


def _broken(outcome: Outcome, error: BaseException) -> Settlement:
    """Return the failure in place of an outcome that cannot be stored."""
    broken = replace(outcome, error=error, changes={}, decided=None)
    text = f"{type(error).__name__} while its outcome was stored"
    return replace(decide(broken, max_rescues=0), error=text, traceback="")
