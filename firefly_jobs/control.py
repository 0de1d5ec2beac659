"""What a supervised process and its supervisor tell each other, and how.

Both ends of the control pipe speak the named tuples below, and nothing else.  The pipe
is a means of its own because signals cannot say this: a terminal's Ctrl-C and a service
manager's SIGTERM reach the whole group, and a second signal means "exit at once".

A consumer reports through a :class:`Link`; without a supervisor nobody listens.
What a call must not exceed is said through :func:`current_watch`; the supervisor ends the
process of a call that does.

To add a message: add its named tuple to :data:`Report`, and a case to ``Child._take`` in
``children.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

from .attempts import Claim


class Registered(NamedTuple):
    """The child claims under this id from now on."""

    consumer: int


class Retiring(NamedTuple):
    """The child claims no more; a replacement may start."""

    reason: str


class Began(NamedTuple):
    """A call must be over by ``deadline``, and its process stay below ``memory_bytes``."""

    task_id: int
    fence: int
    deadline: float | None
    memory_bytes: int | None


class Over(NamedTuple):
    """That call is over."""

    task_id: int
    fence: int


class Finished(NamedTuple):
    """The child has stopped in order and is about to end; what does not say so has died."""

    code: int
    wants_restart: bool


class Stop(NamedTuple):
    """The one request of a supervisor: stop in order."""


Report = Registered | Retiring | Began | Over | Finished


class Link:
    """What a consumer tells its supervisor; this one has none."""

    def registered(self, consumer: int) -> None:
        """Tell the id under which rows are claimed from now on."""

    def retiring(self, reason: str) -> None:
        """Tell that no more rows are claimed."""


class PipeLink(Link):
    """The child's end of the control pipe.

    Args:
        pipe: Its end.
    """

    def __init__(self, pipe: Connection[Report, Stop]) -> None:
        self._pipe = pipe
        # Lanes, the event loop and the dispatcher all report.
        self._sending = threading.Lock()

    def registered(self, consumer: int) -> None:
        """Tell the id; before the first claim, so that no row is ever unknown."""
        self.send(Registered(consumer))

    def retiring(self, reason: str) -> None:
        """Ask for a replacement."""
        self.send(Retiring(reason))

    def finished(self, code: int, *, wants_restart: bool = False) -> None:
        """Tell that everything is in order."""
        self.send(Finished(code, wants_restart))

    def send(self, report: Report) -> None:
        """Report, if the supervisor still lives; the listener notices if it does not."""
        try:
            with self._sending:
                self._pipe.send(report)
        except OSError:
            return

    def await_stop(self) -> bool:
        """Wait until asked to stop; return ``False`` if the supervisor has died instead."""
        try:
            self._pipe.recv()
        except (EOFError, OSError):
            return False
        return True


class Watch:
    """Tell the supervisor what a call must not exceed, or it is ended with its process.

    Args:
        send: Where to report to; ``None`` if there is no supervisor.
    """

    def __init__(self, send: Callable[[Report], None] | None = None) -> None:
        self._send = send

    @property
    def is_enforced(self) -> bool:
        """Whether anybody listens; if not, a limit has to be enforced in another way."""
        return self._send is not None

    def begin(
        self, claim: Claim, *, deadline: float | None = None, memory_bytes: int | None = None
    ) -> None:
        """Watch a call from now on; call it before the function is called.

        Args:
            claim: Whose call.
            deadline: When it must be over, by ``time.monotonic()``: on Linux that is
                CLOCK_MONOTONIC, which all processes of a machine share.
            memory_bytes: Resident size that its process must not exceed meanwhile.
        """
        if self._send is not None:
            self._send(Began(claim.id, claim.fence, deadline, memory_bytes))

    def end(self, claim: Claim) -> None:
        """Stop watching; call it as soon as the function has returned or raised.

        Settling may have to wait for a lock, which is no fault of the call.
        """
        if self._send is not None:
            self._send(Over(claim.id, claim.fence))


_watch = Watch()


def current_watch() -> Watch:
    """Return the watch of this process; a process has one supervisor or none."""
    return _watch


def install_watch(watch: Watch) -> None:
    """Make ``watch`` the one of this process."""
    global _watch  # noqa: PLW0603 - set once, before anything runs
    _watch = watch
