"""Renew this consumer's lease, and rescue the tasks of consumers that stopped renewing.

Runs on a thread with a connection of its own, so that neither a long task nor a busy
dispatcher looks like death.  Only missed heartbeats make a consumer dead, never run
time, and it takes two looks: the first marks the late consumer; only if no heartbeat
followed within another interval, during which this consumer could write its own, are
its rows taken.  When the database is away, or an SQLite write lock is held for long,
everybody is silent and nobody is dead.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from django.db import Error, connections

from . import databases, lifecycle
from .attempts import Claim, Ended
from .models import ConsumerModel
from .reporting import log_settled

logger = logging.getLogger("firefly_jobs")

# Heartbeats per lease; a lease survives two that are missed.
BEATS_PER_LEASE = 3
_RETRY_SECONDS = 0.5


class _Look(NamedTuple):
    renewed_at: object
    looked_at: float


class Heartbeat(threading.Thread):
    """The heartbeat thread of one consumer.

    Args:
        using: Database alias.
        lease_seconds: How long the others wait for a heartbeat.
        on_rescued: Called when this consumer finds itself rescued.
    """

    def __init__(self, *, using: str, lease_seconds: float, on_rescued: Callable[[], None]) -> None:
        super().__init__(name="firefly-heartbeat", daemon=True)
        self._using = using
        self._lease_seconds = lease_seconds
        self._interval_seconds = lease_seconds / BEATS_PER_LEASE
        self._on_rescued = on_rescued
        self._stopping = threading.Event()
        self._first_looks: dict[int, _Look] = {}
        self._orphans: set[Claim] = set()
        self._consumer = 0
        self._prepared: object = None
        self._renewed_at = monotonic()

    def watch(self, consumer: int) -> None:
        """Renew this consumer from now on: it has just registered."""
        self._renewed_at = monotonic()
        self._consumer = consumer

    def is_fresh(self) -> bool:
        """Whether nobody can have taken this consumer for dead yet."""
        return monotonic() - self._renewed_at < self._lease_seconds

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()

    def run(self) -> None:
        """Beat until stopped."""
        pause = self._interval_seconds
        while not self._stopping.wait(pause):
            try:
                self._beat()
                pause = self._interval_seconds
            except Exception as error:  # noqa: BLE001 - one turn of a loop that must survive a restart of the server
                level = logging.DEBUG if self.is_fresh() else logging.WARNING
                logger.log(level, "Heartbeat failed, will try again: %s", error)
                self._first_looks.clear()
                _close(self._using)
                pause = min(_RETRY_SECONDS, self._interval_seconds)
        _close(self._using)

    def _connect(self) -> None:
        connection = connections[self._using]
        connection.ensure_connection()
        if connection.connection is not self._prepared:
            databases.of(self._using).prepare_dispatcher(connection, self._consumer)
            self._prepared = connection.connection

    def _beat(self) -> None:
        self._connect()
        consumer, before = self._consumer, monotonic()
        if not lifecycle.renew(consumer, using=self._using):
            if consumer == self._consumer:
                self._on_rescued()
            return
        after = monotonic()
        if after - self._renewed_at > 2 * self._interval_seconds:
            # We were late ourselves, so silence of others means nothing: look anew.
            self._first_looks.clear()
        # The server wrote somewhere between the two; the earlier is the safe one.
        self._renewed_at = before
        self._rescue_the_dead(consumer)

    def _rescue_the_dead(self, consumer: int) -> None:
        suspects = lifecycle.suspects(using=self._using, besides=consumer)
        looks = {}
        for suspect in suspects:
            look = self._first_looks.get(suspect.pk)
            if look is None or look.renewed_at != suspect.renewed_at:
                looks[suspect.pk] = _Look(suspect.renewed_at, monotonic())
            elif monotonic() - look.looked_at >= self._interval_seconds * 0.9:
                self._rescue(suspect)
            else:
                looks[suspect.pk] = look
        self._first_looks = looks
        orphans = set(lifecycle.orphans(using=self._using))
        if twice_seen := sorted(orphans & self._orphans):
            lifecycle.rescue_orphans(twice_seen, using=self._using)
        self._orphans = orphans

    def _rescue(self, suspect: ConsumerModel) -> None:
        lifecycle.end_sessions(suspect, using=self._using)
        settlements = lifecycle.rescue(suspect, using=self._using)
        if settlements is None:
            return
        logger.warning(
            "Rescued %s tasks of consumer %s, which stopped renewing its lease",
            len(settlements),
            suspect,
            extra={"consumer": suspect.pk},
        )
        for settlement in settlements:
            if settlement.ended is Ended.FAILED:
                log_settled(settlement)


def _close(using: str) -> None:
    try:
        connections[using].close()
    except Error:
        logger.debug("Closing a broken connection failed", exc_info=True)
