"""Fire what schedules are due for, on a thread of each consumer.

The thread sleeps until the next moment that a schedule names, by the database's clock, and
looks now and then whether somebody has changed one.  It has a connection of its own: a call
that is written may have to wait for a lock, and neither claims nor heartbeats should.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from time import monotonic

from django.db import Error

from . import databases, firing, syncing
from .attempts import Claim
from .membership import KeptConnection

logger = logging.getLogger("firefly_jobs")

# A schedule that was made or changed is noticed within this time; where nothing is planned,
# which costs most projects least, within the longer one.
LOOK_SECONDS, IDLE_LOOK_SECONDS = 5.0, 30.0
# Another consumer may be firing what is due.
_LOOK_SECONDS_MIN = 0.02
# After this time others may have made known here what was not.
_UNKNOWN_SECONDS = 60.0
_BACK_OFF_SECONDS_MAX = 5.0


class Ticker(threading.Thread):
    """The thread of one consumer that fires schedules.

    Args:
        using: Database alias.
        owner: Returns the consumer's id.
        on_fired: Called when calls were written.
    """

    def __init__(
        self, *, using: str, owner: Callable[[], int], on_fired: Callable[[], None]
    ) -> None:
        super().__init__(name="firefly-ticker", daemon=True)
        self._using = using
        self._on_fired = on_fired
        self._bell = threading.Event()
        self._is_stopping = False
        self._first_pause = 0.0
        self._connection = KeptConnection(using, owner=owner)
        self._unknown: dict[int, float] = {}

    def start(self) -> None:
        """Write what is declared, fire what is due by now, and start the thread.

        A failure is told, and no reason not to start.
        """
        try:
            syncing.sync(using=self._using)
            while (pause := self.look()) == 0.0:
                logger.debug("Fired what was due before the start")
            self._first_pause = pause
        except Exception:
            logger.exception("The schedules could not be brought in step with the code")
        super().start()

    def stop(self) -> None:
        """End the thread."""
        self._is_stopping = True
        self._bell.set()

    def ended(self, claim: Claim) -> None:
        """Look at once: what has just ended may let an occurrence go that has waited for it."""
        if claim.schedule is not None:
            self._bell.set()

    def run(self) -> None:
        """Look until stopped."""
        pause, back_off = self._first_pause, 0.1
        while True:
            self._bell.wait(pause)
            self._bell.clear()
            if self._is_stopping:
                break
            try:
                self._connection.ensure()
                pause, back_off = self.look(), 0.1
            except Exception as error:
                database = databases.of(self._using)
                is_busy = database.is_busy(error) or database.is_conflict(error)
                logger.log(
                    logging.DEBUG if is_busy else logging.WARNING,
                    "Looking for due schedules failed, will try again: %s",
                    error,
                    exc_info=None if isinstance(error, Error) else error,
                )
                if not is_busy:
                    self._connection.close()
                back_off = min(back_off * 2, _BACK_OFF_SECONDS_MAX)
                pause = back_off * (0.5 + random.random())  # noqa: S311 - no secret
        self._connection.close()

    def look(self) -> float:
        """Fire what is due, and return in how many seconds to look again."""
        now = monotonic()
        self._unknown = {pk: until for pk, until in self._unknown.items() if until > now}
        next_seconds = firing.seconds_until_next(using=self._using, besides=self._unknown)
        if next_seconds is None:
            return IDLE_LOOK_SECONDS
        if next_seconds > 0:
            return min(next_seconds, LOOK_SECONDS)
        fired = firing.fire_due(using=self._using, besides=self._unknown)
        self._unknown.update(dict.fromkeys(fired.unknown, now + _UNKNOWN_SECONDS))
        if fired.calls:
            self._on_fired()
        # Those who look at the same moment should not do so again and again.
        return 0.0 if fired.calls else _LOOK_SECONDS_MIN * (0.5 + random.random())  # noqa: S311 - no secret
