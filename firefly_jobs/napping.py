"""How long an idle consumer may sleep before it looks for due tasks again.

After a look that found nothing it sleeps until the first row that waits is due, by the
database's clock, or until it is called.  Who calls depends on the database: a listener
that hears announcements, or a number that tells whether another connection has
committed, looked at every few milliseconds.  Where neither is to be had it polls, more
often right after work.  ``CONSUMER_NAP_TIME`` is the ceiling of a nap in any case, so
that a lost announcement costs latency and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from django.db import connections

from . import databases
from .claiming import Claimer
from .conf import get_settings
from .consumer_options import ALL_QUEUES
from .databases import ANY_QUEUE, ROLL_CALL, Channel, Notice
from .listening import Listener
from .membership import KeptConnection
from .wakeup import audience

# The ceilings, unless the project sets one: with something that wakes the consumer,
# and without.
NAP_SECONDS = 30.0
POLL_SECONDS = 0.03
POLL_SECONDS_MIN = 0.005
# How often the number of commits is looked at: half of it is the median of what a task
# waits.  Waking up costs up to 0.1 ms of CPU time, mostly the operating system's, so the
# second pace is below 1 % of a core and the first, for a while after work, is not.
LIVELY_LOOK_SECONDS, QUIET_LOOK_SECONDS = 0.004, 0.02
LIVELY_SECONDS = 10.0
# A row that is due and cannot be claimed is locked by somebody.
LOCKED_SECONDS_MAX = 1.0
_STOP_SECONDS = 2.0


class ConsumerListener(Listener):
    """The listening thread of one consumer.

    Args:
        using: Database alias.
        queues: What the consumer serves; announcements about others are passed over.
        owner: Returns the consumer's id.
        on_due: Called when the consumer should look for due rows, on this thread.
    """

    def __init__(
        self,
        *,
        using: str,
        queues: Sequence[str],
        owner: Callable[[], int],
        on_due: Callable[[], None],
    ) -> None:
        super().__init__(
            using=using, channels=(Channel.DUE, Channel.WAITING), name="firefly-listener"
        )
        self._queues = set(queues)
        self._on_due = on_due
        self._hears_waiters = False
        self._connection = KeptConnection(using, owner=owner)

    def connect(self) -> Any:
        """Connect as every connection of a consumer does."""
        self._connection.ensure()
        return connections[self._using]

    def disconnect(self) -> None:
        """Close the connection, and hear of no waiters."""
        if self._hears_waiters:
            self._hears_waiters = False
            audience(self._using).not_listening()
        self._connection.close()

    def on_connected(self) -> None:
        """Look for due rows, and ask who waits for the end of others."""
        self._hears_waiters = True
        audience(self._using).listening()
        roll_call = Notice(Channel.ENDED, ROLL_CALL)
        databases.of(self._using).notify(connections[self._using], [roll_call])
        self._on_due()

    def on_heard(self, notices: set[Notice]) -> None:
        """Wake the consumer if it is about its queues; remember that somebody waits."""
        queues = {notice.text for notice in notices if notice.channel is Channel.DUE}
        if queues and (ALL_QUEUES in self._queues or queues & {ANY_QUEUE, *self._queues}):
            self._on_due()
        if any(notice.channel is Channel.WAITING for notice in notices):
            audience(self._using).heard()

    def on_lost(self) -> None:
        """Wake the consumer: it may be in the middle of a long nap that relied on this."""
        self._on_due()


class Nap:
    """When one consumer looks for due tasks; all but :meth:`call` is the dispatcher's.

    Args:
        claimer: Knows the ranges that the consumer claims from.
        using: Database alias.
        queues: What the consumer serves.
        owner: Returns the consumer's id.
        awaken: Ends the dispatcher's waiting, from any thread.
    """

    def __init__(
        self,
        claimer: Claimer,
        *,
        using: str,
        queues: Sequence[str],
        owner: Callable[[], int],
        awaken: Callable[[], None],
    ) -> None:
        settings = get_settings()
        self._claimer = claimer
        self._using = using
        self._database = databases.of(using)
        self._awaken = awaken
        self._ceiling = settings.CONSUMER_NAP_TIME
        self._listener: Listener | None = None
        if settings.NOTIFY and self._database.can_notify:
            self._listener = ConsumerListener(
                using=using, queues=queues, owner=owner, on_due=self._on_due
            )
        self._version: int | None = None
        self._is_called = True
        self._next_look_at = 0.0
        self._poll_seconds = self._locked_seconds = POLL_SECONDS_MIN
        self._lively_until = 0.0

    def start(self) -> None:
        """Start listening, where that is possible."""
        if self._listener is not None:
            self._listener.start()

    def stop(self) -> None:
        """Stop listening."""
        if self._listener is not None and self._listener.is_alive():
            self._listener.stop()
            self._listener.join(timeout=_STOP_SECONDS)

    def call(self) -> None:
        """Let the next turn look for due tasks; from any thread."""
        self._is_called = True

    def _on_due(self) -> None:
        self._is_called = True
        self._awaken()

    @property
    def seconds_left(self) -> float:
        """How long the consumer may sleep; zero or less when it should look."""
        return 0.0 if self._is_called else self._next_look_at - monotonic()

    # --- looking

    def begin_look(self) -> None:
        """Take note of the moment before a claim: what is committed later calls again."""
        self._is_called = False
        self._version = self._database.data_version(connections[self._using])

    def end_look(self, *, has_found: bool) -> None:
        """Decide when to look again, after a claim."""
        if has_found:
            self._next_look_at = 0.0
            self._lively_until = monotonic() + LIVELY_SECONDS
            self._poll_seconds = self._locked_seconds = POLL_SECONDS_MIN
            return
        is_woken = self._version is not None or (
            self._listener is not None and self._listener.is_connected
        )
        longest = self._ceiling or (NAP_SECONDS if is_woken else POLL_SECONDS)
        pause = longest if is_woken else min(self._poll_seconds, longest)
        self._poll_seconds = min(self._poll_seconds * 2, longest)
        if pause > POLL_SECONDS:
            pause = min(pause, self._seconds_until_due(pause))
        self._next_look_at = monotonic() + pause

    def _seconds_until_due(self, longest: float) -> float:
        due = self._claimer.seconds_until_due()
        if due is None:
            return longest
        if due > 0:
            # A millisecond more, since some clocks have no finer digits.
            self._locked_seconds = POLL_SECONDS_MIN
            return due + 0.001
        pause = self._locked_seconds
        self._locked_seconds = min(pause * 2, LOCKED_SECONDS_MAX)
        return pause

    # --- sleeping

    def sleep(self, seconds: float, wait: Callable[[float], bool], *, has_room: bool) -> None:
        """Wait for ``seconds``, or until the dispatcher is woken or should look.

        Args:
            seconds: How long at most.
            wait: Waits for so many seconds; returns whether it was woken before they were over.
            has_room: Whether the consumer could take more tasks.
        """
        if not has_room or self._version is None:
            wait(seconds)
            return
        now = monotonic()
        deadline = now + seconds
        pace = LIVELY_LOOK_SECONDS if now < self._lively_until else QUIET_LOOK_SECONDS
        connection = connections[self._using]
        while self._database.data_version(connection) == self._version:
            left = deadline - monotonic()
            if wait(min(left, pace)) or left <= pace:
                return
        self._is_called = True
