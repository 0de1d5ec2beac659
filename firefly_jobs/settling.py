"""Settle the outcomes that calls did not settle in their own transaction.

Calls that touched no database are completed many at a time, in one statement, at most
50 ms later.  Failures, retries, snoozes and cancellations are written one by one, each
with its history.  What could not be written because the database was away stays here
and is written on a fresh connection; what happened to it meanwhile, the fence tells.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from django.db import Error

from . import databases, lifecycle
from .attempts import Claim, Outcome, Settlement, decide
from .conf import get_settings
from .databases import Completion
from .exceptions import LeaseLost
from .reporting import log_completed, log_lease_lost, log_settled

logger = logging.getLogger("firefly_jobs")

FLUSH_SECONDS = 0.05
BATCH_SIZE = 500


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
        self._unsettled: set[Claim] = set()
        self.is_urgent = False

    def __len__(self) -> int:
        return len(self._outcomes)

    def add(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome; called from lanes and from the event loop."""
        if not self._outcomes:
            self._oldest_at = monotonic()
        self._outcomes.append(outcome)
        if is_urgent or outcome.error is not None or len(self._outcomes) >= BATCH_SIZE:
            self.is_urgent = True

    def seconds_until_due(self) -> float | None:
        """Return how long the oldest outcome may still wait; ``None`` if there is none."""
        if not self._outcomes:
            return None
        return 0.0 if self.is_urgent else self._oldest_at + FLUSH_SECONDS - monotonic()

    def flush(self, *, consumer: int) -> None:
        """Write everything that is here.

        Raises:
            Error: If the database is away; what was not written stays.
        """
        self.is_urgent = False
        while self._outcomes:
            batch = [self._outcomes.popleft() for _ in range(min(len(self._outcomes), BATCH_SIZE))]
            try:
                self._settle_batch(batch, consumer)
            except BaseException:
                self._outcomes.extendleft(
                    outcome for outcome in reversed(batch) if outcome.claim in self._unsettled
                )
                raise

    def _settle_batch(self, batch: list[Outcome], consumer: int) -> None:
        self._unsettled = {outcome.claim for outcome in batch}
        returned = [outcome for outcome in batch if outcome.error is None]
        if returned:
            self._complete(returned, consumer)
        for outcome in batch:
            if outcome.error is not None:
                self._settle(outcome, consumer)

    def _complete(self, outcomes: list[Outcome], consumer: int) -> None:
        completions = [
            Completion(o.claim.id, o.claim.fence, o.duration, o.returned or "") for o in outcomes
        ]
        try:
            missed = lifecycle.complete_many(completions, using=self._using)
        except Exception as error:
            if isinstance(error, Error) and self._database.is_lost(error):
                raise
            # One of them cannot be stored; find out which, and let it fail alone.
            for outcome in outcomes:
                self._settle(outcome, consumer)
            return
        lost = {(c.id, c.fence) for c in missed}
        for outcome in outcomes:
            if (outcome.claim.id, outcome.claim.fence) in lost:
                self._lost(outcome.claim, lifecycle.lease_lost(outcome.claim))
            else:
                self._unsettled.discard(outcome.claim)
                log_completed(outcome.claim, outcome.duration)
                self._on_settled(outcome.claim, None)

    def _settle(self, outcome: Outcome, consumer: int) -> None:
        claim = outcome.claim
        settlement = decide(outcome, max_rescues=get_settings().MAX_RESCUES)
        try:
            lifecycle.settle(settlement, using=self._using, consumer=consumer)
        except LeaseLost as event:
            self._lost(outcome.claim, event)
            return
        except Exception as error:
            if isinstance(error, Error) and self._database.is_lost(error):
                raise
            # What cannot be stored must not keep everything behind it from being settled.
            logger.exception("Settling task %s failed; storing the kind of error only", claim.id)
            settlement = decide(replace(outcome, error=error), max_rescues=0)
            text = f"{type(error).__name__} while its outcome was stored"
            settlement = replace(settlement, error=text, traceback="")
            try:
                lifecycle.settle(settlement, using=self._using, consumer=consumer)
            except LeaseLost as event:
                self._lost(claim, event)
                return
        self._done(outcome.claim, settlement)

    def _lost(self, claim: Claim, event: LeaseLost) -> None:
        self._unsettled.discard(claim)
        # No row matched: another consumer has it, or the answer of our own earlier
        # statement never arrived.
        if not lifecycle.was_settled(claim, using=self._using):
            log_lease_lost(claim, event)
        self._on_settled(claim, None)

    def _done(self, claim: Claim, settlement: Settlement) -> None:
        self._unsettled.discard(claim)
        log_settled(settlement)
        self._on_settled(claim, settlement)
