"""Notice that a row has ended, for all in this process who wait for one.

Those who wait on one database form its :class:`Lookout`.  One of them, the *leader*, looks
for all with one query, on the connection that it has anyway; when it leaves, another one
leads.  So waiting takes no connection, whatever the number of those who wait, and as well
in threads as in coroutines.  When the leader looks:

- after a commit by another connection, where the database has a number that tells;
- when a notification says that rows have ended, without saying which;
- and always after a pause that grows with the time they wait: what is missed costs latency.

Where notifications say which rows have ended, who waits for one looks at it at once.  They
are heard by a thread with a connection of its own (:class:`EndListener`), one per process
and database, which also tells consumers that somebody waits: they send nothing otherwise.
See docs/decisions/0011.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any

from asgiref.sync import sync_to_async
from django.db import Error, connections

from . import databases
from .conf import get_settings
from .contexts import current_task
from .databases import ANY_TASK, ROLL_CALL, Channel, Notice, Subscription
from .exceptions import WaitInsideTransactionError
from .listening import Listener
from .models import TaskModel
from .states import TERMINAL
from .wakeup import AUDIENCE_SECONDS, idle_seconds, is_testcase, tell_neighbour

logger = logging.getLogger("firefly_jobs")

# The pause between two looks is this part of the time since somebody last began to wait,
# between these limits; the first where nothing else tells, the second where something does.
POLL_SHARE, POLL_SECONDS_MIN = 0.01, 0.01
WOKEN_SHARE, WOKEN_SECONDS_MIN = 0.1, 0.1
PAUSE_SECONDS_MAX = 1.0
# How often the number of commits is asked for, at first and later; see ``napping.py``.
LIVELY_LOOK_SECONDS, QUIET_LOOK_SECONDS, LIVELY_SECONDS = 0.004, 0.01, 10.0
# A leader may hang, so the others look after themselves now and then.
ALONE_SECONDS = 5.0
# An exception that is to interrupt a thread reaches it between two sleeps.
SLEEP_SECONDS_MAX = 0.5
# So long a server that restarts is waited for.
AWAY_SECONDS, AWAY_PAUSE_SECONDS = 30.0, 0.2
REPEAT_SECONDS = AUDIENCE_SECONDS / 3
# Ids per query.
BATCH_SIZE = 500


def read(pk: int, *, using: str) -> TaskModel:
    """Return a row.

    Raises:
        DoesNotExist: ``TaskModel.DoesNotExist``, if there is none.
    """
    try:
        return TaskModel.objects.using(using).get(pk=pk)
    except TaskModel.DoesNotExist:
        message = (
            f"There is no task {pk} on database {using!r}. It was deleted, or the transaction "
            f"that scheduled it was rolled back or has not committed yet."
        )
        raise TaskModel.DoesNotExist(message) from None


class Wait:
    """One who waits for the end of one row; to be used once.

    Args:
        pk: Primary key of the row.
        using: Database alias.
        timeout_seconds: For how long; ``None`` for ever.
        loop: The event loop of a coroutine that waits; ``None`` if it is a thread.
    """

    def __init__(
        self,
        pk: int,
        *,
        using: str,
        timeout_seconds: float | None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.pk = pk
        self._using = using
        self._timeout_seconds = timeout_seconds
        self._deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        self._lookout = lookout(using)
        self._loop = loop
        self._event = threading.Event()
        self._loop_event = asyncio.Event()
        # Whether to look at the row: others say so, and it is how everyone begins.
        self.is_told = True
        self._looked_at = 0.0
        self._failing_since: float | None = None
        self._status = ""

    def wake(self) -> None:
        """End the pause, from any thread."""
        if self._loop is None:
            self._event.set()
            return
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            self._loop.call_soon_threadsafe(self._loop_event.set)

    def first_look(self) -> TaskModel | None:
        """Return the row if it has ended already.

        Raises:
            DoesNotExist: ``TaskModel.DoesNotExist``, if there is no row.
            WaitInsideTransactionError: If it has to be waited for, and must not be.
        """
        row = self._read()
        if row.status not in TERMINAL:
            _refuse_inside_transaction(row, self._using)
            return None
        return row

    def sleep_until_ended(self) -> TaskModel:
        """Block this thread until the row has ended; return it.

        Raises:
            DoesNotExist: ``TaskModel.DoesNotExist``, if it is deleted meanwhile.
            TimeoutError: If the time is over.
        """
        with self._lookout.joined(self):
            while (row := self._look()) is None:
                self._event.wait(min(self._seconds_to_sleep(), SLEEP_SECONDS_MAX))
                self._event.clear()
        return row

    async def until_ended(self) -> TaskModel:
        """Return the row once it has ended; raises what :meth:`sleep_until_ended` does."""
        with self._lookout.joined(self):
            while (row := await sync_to_async(self._look)()) is None:
                seconds = self._seconds_to_sleep()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._loop_event.wait(), seconds)
                self._loop_event.clear()
        return row

    def _look(self) -> TaskModel | None:
        """Look, if there is reason to; return the row if it has ended."""
        try:
            row = self._look_if_due()
        except Error as error:
            if not self._may_pass(error):
                raise
            return None
        self._failing_since = None
        return row

    def _look_if_due(self) -> TaskModel | None:
        if not self.is_told and self._lookout.is_led_by(self):
            self._lookout.look()
        if not self.is_told and monotonic() < self._looked_at + ALONE_SECONDS:
            return None
        self.is_told = False
        row = self._read()
        return row if row.status in TERMINAL else None

    def _read(self) -> TaskModel:
        looked_at = monotonic()
        row = read(self.pk, using=self._using)
        self._looked_at, self._status = looked_at, row.status
        return row

    def _may_pass(self, error: Error) -> bool:
        """Whether to try again: the server is away, or busy, and not for long."""
        now = monotonic()
        self._failing_since = self._failing_since or now
        if not databases.of(self._using).is_lost(error):
            return False
        connections[self._using].close_if_unusable_or_obsolete()
        self.is_told = True
        return now - self._failing_since < AWAY_SECONDS

    def _seconds_to_sleep(self) -> float:
        now = monotonic()
        left = float("inf") if self._deadline is None else self._deadline - now
        if left <= 0:
            if self._failing_since is not None or self._looked_at >= now + left:
                message = (
                    f"Task {self.pk} has not ended within {self._timeout_seconds:g} s, it is "
                    f"{self._status}. It goes on: wait again, or cancel it."
                )
                raise TimeoutError(message)
            self.is_told = True  # for a last look
            return 0.0
        if self._failing_since is not None:
            return min(AWAY_PAUSE_SECONDS, left)
        return min(self._lookout.seconds_to_sleep(self), left)


def _refuse_inside_transaction(row: TaskModel, using: str) -> None:
    connection: Any = connections[using]
    if not connection.in_atomic_block and connection.autocommit:
        return
    if is_testcase(connection):
        way = "A TestCase is one big transaction: use TransactionTestCase."
    elif current_task(None) is not None:
        way = (
            "A task is a transaction: schedule what needs the result as a task of its own, or "
            "declare this one with atomic=False."
        )
    else:
        way = (
            "Wait after the atomic block, or in transaction.on_commit(). With ATOMIC_REQUESTS a "
            "view is such a block, unless it has @transaction.non_atomic_requests."
        )
    message = (
        f"Task {row.pk} ({row.func_name}) has not ended, and here a transaction is open on "
        f"database {using!r}. Nobody else sees what was scheduled in it before it commits, and "
        f"it may never see the end of the task. {way}"
    )
    raise WaitInsideTransactionError(message)


class Lookout:
    """All who wait on one database in this process, and what they know together.

    Args:
        using: Database alias.
    """

    def __init__(self, using: str) -> None:
        self._using = using
        self._database = databases.of(using)
        self._lock = threading.Lock()
        self._waits: dict[int, list[Wait]] = {}
        self._leader: Wait | None = None
        self._listener: EndListener | None = None
        self._last_joined_at = self.idle_since = 0.0
        # The leader's:
        self._is_called = True
        self._next_look_at = 0.0
        self._version: int | None = None

    # --- coming and going

    @contextmanager
    def joined(self, wait: Wait) -> Iterator[None]:
        """Let ``wait`` hear what concerns it during the block."""
        self._join(wait)
        try:
            yield
        finally:
            self._leave(wait)

    def _join(self, wait: Wait) -> None:
        with self._lock:
            self._waits.setdefault(wait.pk, []).append(wait)
            self._last_joined_at = monotonic()
            self._next_look_at = min(self._next_look_at, self._last_joined_at + self._pause())
            if self._leader is None:
                self._lead(wait)
            if self._listener is None and get_settings().NOTIFY and self._database.can_notify:
                self._listener = EndListener(self, using=self._using)
                try:
                    self._listener.start()
                except RuntimeError as error:  # there are too many threads
                    self._listener = None
                    logger.debug("Could not start to listen: %s", error)
            leader, listener = self._leader, self._listener
        if leader is not None and leader is not wait and not self._is_woken:
            leader.wake()  # from the long pause of who has waited for long
        if listener is not None and listener.is_connected and listener.seconds_until_pause() <= 0:
            listener.nudge()

    def _leave(self, wait: Wait) -> None:
        with self._lock:
            others = self._waits[wait.pk]
            others.remove(wait)
            if not others:
                del self._waits[wait.pk]
            if not self._waits:
                self.idle_since = monotonic()
            next_leader = None
            if self._leader is wait:
                next_leader = next(iter(self._waits.values()))[0] if self._waits else None
                self._lead(next_leader)
            listener = None if self._waits else self._listener
        if next_leader is not None:
            next_leader.wake()
        if listener is not None:
            listener.nudge()

    def _lead(self, wait: Wait | None) -> None:
        self._leader = wait
        # What the former one had asked for was about its connection.
        self._is_called, self._version = True, None

    def dismiss(self, listener: EndListener) -> bool:
        """Let the listener end, unless somebody waits; return whether it may."""
        with self._lock:
            if self._waits:
                return False
            if self._listener is listener:
                self._listener = None
            return True

    @property
    def is_empty(self) -> bool:
        """Whether nobody waits."""
        return not self._waits

    def is_led_by(self, wait: Wait) -> bool:
        """Whether ``wait`` looks for all."""
        return self._leader is wait

    # --- hearing

    def heard(self, ids: Collection[int] | None) -> None:
        """Let those look who wait for one of ``ids``; ``None``: who knows for which."""
        if not self._waits:
            return
        with self._lock:
            if ids is None:
                self._is_called = True
                waits = [] if self._leader is None else [self._leader]
            else:
                waits = [wait for pk in self._waits.keys() & set(ids) for wait in self._waits[pk]]
                for wait in waits:
                    wait.is_told = True
        for wait in waits:
            wait.wake()

    # --- what the leader does, on its own connection

    def look(self) -> None:
        """Tell all whose rows have ended, or are gone, if there is reason to look."""
        connection: Any = connections[self._using]
        connection.ensure_connection()
        if not self._is_look_due(connection):
            return
        self._is_called = False
        self._version = self._database.data_version(connection)
        with self._lock:
            ids = list(self._waits)
        for start in range(0, len(ids), BATCH_SIZE):
            batch = ids[start : start + BATCH_SIZE]
            rows = TaskModel.objects.using(self._using).filter(pk__in=batch)
            found = dict(rows.values_list("pk", "status"))
            self.heard([pk for pk in batch if pk not in found or found[pk] in TERMINAL])
        self._next_look_at = monotonic() + self._pause()

    def _is_look_due(self, connection: Any) -> bool:
        if self._is_called or monotonic() >= self._next_look_at:
            return True
        if self._version is None:
            return False
        return self._database.data_version(connection) != self._version

    def seconds_to_sleep(self, wait: Wait) -> float:
        """Return how long ``wait`` may sleep if nobody wakes it."""
        if not self.is_led_by(wait):
            return ALONE_SECONDS
        now = monotonic()
        left = 0.0 if self._is_called else max(self._next_look_at - now, 0.0)
        if self._version is None:
            return left
        is_lively = now < self._last_joined_at + LIVELY_SECONDS
        return min(left, LIVELY_LOOK_SECONDS if is_lively else QUIET_LOOK_SECONDS)

    @property
    def _is_woken(self) -> bool:
        listener = self._listener
        return self._version is not None or (listener is not None and listener.is_connected)

    def _pause(self) -> float:
        waited = monotonic() - self._last_joined_at
        if self._is_woken:
            pause = max(waited * WOKEN_SHARE, WOKEN_SECONDS_MIN)
        else:
            pause = max(waited * POLL_SHARE, POLL_SECONDS_MIN)
        return min(pause, PAUSE_SECONDS_MAX)


class EndListener(Listener):
    """Hears that rows have ended, and lets consumers know that somebody waits.

    Args:
        lookout: Those who wait.
        using: Database alias.
    """

    def __init__(self, lookout: Lookout, *, using: str) -> None:
        super().__init__(using=using, channels=(Channel.ENDED,), name="firefly-lookout")
        self._lookout = lookout
        self._connection: Any = None
        self._said_at = 0.0

    def connect(self) -> Any:
        """Connect for this thread alone; those of a pool are for requests."""
        connection = databases.of(self._using).unpooled_copy(connections[self._using])
        connection.settings_dict["AUTOCOMMIT"] = True
        connection.ensure_connection()
        self._connection = connection
        return connection

    def disconnect(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with suppress(Error):
                self._connection.close()
            self._connection = None

    def is_needed(self) -> bool:
        """Whether somebody waits; otherwise a new listener is started for who comes next."""
        return not self._lookout.dismiss(self)

    def on_connected(self) -> None:
        """Let consumers know, and everybody look."""
        self._say()
        self._lookout.heard(None)

    def on_heard(self, notices: set[Notice]) -> None:
        """Let those look whom it may concern."""
        words = {word for notice in notices for word in notice.text.split(",")}
        if ROLL_CALL in words:
            self._answer()
        if words & {ANY_TASK, ROLL_CALL}:
            self._lookout.heard(None)
        self._lookout.heard([int(word) for word in words if word.isdecimal()])

    def on_lost(self) -> None:
        """Look, and poll from now on."""
        self._lookout.heard(None)

    def seconds_until_pause(self) -> float:
        """Return when to repeat that somebody waits, or how long to stay without anybody."""
        if self._lookout.is_empty:
            return self._lookout.idle_since + idle_seconds() - monotonic()
        return self._said_at + REPEAT_SECONDS - monotonic()

    def on_pause(self, subscription: Subscription) -> None:  # noqa: ARG002 - asks the server another way
        """Repeat that somebody waits, or end."""
        if self._lookout.dismiss(self):
            self._is_stopping = True
        else:
            self._say()

    def _answer(self) -> None:
        if self._lookout.is_empty:
            # Whoever asked knows of nobody, so the next one who waits has to speak up.
            self._said_at = float("-inf")
        else:
            self._say()

    def _say(self) -> None:
        databases.of(self._using).notify(self._connection, [Notice(Channel.WAITING, "")])
        self._said_at = monotonic()


_lookouts: dict[str, Lookout] = {}
# What a forked child must neither use nor close: the sockets are shared with its parent.
_inherited: list[dict[str, Lookout]] = []


def lookout(using: str) -> Lookout:
    """Return where those meet who wait on one database."""
    found = _lookouts.get(using)
    if found is None:
        found = _lookouts.setdefault(using, Lookout(using))
        tell_neighbour(using, found.heard)
    return found


def _end_listeners() -> None:
    listeners = [found._listener for found in _lookouts.values()]  # noqa: SLF001 - of this module
    for listener in filter(None, listeners):
        listener.stop()
        listener.join(timeout=1.0)


def _forget_parents() -> None:
    global _lookouts  # noqa: PLW0603 - a forked process starts over
    _inherited.append(_lookouts)
    _lookouts = {}


atexit.register(_end_listeners)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
