"""Hear what other processes announce.

A :class:`Listener` is a thread that waits on a connection of its own, where the database
can notify (see ``wakeup.py`` for the other end).  Consumers have one to hear of due rows,
and processes that wait for results have one to hear of rows that ended.  What is missed
while it is not connected is found because whoever has it looks once after every
connecting, and polls meanwhile.  Behind a pooler others would hear what this session asked
for, so there it gives up and polling stays.

To add one: subclass it, say what to do in the methods that start with ``on_``.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from time import monotonic
from typing import Any

from . import databases
from .databases import Channel, Notice, Subscription

logger = logging.getLogger("firefly_jobs")

# How often a silent connection is asked whether it is still alive.
CHECK_SECONDS = 60.0
BACK_OFF_SECONDS_MIN, BACK_OFF_SECONDS_MAX = 0.1, 5.0


class Listener(threading.Thread):
    """A thread that hears what is announced on some channels of one database.

    Args:
        using: Database alias.
        channels: What it hears.
        name: Name of the thread.
    """

    def __init__(self, *, using: str, channels: Sequence[Channel], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._using = using
        self._channels = channels
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._quiet_since = 0.0
        self._is_stopping = False
        # Behind a pooler it has given up.
        self.is_pooled = False
        # Read by other threads: as long as it is true, nothing is missed.
        self.is_connected = False

    # --- what a subclass says

    def connect(self) -> Any:
        """Return a connection of this thread, connected."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """Close that connection, in whatever state it is."""
        raise NotImplementedError

    def is_needed(self) -> bool:
        """Whether to connect, or connect again; if not, the thread ends."""
        return True

    def on_connected(self) -> None:
        """Look at what was announced before: it is not heard any more."""

    def on_heard(self, notices: set[Notice]) -> None:
        """Do what has to be done about these."""

    def on_lost(self) -> None:
        """Look, and poll from now on."""

    def on_pause(self, subscription: Subscription) -> None:
        """Make sure that the connection is alive; called when nothing was heard for long."""
        subscription.check()

    def seconds_until_pause(self) -> float:
        """Return how long to listen before the next :meth:`on_pause`; 0 or less: no longer."""
        return self._quiet_since + CHECK_SECONDS - monotonic()

    # --- what others do

    def stop(self) -> None:
        """End the thread; returns at once."""
        self._is_stopping = True
        self.nudge()

    def nudge(self) -> None:
        """Let the thread ask :meth:`seconds_until_pause` again; returns at once."""
        if self._writer is not None:
            # It may have ended, or have been nudged so often that nothing more fits in.
            with suppress(OSError):
                self._writer.send(b".")

    # --- the thread

    def run(self) -> None:
        """Listen until stopped, connecting again whenever the connection is lost."""
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        with self._reader, self._writer:
            self._keep_listening()
        self.disconnect()

    def _keep_listening(self) -> None:
        pause = BACK_OFF_SECONDS_MIN
        while not self._is_stopping and not self.is_pooled and self.is_needed():
            began_at = monotonic()
            try:
                self._listen()
            except Exception as error:  # noqa: BLE001 - one turn of a loop that must survive a restart of the server
                self._lost(error)
                if monotonic() - began_at > BACK_OFF_SECONDS_MAX:
                    pause = BACK_OFF_SECONDS_MIN
                self._wait(pause)
                pause = min(pause * 2, BACK_OFF_SECONDS_MAX)

    def _listen(self) -> None:
        subscription = databases.of(self._using).listen(self.connect(), self._channels)
        if subscription is None:
            self.is_pooled = True
            logger.warning(
                "Not listening on database %s, since its sessions are a pooler's; polling instead",
                self._using,
            )
            return
        self.is_connected = True
        self._quiet_since = monotonic()
        self.on_connected()
        # What has arrived with the answers to its statements makes nothing readable.
        self._hear(subscription)
        while not self._is_stopping:
            if self._wait(max(self.seconds_until_pause(), 0.0), subscription):
                self._hear(subscription)
            elif self.seconds_until_pause() <= 0.0:
                self.on_pause(subscription)
                self._quiet_since = monotonic()
                self._hear(subscription)
        self.is_connected = False
        subscription.close()

    def _hear(self, subscription: Subscription) -> None:
        if heard := subscription.receive():
            self._quiet_since = monotonic()
            self.on_heard(heard)

    def _lost(self, error: Exception) -> None:
        level = logging.WARNING if self.is_connected else logging.DEBUG
        logger.log(level, "Stopped listening, will try again and poll meanwhile: %s", error)
        was_connected, self.is_connected = self.is_connected, False
        self.disconnect()
        if was_connected:
            self.on_lost()

    def _wait(self, seconds: float, subscription: Subscription | None = None) -> bool:
        """Wait until something arrives, the thread is nudged, or ``seconds`` are over."""
        with selectors.DefaultSelector() as selector:
            if self._reader is not None:
                selector.register(self._reader, selectors.EVENT_READ)
            if subscription is not None:
                selector.register(subscription, selectors.EVENT_READ)
            ready = [key.fileobj for key, _ in selector.select(seconds)]
        if self._reader is not None and self._reader in ready:
            self._reader.recv(4096)
        return subscription in ready
