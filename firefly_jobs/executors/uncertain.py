"""Find out what became of a COMMIT whose answer was lost."""

from __future__ import annotations

import logging
import threading
from time import monotonic

from django.db import Error, connections

from firefly_jobs import fencing
from firefly_jobs.attempts import Claim
from firefly_jobs.exceptions import CommitUncertain
from firefly_jobs.reporting import log_fields
from firefly_jobs.transactions import run_callbacks
from firefly_jobs.wakeup import Announcement

logger = logging.getLogger("firefly_jobs")

# A server restart takes about so long; whoever has callbacks waits for it.
ASK_SECONDS = 30.0
_RETRY_SECONDS = 0.5


class UncertainCommit:
    """Asks the row, on a fresh connection, whether its completion was committed.

    Args:
        using: Database alias.
    """

    def __init__(self, *, using: str) -> None:
        self._using = using
        self._pause = threading.Event()

    def has_arrived(self, claim: Claim, error: CommitUncertain) -> bool:
        """Return whether the row was completed under this claim; run its callbacks then.

        The settler would find out as well, under the fence, but it does not know the
        callbacks.  So only a call that has some waits for a server that is away.
        """
        # What is lost of our own announcements is found by polling.
        awaited = [
            callback for _, callback, _ in error.callbacks if not isinstance(callback, Announcement)
        ]
        deadline = monotonic() + (ASK_SECONDS if awaited else 0.0)
        has_said = not awaited
        while True:
            try:
                has_arrived = fencing.was_completed(claim, using=self._using)
            except Error:
                connections[self._using].close()
                if monotonic() >= deadline:
                    break
                if not has_said:
                    has_said = True
                    logger.warning(
                        "Nobody answers whether the COMMIT of task %s arrived; %s on_commit "
                        "callbacks wait for that, and are dropped if the process ends before",
                        claim.id,
                        len(awaited),
                        extra=log_fields(claim),
                    )
                self._pause.wait(_RETRY_SECONDS)
            else:
                if has_arrived:
                    run_callbacks(error.callbacks)
                return has_arrived
        if awaited:
            logger.warning(
                "Nobody knows whether the COMMIT of task %s arrived; %s on_commit callbacks are "
                "dropped",
                claim.id,
                len(awaited),
                extra=log_fields(claim),
            )
        return False
