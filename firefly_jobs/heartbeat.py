"""Renew this consumer's lease, and rescue the tasks of consumers that stopped renewing.

Runs on a thread with a connection of its own, so that neither a long task nor a busy
dispatcher looks like death.  Only missed heartbeats make a consumer dead, never run
time, and it takes two looks: the first marks the late consumer; only if no heartbeat
followed within another interval, during which this consumer could write its own, are
its rows taken.  When the database is away, or an SQLite write lock is held for long,
everybody is silent and nobody is dead.

A consumer on this machine whose process has ended is dead at the next look.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from time import monotonic
from typing import NamedTuple

from django.db import Error

from . import admission, databases, events, fencing, leases, messenger, rebuilding, tallies
from .attempts import Claim, Ended, Settlement
from .membership import KeptConnection
from .models import ConsumerModel
from .neighbours import has_ended
from .reporting import log_fields, log_settled

logger = logging.getLogger("firefly_jobs")

# Heartbeats per lease; a lease survives two that are missed.
BEATS_PER_LEASE = 3
_RETRY_SECONDS = 0.5
# How often lines are looked at for rows that everybody has forgotten.
SWEEP_LEASES = 10


class _Look(NamedTuple):
    renewed_at: object
    looked_at: float


def awake_seconds() -> float:
    """Return a clock that only goes forward, and goes on while the machine is suspended."""
    # Where there is no such clock, the usual one stands still during a suspend.
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return monotonic() if clock is None else time.clock_gettime(clock)


class Heartbeat(threading.Thread):
    """The heartbeat thread of one consumer.

    Args:
        using: Database alias.
        lease_seconds: How long the others wait for a heartbeat.
        on_rescued: Called with the id under which this consumer was found to be rescued; it
            may have another by then.
    """

    def __init__(
        self, *, using: str, lease_seconds: float, on_rescued: Callable[[int], None]
    ) -> None:
        super().__init__(name="firefly-heartbeat", daemon=True)
        self._using = using
        self._lease_seconds = lease_seconds
        self._interval_seconds = lease_seconds / BEATS_PER_LEASE
        self._on_rescued = on_rescued
        self._stopping = threading.Event()
        self._first_looks: dict[int, _Look] = {}
        self._orphans: set[Claim] = set()
        self._next_orphans_at = 0.0
        # Not all consumers of a deploy at the same moment.
        self._next_sweep_at = monotonic() + lease_seconds * SWEEP_LEASES * random.random()  # noqa: S311 - no secret
        self._swept = ""
        self._parts: list[Callable[..., object]] = []
        self._consumer = 0
        self._connection = KeptConnection(using, owner=lambda: self._consumer)
        self._renewed_at = awake_seconds()

    def watch(self, consumer: int, *, since: float) -> None:
        """Renew this consumer from now on.

        Args:
            consumer: Its id.
            since: :func:`awake_seconds` before it registered.
        """
        self._renewed_at = since
        self._consumer = consumer

    def is_fresh(self) -> bool:
        """Whether nobody can have taken this consumer for dead yet."""
        return awake_seconds() - self._renewed_at < self._lease_seconds

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
                self._connection.close()
                pause = min(_RETRY_SECONDS, self._interval_seconds)
        self._connection.close()

    def _beat(self) -> None:
        self._connection.ensure()
        consumer, before = self._consumer, awake_seconds()
        if not leases.renew(consumer, using=self._using):
            self._on_rescued(consumer)
            return
        after = awake_seconds()
        if after - self._renewed_at > 2 * self._interval_seconds:
            # We were late ourselves, so silence of others means nothing: look anew.
            self._first_looks.clear()
        # The server wrote somewhere between the two; the earlier is the safe one.
        self._renewed_at = before
        self._rescue_the_dead(consumer)
        self._sweep()

    def _sweep(self) -> None:
        """Sweep a part in each turn: it may meet locks, and the next heartbeat waits for it."""
        if monotonic() >= self._next_sweep_at:
            self._next_sweep_at = monotonic() + self._lease_seconds * SWEEP_LEASES
            self._parts = [self._sweep_lines, self._sweep_workflows, events.sweep, tallies.sweep]
        if not self._parts:
            return
        try:
            self._parts.pop(0)(using=self._using)
        except Error as error:
            # There is a next time.
            if not databases.of(self._using).is_conflict(error):
                raise
            logger.info("A sweep met a lock of another session: %s", error)

    def _sweep_lines(self, *, using: str) -> None:
        self._swept = admission.sweep(self._swept, using=using)

    def _sweep_workflows(self, *, using: str) -> None:
        rebuilding.sweep(using=using, seconds=self._interval_seconds / 4)

    def _rescue_the_dead(self, consumer: int) -> None:
        looks = {}
        for suspect in leases.suspects(using=self._using, besides=consumer):
            if has_ended(suspect.process or ""):
                settlements, _ = leases.bury(suspect.pk, using=self._using)
                self._tell(settlements, suspect, "whose process has ended")
                continue
            look = self._first_looks.get(suspect.pk)
            if look is None or look.renewed_at != suspect.renewed_at:
                looks[suspect.pk] = _Look(suspect.renewed_at, monotonic())
            elif monotonic() - look.looked_at >= self._interval_seconds * 0.9:
                self._rescue(suspect)
            else:
                looks[suspect.pk] = look
        self._first_looks = looks
        self._rescue_orphans()

    def _rescue_orphans(self) -> None:
        # Rare, so they are looked for once per lease; a find is looked at again at once.
        if not self._orphans and monotonic() < self._next_orphans_at:
            return
        self._next_orphans_at = monotonic() + self._lease_seconds
        orphans = set(fencing.orphans(using=self._using))
        if twice_seen := sorted(orphans & self._orphans):
            for claim in leases.rescue_orphans(twice_seen, using=self._using):
                logger.warning(
                    "Rescued task %s, whose consumer was gone", claim.id, extra=log_fields(claim)
                )
                messenger.rescued(claim, using=self._using, consumer=None)
        self._orphans = orphans

    def _rescue(self, suspect: ConsumerModel) -> None:
        leases.end_sessions(suspect, using=self._using)
        settlements = leases.rescue(suspect, using=self._using)
        self._tell(settlements, suspect, "which stopped renewing its lease")

    def _tell(self, settlements: list[Settlement] | None, suspect: ConsumerModel, why: str) -> None:
        if not settlements:
            return
        logger.warning(
            "Rescued %s tasks of consumer %s, %s",
            len(settlements),
            suspect,
            why,
            extra={"consumer": suspect.pk},
        )
        for settlement in settlements:
            if settlement.ended is Ended.FAILED:
                log_settled(settlement)
        messenger.freed(settlements, using=self._using, consumer=suspect.pk)
