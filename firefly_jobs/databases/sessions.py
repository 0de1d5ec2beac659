"""What a driver tells of the transaction on one connection, and what has to be found out.

Whether a call touched the database, whether its transaction is still there, and the marks
of several calls that share one.  Vendors override what their drivers do differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from django.db import DatabaseError

from firefly_jobs.exceptions import ImplicitCommitError, LeavesGroup

SAVEPOINT = "SAVEPOINT firefly_member"
HOOK_SAVEPOINT = "SAVEPOINT firefly_hook"
_PROBE = "SAVEPOINT firefly_probe"

# Looked at before every statement of a call: a search through a long text costs more than
# many a statement, so what can be told by its first word, or by one character, is.
_BLANK = r"(?:[\s;]|/\*.*?\*/|--[^\n]*(?:\n|$))*"
_FIRST_WORD = re.compile(_BLANK + r"(\w+)", re.DOTALL)
_ROLLS_BACK_TO = re.compile(
    _BLANK + r"ROLLBACK\s+(?:WORK\s+|TRANSACTION\s+)?TO\b", re.IGNORECASE | re.DOTALL
)
_GOES_ON = re.compile(r";\s*\S")
# Each begins with plain letters, which are found without looking at every place.
_SETS_STATE = [re.compile(r"set_config\s*\("), re.compile(r"on\s+commit\b")]

# What ends the transaction, where the driver would not notice; what ends a savepoint and
# all that were set after it; and what may hide the former.
_ENDS = {"COMMIT", "END", "ABORT", "ROLLBACK"}
_HIDES = {"CALL", "DO", "EXECUTE"}


class Session:
    """The state of the transaction on one connection, as far as the driver tells.

    A lane has one.  ``begin`` is called before each call, inside an entered ``atomic``
    block; ``before_statement`` at the call's first statement.
    """

    _is_call = False
    _is_shared = False
    _is_probed = False
    _was_probed = False
    _ended = False
    _watched: Any = None
    # Whether the call was kept from ending a transaction that it shares.
    has_refused = False
    # Whether the call changed what later statements of its transaction mean.
    has_set_state = False

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def opening(self) -> AbstractContextManager[Any]:
        """Return the context in which ``atomic`` is entered."""
        return nullcontext()

    def begin(self) -> None:
        """Prepare for a call; sends nothing that holds a lock or a snapshot."""
        driver = self.connection.connection
        if driver is not self._watched:
            self.watch(driver)
            self._watched = driver
        self._ended = self._is_shared = self._is_probed = False
        self.has_refused = self.has_set_state = False
        self._is_call = True

    def watch(self, driver: Any) -> None:
        """Notice when a call ends the transaction itself, on the driver's connection."""
        driver.commit = self._ending(driver.commit, commits=True)
        driver.rollback = self._ending(driver.rollback, commits=False)

    def _ending(self, end: Callable[[], None], *, commits: bool) -> Callable[[], None]:
        def watched() -> None:
            if self._is_call:
                if commits:
                    self.refuse_end("The driver's commit()")
                self._ended = True
            end()

        return watched

    def observe(self, statement: str) -> None:
        """Look at a statement that Django is about to send for the call.

        Raises:
            ImplicitCommitError: If it ends the call's transaction.
            LeavesGroup: If it may end a transaction that the call shares with others.
        """
        self.look_at(statement)

    def look_at(self, statement: str) -> None:
        """Refuse a statement that ends the transaction; get ready for what may hide one.

        Raises:
            ImplicitCommitError: If it ends the call's transaction.
            LeavesGroup: If it may end a transaction that the call shares with others.
        """
        found = _FIRST_WORD.match(statement)
        word = "" if found is None else found[1].upper()
        if word == "RELEASE" or (word == "ROLLBACK" and _ROLLS_BACK_TO.match(statement)):
            self.forget_probe()
        elif word in _ENDS:
            self.refuse_end(word)
        elif word in _HIDES or (";" in statement and _GOES_ON.search(statement)):
            self.refuse_if_shared()
            self.probe()
        elif word == "SET" or _sets_state(statement.lower()):
            self.refuse_if_shared()
            self.has_set_state = True

    def refuse_end(self, what: str) -> None:
        """Keep the call from ending its transaction: its completion could not be part of it.

        Raises:
            ImplicitCommitError: If the transaction is its own.
            LeavesGroup: If it is shared.
        """
        self.refuse_if_shared()
        message = (
            f"{what} would end the task's transaction before the task is completed in it. Leave "
            f"that to the consumer, or put it into a task with @task(atomic=False)."
        )
        raise ImplicitCommitError(message)

    def refuse_if_shared(self) -> None:
        """Keep the call from ending a transaction that it shares with others.

        Raises:
            LeavesGroup: If it does.
        """
        if self._is_shared:
            self.has_refused = True
            raise LeavesGroup

    def savepoint(self, *, is_first: bool) -> None:
        """Mark where the next of several calls in this transaction begins.

        Args:
            is_first: Whether the transaction has no such mark yet.
        """
        self._mark(is_first=is_first)
        self._is_shared, self.has_refused = True, False

    def _mark(self, *, is_first: bool) -> None:
        self._send(SAVEPOINT if is_first else f"RELEASE {SAVEPOINT}; {SAVEPOINT}")

    def rollback_to_savepoint(self) -> None:
        """Undo what was done since :meth:`savepoint`, which stays set."""
        self._send(f"ROLLBACK TO {SAVEPOINT}")
        self._ended = self._is_probed = False

    def mark_hook(self) -> bool:
        """Mark where the statements of a hook begin; return whether anything was before."""
        self._was_probed = self._is_probed
        self._send(HOOK_SAVEPOINT)
        return True

    def release_hook(self) -> None:
        """Keep what was done since :meth:`mark_hook`; fails if the transaction is no more."""
        self._send(f"RELEASE {HOOK_SAVEPOINT}")
        # The probe of a hook ends with its savepoint, which would not be there either.
        self._is_probed = self._was_probed

    def undo_hook(self) -> None:
        """Undo what was done since :meth:`mark_hook`."""
        self._send(f"ROLLBACK TO {HOOK_SAVEPOINT}")
        self.release_hook()

    def probe(self) -> None:
        """Get ready to notice whether what is sent next ends the transaction.

        A savepoint lives as long as its transaction.  One is set before statements that
        may hide a COMMIT (a procedure, a text of several statements), and looked for at
        the end of the call.
        """
        if not self._is_probed:
            self._is_probed = True
            self._send(_PROBE)

    def forget_probe(self) -> None:
        """Take note that a savepoint ends, and with it those set later: maybe the probe."""
        self._is_probed = False

    def _has_lost_probe(self) -> bool:
        if not self._is_probed:
            return False
        self._is_probed = False
        try:
            self._send(f"RELEASE {_PROBE}")
        except DatabaseError:
            return True
        return False

    def _send(self, statement: str) -> None:
        # On the driver's cursor: Django's would be taken for the call's own statement.
        with self.connection.wrap_database_errors, self.connection.connection.cursor() as cursor:
            cursor.execute(statement)

    def before_statement(self) -> None:
        """Prepare for the first statement of a call."""

    def is_touched(self) -> bool:
        """Whether the driver saw a statement since :meth:`begin`, by whatever way."""
        raise NotImplementedError

    def is_gone(self) -> bool:
        """Whether a touched transaction was ended behind Django's back."""
        raise NotImplementedError

    def commit(self) -> None:
        """Commit what the call did; the ``atomic`` block stays entered for the next call."""
        self._is_call = False
        with self.connection.wrap_database_errors:
            self.connection.connection.commit()

    def rollback(self) -> None:
        """Undo what the call did; the ``atomic`` block stays entered for the next call."""
        self._is_call = False
        with self.connection.wrap_database_errors:
            self.connection.connection.rollback()

    def interrupt(self) -> None:
        """End a running statement, from another thread, where the driver can."""

    def is_busy(self) -> bool:
        """Whether a statement runs at this moment; asked from another thread."""
        return False

    def cancel(self, consumer: int) -> None:
        """End a running statement of ``consumer`` through another connection to the server.

        Called from another thread; returns once the server has done it, or has not within
        ``CANCEL_SECONDS``.
        """

    def end(self) -> None:
        """Forget the call: what follows on the connection is not its doing."""
        self._is_call = False

    def break_off(self) -> None:
        """Free what the transaction of a call that cannot be interrupted holds here.

        Called from another thread, as the last thing before the process ends; the call
        must not be able to use the connection afterwards.
        """


def _sets_state(statement: str) -> bool:
    """Whether it sets what holds until the transaction ends, for whoever comes after it there."""
    return any(pattern.search(statement) for pattern in _SETS_STATE)
