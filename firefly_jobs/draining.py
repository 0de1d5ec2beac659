"""Let what runs come to its end when a consumer stops: settle, interrupt, give back.

Running calls get the shutdown timeout.  Then they are interrupted, and what cannot be
interrupted is given back without spending anything.  A database that is away must not
keep the process: each step is tried a few times, and leases do the rest.
"""

from __future__ import annotations

import logging
from time import monotonic

from .bell import Bell
from .holdings import Holdings
from .membership import KeptConnection, Membership
from .settling import Settler
from .slots import Slots
from .stopping import INTERRUPT_SECONDS

logger = logging.getLogger("firefly_jobs")


class Drain:
    """The end of one consumer's calls; on the dispatcher's thread.

    Args:
        slots: Where they run.
        holdings: What the consumer holds.
        settler: Where outcomes wait.
        membership: The consumer's row.
        connection: The dispatcher's.
        bell: Rung when a call has ended.
    """

    def __init__(
        self,
        slots: Slots,
        holdings: Holdings,
        settler: Settler,
        membership: Membership,
        *,
        connection: KeptConnection,
        bell: Bell,
    ) -> None:
        self._slots = slots
        self._holdings = holdings
        self._settler = settler
        self._membership = membership
        self._connection = connection
        self._bell = bell

    def run(self, *, timeout_seconds: float) -> None:
        """Let calls end for so long, interrupt them then, and give back what still runs."""
        self._await_calls(timeout_seconds)
        if self._holdings.running:
            logger.warning(
                "Interrupting %s calls that outlasted the shutdown timeout",
                self._holdings.running,
                extra={"consumer": self._membership.id},
            )
            self._slots.interrupt()
            self._await_calls(INTERRUPT_SECONDS)
        if self._holdings.running:
            self._slots.break_off()
        self._connection.insist(self._give_back_the_rest)
        self._slots.stop(timeout_seconds=INTERRUPT_SECONDS)

    def leave(self) -> None:
        """Give up the consumer's row, once nothing renews it any more."""
        if self._slots.has_stuck_calls:
            # What cannot be interrupted here, the server can end, and its locks with it.
            self._connection.insist(self._membership.end_sessions)
        self._connection.insist(self._membership.unregister)

    def _await_calls(self, seconds: float) -> None:
        deadline = monotonic() + seconds
        while (self._holdings.running or len(self._settler)) and monotonic() < deadline:
            is_quiet = not self._holdings.running
            if self._settler.is_due(is_quiet=is_quiet) and not self._connection.insist(self._flush):
                self._bell.wait(min(0.5, deadline - monotonic()))
            self._bell.wait(min(0.05, deadline - monotonic()))

    def _flush(self) -> None:
        self._settler.flush(consumer=self._membership.id)

    def _give_back_the_rest(self) -> None:
        self._settler.flush(consumer=self._membership.id, is_last=True)
        for claim in self._holdings.started():
            self._membership.give_back(claim, has_started=True)
