"""Tell sleeping consumers that rows may have become claimable, and waiters that rows ended.

Whoever writes due rows calls :func:`announce` with their queues, whoever ends rows calls
:func:`announce_ended` with their ids.  Once the transaction that wrote them has committed,
the words go to the *announcer*: one thread per process and database alias, with a
connection of its own, that sends all words it has as one statement.  So neither the
writer's transaction nor the writer waits: inside the transaction a notification would
serialise commits, after it a second round trip would cost a quarter of ``schedule``.

Rows end far more often than somebody waits for one.  So ends are sent only while somebody
waits, as far as this process knows: a consumer hears it (:class:`Audience`), any other
process cannot know and always sends.  See docs/decisions/0011.

An announcement is a hint.  A lost one costs latency, never correctness: consumers and
waiters poll besides.  So nothing here raises, and nothing is announced where nothing could
be heard: inside a ``TestCase``, which never commits, and where transactions are managed by
hand.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection
from time import monotonic
from typing import Any

from django.db import connections

from . import databases
from .conf import get_settings
from .databases import ANY_QUEUE, ANY_TASK, Channel, Notice

logger = logging.getLogger("firefly_jobs")

# At most a hundred statements a second, however fast tasks are scheduled.
PAUSE_SECONDS = 0.01
IDLE_SECONDS = 30.0
# Under a test runner: an open connection would keep the test database from being dropped.
IDLE_SECONDS_IN_TESTS = 0.1
FLUSH_SECONDS = 1.0
ATTEMPTS_MAX = 5
QUEUES_MAX = 100
# A notification's text may have 8,000 bytes, an id has at most 19 digits.
ENDED_MAX = 300
# So long a consumer remembers that somebody waits; waiters repeat it three times as often.
AUDIENCE_SECONDS = 30.0
_BACK_OFF_SECONDS = 0.1


def announce(using: str, queues: Collection[str]) -> None:
    """Let idle consumers of ``queues`` look for due rows, once this thread has committed.

    Args:
        using: The alias on which the rows were written, by this thread.
        queues: Their queues; ``ANY_QUEUE`` for unknown ones.
    """
    if not queues or not _can_notify(using):
        return
    connection: Any = connections[using]
    if connection.in_atomic_block:
        _register(connection, using, queues)
    elif connection.autocommit:
        _announcer(using).add(queues)


def announce_ended(using: str, ids: Collection[int]) -> None:
    """Let those who wait for one of these rows look at it, once this thread has committed.

    Args:
        using: The alias on which the rows were ended, by this thread.
        ids: Their primary keys.
    """
    if not ids or not (using in _neighbours or _can_notify(using)):
        return
    connection: Any = connections[using]
    if connection.in_atomic_block:
        _register(connection, using, ended=ids)
    elif connection.autocommit:
        _tell_ended(using, ids)


def _can_notify(using: str) -> bool:
    return get_settings().NOTIFY and databases.of(using).can_notify


def _tell_ended(using: str, ids: Collection[int]) -> None:
    if neighbour := _neighbours.get(using):
        neighbour(ids)
    # Asked after the commit: whoever begins to wait later looks after that moment.
    if audience(using).may_be_there and _can_notify(using):
        _announcer(using).add(ended={str(pk) for pk in ids})


# Waiters of this process need no database to hear of what ends in it.
_neighbours: dict[str, Callable[[Collection[int]], None]] = {}


def tell_neighbour(using: str, on_ended: Callable[[Collection[int]], None]) -> None:
    """Call ``on_ended`` with the ids of all rows that this process ends, on any thread."""
    _neighbours[using] = on_ended


class Audience:
    """What this process knows about others who wait for rows to end.

    A process with a listening consumer hears of them.  Any other, or one whose listener is
    not connected, cannot tell, and takes it that they are there.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._lock = threading.Lock()
        self._listeners = 0
        self._until = 0.0

    @property
    def may_be_there(self) -> bool:
        """Whether somebody may wait."""
        return monotonic() < self._until or self._listeners == 0

    def listening(self) -> None:
        """Take note that this process hears of waiters from now on."""
        with self._lock:
            self._listeners += 1

    def not_listening(self) -> None:
        """Take note that this process has stopped hearing of waiters."""
        with self._lock:
            self._listeners -= 1

    def heard(self) -> None:
        """Take note that somebody waits."""
        was_there = self.may_be_there
        self._until = monotonic() + AUDIENCE_SECONDS
        if not was_there:
            # What was kept back until this moment may be what they wait for.
            _announcer(self._using).add(ended={ANY_TASK})


_audiences: dict[str, Audience] = {}


def audience(using: str) -> Audience:
    """Return what this process knows about who waits."""
    found = _audiences.get(using)
    return found if found is not None else _audiences.setdefault(using, Audience(using))


class Announcement:
    """An ``on_commit`` callback that hands words to the announcer; raises nothing."""

    __slots__ = ("ended", "queues", "using")

    def __init__(self, using: str, queues: Collection[str], ended: Collection[int]) -> None:
        self.using = using
        self.queues = set(queues)
        self.ended = set(ended)

    def __call__(self) -> None:
        """Hand over; needs no connection of this thread."""
        if self.queues:
            _announcer(self.using).add(self.queues)
        if self.ended:
            _tell_ended(self.using, self.ended)


def is_testcase(connection: Any) -> bool:
    """Whether the open transaction is a ``TestCase``'s."""
    blocks = connection.atomic_blocks
    return bool(blocks) and getattr(blocks[0], "_from_testcase", False)


def _register(
    connection: Any, using: str, queues: Collection[str] = (), ended: Collection[int] = ()
) -> None:
    # A TestCase never commits.  Not registering there keeps what is none of the test's
    # business out of captureOnCommitCallbacks().
    if is_testcase(connection):
        return
    if connection.run_on_commit:
        savepoints, callback, _ = connection.run_on_commit[-1]
        if isinstance(callback, Announcement):
            ours = set(connection.savepoint_ids)
            is_known = callback.queues.issuperset(queues) and callback.ended.issuperset(ended)
            # What is dropped with no other savepoint than ours are stays as long as we would.
            if savepoints == ours or (savepoints < ours and is_known):
                callback.queues.update(queues)
                callback.ended.update(ended)
                return
    connection.on_commit(Announcement(using, queues, ended))


class _Announcer:
    """Send the words of one alias, merged, from a thread that ends when it has been idle."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._state = threading.Condition()
        self._pending: set[str] = set()
        self._ended: set[str] = set()
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        self._failures = 0
        self._has_warned = False

    def add(self, queues: Collection[str] = (), *, ended: Collection[str] = ()) -> None:
        """Send ``queues``, and ``ended`` rows, soon; returns at once and raises nothing."""
        # Asked without the lock: what is pending has not been sent yet, and the rows are
        # committed, so the statement that is coming speaks for them too.
        if self._pending.issuperset(queues) and self._ended.issuperset(ended):
            return
        with self._state:
            self._pending.update(queues)
            if len(self._pending) > QUEUES_MAX:
                self._pending = {ANY_QUEUE}
            self._ended.update(ended)
            if len(self._ended) > ENDED_MAX:
                self._ended = {ANY_TASK}
            if self._thread is None:
                self._start()
            self._state.notify_all()

    def flush(self, timeout_seconds: float) -> None:
        """Send what is pending and end the thread, waiting for both no longer than this."""
        self._hurry.set()
        with self._state:
            self._state.notify_all()
            self._state.wait_for(lambda: self._thread is None, timeout_seconds)
        self._hurry.clear()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="firefly-announcer", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the interpreter is ending, or there are too many
            self._thread = None
            self._pending, self._ended = set(), set()
            logger.debug("Could not start the announcer: %s", error)

    def _run(self) -> None:
        connection: Any = connections[self._using]
        try:
            while any(words := self._take()):
                self._send(connection, *words)
                # The first goes at once; this pause is what lets the next ones merge.
                self._hurry.wait(PAUSE_SECONDS)
        except Exception:  # the thread's last word; the next announcement starts a new one
            logger.warning("The announcer ended unexpectedly", exc_info=True)
        finally:
            self._close(connection)
            with self._state:
                self._thread = None
                # Also in a hurry: what came while the connection was being closed has been
                # accepted, and nobody would start a thread for it later.
                if self._has_words:
                    self._start()
                self._state.notify_all()

    @property
    def _has_words(self) -> bool:
        return bool(self._pending or self._ended)

    def _take(self) -> tuple[set[str], set[str]]:
        with self._state:
            self._state.wait_for(lambda: self._has_words or self._hurry.is_set(), idle_seconds())
            words = self._pending, self._ended
            self._pending, self._ended = set(), set()
        return words

    def _send(self, connection: Any, queues: set[str], ended: set[str]) -> None:
        notices = [Notice(Channel.DUE, queue) for queue in sorted(queues)]
        if ended:
            notices.append(Notice(Channel.ENDED, ",".join(ended)))
        try:
            databases.of(self._using).notify(connection, notices)
        except Exception as error:  # noqa: BLE001 - one turn of a loop that nobody waits for
            self._close(connection)
            self._failed(error, queues, ended)
        else:
            self._failures = 0
            self._has_warned = False

    def _failed(self, error: Exception, queues: set[str], ended: set[str]) -> None:
        self._failures += 1
        logger.debug("Announcing failed: %s", error)
        if self._failures < ATTEMPTS_MAX:
            with self._state:
                self._pending |= queues
                self._ended |= ended
            # The first failure may only tell that the server has closed an idle connection.
            self._hurry.wait((self._failures - 1) * _BACK_OFF_SECONDS)
            return
        self._failures = 0
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "Could not tell others about due or ended tasks, they find them by polling: %s",
                error,
            )

    def _close(self, connection: Any) -> None:
        try:
            connection.close()
        except Exception:  # whatever it was, the connection is not used again
            logger.debug("Closing a broken connection failed", exc_info=True)


_announcers: dict[str, _Announcer] = {}
# What a forked child must neither use nor close: the sockets are shared with its parent.
_inherited: list[dict[str, _Announcer]] = []


def _announcer(using: str) -> _Announcer:
    found = _announcers.get(using)
    # Two threads may both make one; setdefault lets one of them win.
    return found if found is not None else _announcers.setdefault(using, _Announcer(using))


def flush(timeout_seconds: float = FLUSH_SECONDS) -> None:
    """Send what is pending and close the announcers' connections, within a bounded time."""
    for announcer in list(_announcers.values()):
        announcer.flush(timeout_seconds)


def _forget_parents() -> None:
    global _announcers  # noqa: PLW0603 - a forked process starts over
    _inherited.append(_announcers)
    _announcers = {}
    _audiences.clear()
    _neighbours.clear()


def idle_seconds() -> float:
    """Return how long a connection is kept that nothing is sent or heard on."""
    return IDLE_SECONDS_IN_TESTS if _is_testing() else IDLE_SECONDS


def _is_testing() -> bool:
    # What django.test.utils.setup_test_environment() leaves behind, whatever the runner.
    return hasattr(sys.modules.get("django.core.mail"), "outbox")


atexit.register(flush)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
