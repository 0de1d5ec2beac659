"""Take back the rows of processes that have died, without making the supervisor wait.

On a thread of its own, with a connection that is open only while there is a death to
deal with: a database that does not answer must keep the supervisor neither from hearing
a signal nor from ending a call that exceeds its limit.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from django.db import Error, connections

from . import databases, leases, messenger
from .attempts import Ended, Settlement, Verdict
from .reporting import log_settled

logger = logging.getLogger("firefly_jobs")

# How often rows are looked for that a transaction has locked which the server has not
# ended yet; what remains is rescued by other consumers' heartbeats.
ATTEMPTS = 10
PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Death:
    """A process that has died.

    Attributes:
        consumers: The ids it has claimed under.
        verdict: Why the supervisor ended it, if it did.
    """

    consumers: tuple[int, ...]
    verdict: Verdict | None = None


class Burials(threading.Thread):
    """Bury the dead, one after the other.

    Args:
        using: Database alias.
        on_buried: Told what became of their rows, on this thread, after each.
    """

    def __init__(self, *, using: str, on_buried: Callable[[list[Settlement]], None]) -> None:
        super().__init__(name="firefly-burials", daemon=True)
        self._using = using
        self._on_buried = on_buried
        # None: there are no more.
        self._deaths: SimpleQueue[Death | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._pending = 0

    @property
    def pending(self) -> int:
        """How many deaths have not been dealt with."""
        return self._pending

    def add(self, death: Death) -> None:
        """Have a death dealt with."""
        with self._lock:
            self._pending += 1
        self._deaths.put(death)

    def stop(self, *, timeout_seconds: float) -> None:
        """End the thread once it has dealt with what it was told, and wait for that."""
        self._deaths.put(None)
        self.join(timeout_seconds)

    def run(self) -> None:
        """Deal with deaths until stopped."""
        while (death := self._deaths.get()) is not None:
            settlements: list[Settlement] = []
            try:
                self._bury_all(death, settlements)
            except Exception:
                # One turn of the loop; the lease of what was not buried runs out.
                logger.exception("The tasks of a dead process could not be rescued")
            with self._lock:
                self._pending -= 1
            self._on_buried(settlements)

    def _bury_all(self, death: Death, settlements: list[Settlement]) -> None:
        try:
            for consumer in death.consumers:
                settlements += self._bury(consumer, death.verdict)
        finally:
            connections[self._using].close()

    def _bury(self, consumer: int, verdict: Verdict | None) -> list[Settlement]:
        database = databases.of(self._using)
        freed: list[Settlement] = []
        for _ in range(ATTEMPTS):
            try:
                connections[self._using].ensure_connection()
                settlements, are_all = leases.bury(consumer, using=self._using, verdict=verdict)
            except Error as error:
                if not database.is_conflict(error) and not database.is_busy(error):
                    logger.warning(
                        "The tasks of consumer %s are left to other consumers: %s",
                        consumer,
                        error,
                        extra={"consumer": consumer},
                    )
                    return freed
            else:
                _log(consumer, settlements, verdict)
                messenger.freed(settlements, using=self._using, consumer=consumer)
                freed += settlements
                if are_all:
                    return freed
            threading.Event().wait(PAUSE_SECONDS)
        logger.warning(
            "Some tasks of consumer %s are locked and left to other consumers",
            consumer,
            extra={"consumer": consumer},
        )
        return freed


def _log(consumer: int, settlements: list[Settlement], verdict: Verdict | None) -> None:
    for settlement in settlements:
        claim = settlement.claim
        is_culprit = verdict is not None and (claim.id, claim.fence) == (
            verdict.task_id,
            verdict.fence,
        )
        if is_culprit or settlement.ended is Ended.FAILED:
            log_settled(settlement)
    logger.warning(
        "Rescued %s tasks of consumer %s, whose process has ended",
        len(settlements),
        consumer,
        extra={"consumer": consumer},
    )
