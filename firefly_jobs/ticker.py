"""Fire what schedules are due for, and keep them in step with the code, on a consumer's thread.

The thread sleeps until the next moment that a schedule names, by the database's clock, and
looks now and then whether somebody has changed one.  It has a connection of its own, where
anything is planned: a call that is written may have to wait for a lock, and neither claims
nor heartbeats should.
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
# Another consumer may be firing what is due, and the ends of many calls may come at once.
_LOOK_SECONDS_MIN = 0.02
# What queues behind its former call is looked at so often.
QUEUED_LOOK_SECONDS = 1.0
# After this time others may have made known here what was not.
_UNKNOWN_SECONDS = 60.0
# Or freed what they held; each time that they have not, it is left alone for twice as long.
_HELD_SECONDS_MIN, _HELD_SECONDS_MAX = 0.1, 5.0
SYNC_SECONDS = 60.0
_BACK_OFF_SECONDS_MAX = 5.0


class Ticker(threading.Thread):
    """The thread of one consumer that fires schedules.

    Args:
        using: Database alias.
        owner: Returns the consumer's id.
        on_fired: Called when calls were written, and once all that was due at the start is.
    """

    def __init__(
        self, *, using: str, owner: Callable[[], int], on_fired: Callable[[], None]
    ) -> None:
        super().__init__(name="firefly-ticker", daemon=True)
        self._using = using
        self._owner = owner
        self._on_fired = on_fired
        self._bell = threading.Event()
        self._is_stopping = False
        self._connection = KeptConnection(using, owner=owner)
        # Schedules that are left alone, and until when; and for how long, if others held them.
        self._besides: dict[int, float] = {}
        self._held_seconds: dict[int, float] = {}
        # Those that wait for the end of what they have started.
        self._queued: frozenset[int] = frozenset()
        # Whether what it is told about them may be out of date when it comes.
        self._is_asking = False
        self._sync_at = 0.0
        self.has_caught_up = False

    def stop(self) -> None:
        """End the thread."""
        self._is_stopping = True
        self._bell.set()

    def ended(self, claim: Claim) -> None:
        """Look at once if what has just ended may let an occurrence go that has waited for it."""
        if claim.schedule is not None and (self._is_asking or claim.schedule in self._queued):
            self.has_caught_up = False
            self._bell.set()

    def run(self) -> None:
        """Look until stopped."""
        pause = back_off = 0.0
        while True:
            self._bell.wait(pause)
            self._bell.clear()
            if self._is_stopping:
                break
            try:
                self._connection.ensure()
                self._sync()
                pause, back_off = self.look(), 0.0
            except BaseException as error:  # noqa: BLE001 - one turn of a loop that must survive a restart of the server, and sys.exit() in what it calls
                is_busy = self._tell(error)
                back_off = min(max(back_off * 2, 0.1), _BACK_OFF_SECONDS_MAX)
                pause = back_off * (0.5 + random.random())  # noqa: S311 - no secret
                if not is_busy:
                    self._connection.close()
                    self._catch_up()
            else:
                if pause > 0 and not self._bell.is_set():
                    self._catch_up()
                if pause >= IDLE_LOOK_SECONDS:
                    self._connection.close()
        self._connection.close()

    def _tell(self, error: BaseException) -> bool:
        """Log what has happened; return whether others are the reason."""
        database = databases.of(self._using)
        is_busy = database.is_busy(error) or database.is_conflict(error)
        logger.log(
            logging.DEBUG if is_busy else logging.WARNING,
            "Looking for due schedules failed, will try again: %s",
            error,
            exc_info=None if isinstance(error, Error) else error,
        )
        return is_busy

    def _catch_up(self) -> None:
        if not self.has_caught_up:
            self.has_caught_up = True
            self._on_fired()

    def _sync(self) -> None:
        if monotonic() >= self._sync_at:
            syncing.sync(using=self._using, consumer=self._owner())
            # Not all consumers of a deploy at the same moment.
            self._sync_at = monotonic() + SYNC_SECONDS * (0.75 + random.random() / 2)  # noqa: S311 - no secret

    def look(self) -> float:
        """Fire what is due, and return in how many seconds to look again."""
        now = monotonic()
        self._besides = {pk: until for pk, until in self._besides.items() if until > now}
        self._is_asking = True
        agenda = firing.agenda(using=self._using, ahead_seconds=LOOK_SECONDS, besides=self._besides)
        self._queued = agenda.queued
        self._is_asking = False
        if agenda.queued:
            firing.note_waiting(agenda.queued, using=self._using)
        if agenda.seconds is None and not agenda.queued:
            return LOOK_SECONDS if self._besides else IDLE_LOOK_SECONDS
        if agenda.seconds is None or agenda.seconds > 0:
            # What queues is noted as soon as it is due.
            longest = QUEUED_LOOK_SECONDS if agenda.queued else LOOK_SECONDS
            near = (agenda.seconds, agenda.queued_seconds)
            return min([longest, *(seconds for seconds in near if seconds is not None)])
        fired = firing.fire_due(using=self._using, besides=self._besides)
        self._leave_alone(fired)
        if fired.calls:
            self._on_fired()
        if fired.error is not None:
            raise fired.error
        # Those who look at the same moment should not do so again and again.
        return 0.0 if fired.calls else _LOOK_SECONDS_MIN * (0.5 + random.random())  # noqa: S311 - no secret

    def _leave_alone(self, fired: firing.Fired) -> None:
        """Look at other schedules while nothing can be done about some."""
        now, before = monotonic(), self._held_seconds
        # What was not looked at this time keeps its pause.
        kept = {pk: pause for pk, pause in before.items() if pk in self._besides}
        again = {pk: before.get(pk, _HELD_SECONDS_MIN / 2) * 2 for pk in fired.held}
        self._held_seconds = kept | {pk: min(s, _HELD_SECONDS_MAX) for pk, s in again.items()}
        self._besides.update(dict.fromkeys(fired.unknown, now + _UNKNOWN_SECONDS))
        self._besides.update({pk: now + self._held_seconds[pk] for pk in fired.held})
