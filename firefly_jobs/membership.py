"""A consumer's place among the others: its row, its id, and the rows that carry it.

A consumer owns exactly what it holds in memory.  Rows that carry its id in the database
and that it does not hold (the answer to a claim got lost) are found and released here.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Collection, Sequence
from time import monotonic

from django.db import Error, connections

from . import databases, fencing, leases, lifecycle
from .attempts import Claim, Ended, Settlement
from .control import current_watch
from .exceptions import LeaseLost
from .holdings import Holdings
from .neighbours import mark_of_this_process
from .reporting import log_fields
from .states import Status

logger = logging.getLogger("firefly_jobs")

_STEP_ATTEMPTS = 3


class KeptConnection:
    """A thread's connection that is kept for long, and prepared whenever it is a new one.

    Args:
        using: Database alias.
        owner: Returns the consumer's id.
    """

    def __init__(self, using: str, *, owner: Callable[[], int]) -> None:
        self._using = using
        self._owner = owner
        self._database = databases.of(using)
        self._prepared: tuple[object, int] | None = None

    def ensure(self) -> None:
        """Connect if this thread is not connected."""
        connection = connections[self._using]
        connection.ensure_connection()
        owner = self._owner()
        if self._prepared is None or self._prepared != (connection.connection, owner):
            self._database.prepare_dispatcher(connection, owner)
            self._prepared = (connection.connection, owner)

    def insist(self, step: Callable[[], None]) -> bool:
        """Do one step of stopping; a database that is away must not keep the process."""
        for _ in range(_STEP_ATTEMPTS):
            try:
                self.ensure()
                step()
            except Error as error:
                logger.warning("A step of stopping failed: %s", error)
                if not self._database.is_busy(error):
                    self.close()
            else:
                return True
        return False

    def close(self) -> None:
        """Close this thread's connection, in whatever state it is."""
        try:
            connections[self._using].close()
        except Error:
            logger.debug("Closing a broken connection failed", exc_info=True)


class Membership:
    """One consumer's row, from registering to unregistering.

    Args:
        using: Database alias.
        queues: What the consumer serves.
        lease_seconds: How long the others wait for a heartbeat.
        holdings: What the consumer holds in memory.
    """

    def __init__(
        self, *, using: str, queues: Sequence[str], lease_seconds: float, holdings: Holdings
    ) -> None:
        self._using = using
        self._queues = queues
        self._lease_seconds = lease_seconds
        self._holdings = holdings
        self.id = 0
        self.next_reconcile_at = 0.0

    def register(self) -> None:
        """Write a row, and be known by its id from now on."""
        self.id = leases.register(
            name=f"{socket.gethostname()}:{os.getpid()}",
            queues=self._queues,
            lease_seconds=self._lease_seconds,
            # A supervisor sees the end of its processes by itself, and may know why.
            process=None if current_watch().is_enforced else mark_of_this_process(),
            using=self._using,
        )
        self.next_reconcile_at = monotonic() + self._lease_seconds
        logger.info(
            "Consumer %s consumes %s from database %s",
            self.id,
            ", ".join(self._queues),
            self._using,
            extra={"consumer": self.id},
        )

    def unregister(self) -> None:
        """Delete the row, unless something is still held."""
        self.reconcile()
        if self._holdings.is_empty:
            leases.unregister(self.id, using=self._using)

    def end_sessions(self) -> None:
        """End what this consumer's connections do, where the server can."""
        databases.of(self._using).end_sessions(connections[self._using], self.id)

    def reconcile(self) -> int:
        """Release rows that carry our id and that we do not hold; return how many.

        The answer to a claim may get lost: then the rows are ours and nobody runs them.
        """
        strays = fencing.strays_of(self.id, held=self._holdings.ids(), using=self._using)
        if strays:
            released = lifecycle.release(strays, using=self._using)
            logger.warning(
                "Released %s tasks that were claimed for this consumer without its knowledge",
                released,
                extra={"consumer": self.id},
            )
        self.next_reconcile_at = monotonic() + self._lease_seconds
        return len(strays)

    def release(self, claims: Collection[Claim]) -> None:
        """Give back claims that are not held any more and have not started."""
        lifecycle.release(claims, using=self._using)

    def give_back(
        self, claim: Claim, *, has_started: bool, delay_seconds: float | None = None
    ) -> None:
        """Release a claim that is held, whatever its call is doing."""
        settlement = Settlement(
            claim=claim,
            ended=Ended.RELEASED,
            status=Status.CREATED,
            duration=0.0,
            delay_seconds=delay_seconds,
            has_started=has_started,
        )
        try:
            lifecycle.settle(settlement, using=self._using, consumer=self.id)
        except LeaseLost as event:
            logger.debug("%s", event)
            if has_started and fencing.was_settled(claim, using=self._using):
                logger.warning(
                    "Task %s has committed, but its on_commit callbacks have not all run; those "
                    "that do not end in a moment are dropped with this process",
                    claim.id,
                    extra=log_fields(claim),
                )
        self._holdings.done(claim)
