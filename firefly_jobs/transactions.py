"""The transaction of one call: entered before it, begun by its first statement.

To the call it is ``transaction.atomic()``: ``in_atomic_block`` is true, savepoints,
``on_commit`` and ``select_for_update`` work.  To the database it is nothing until the
call's first statement, so a task that sleeps or talks to a web service holds no
transaction and no lock.  An untouched transaction is handed to the next call instead of
being ended and begun again; a touched one is committed on the driver, which leaves
``atomic`` entered.  That spares every call what entering and leaving costs: two
statements on MySQL, some 20 µs of Python elsewhere.

A call is *touched* if a statement passed Django's cursor on any alias, if it registered
``on_commit``, or if the driver says so (COPY, ``callproc`` and bare driver cursors pass
no wrapper).  Touched calls are settled in their own transaction; see ``lifecycle``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db import Error, connections, transaction

from . import databases
from .checkpoints import reach
from .exceptions import CommitUncertain, LeavesGroup, TransactionDoomedError
from .wakeup import Announcement

logger = logging.getLogger("firefly_jobs")


class CallTransaction:
    """The transactions of the calls on one thread, one after the other.

    Make it on the thread that runs the calls: connections belong to threads.

    Args:
        using: Alias of the tasks' database.
        owner: Returns the id of the consumer that this thread works for; another answer
            than before means that the former one was rescued, sessions and all.
    """

    def __init__(self, using: str, *, owner: Callable[[], int]) -> None:
        self.using = using
        self._owner = owner
        self._prepared_for = 0
        self.database = databases.of(using)
        self._connection: Any = None
        self._prepared: Any = None
        self._block: Any = None
        self._is_call = self._is_lost = False
        self._seen = False
        self._seen_elsewhere = False
        self._is_ready = False
        self._has_effects = self._has_savepoint = False
        self._is_torn = False
        # A savepoint is due before a hook's first statement; it has been set.
        self._hook_waits = self._has_hook_mark = False
        self._is_hooked = False
        self._callbacks_before = self._hook_callbacks_before = 0
        self._use_connection()
        # This thread's own, remembered because asking Django for them costs each call 3 us.
        self._others: list[Any] = []
        for alias in connections:
            if alias != using:
                # An alias that cannot be used at all cannot be touched either.
                with suppress(ImproperlyConfigured):
                    self._others.append(self._watched(alias))

    def _watched(self, alias: str) -> Any:
        connection = connections[alias]
        connection.execute_wrappers.append(self._observe_elsewhere)
        return connection

    def _use_connection(self) -> None:
        self._connection = connections[self.using]
        self._connection.execute_wrappers.append(self._observe)
        self._session = self.database.session_class(self._connection)
        self._block = None

    # --- the call's steps

    def begin(self, *, atomic: bool) -> None:
        """Get ready for a call; with ``atomic`` inside an entered, unbegun transaction."""
        self._is_call = self._is_lost = False
        is_torn, self._is_torn = self._is_torn, False
        if is_torn or (self._prepared is not None and self._prepared_for != self._owner()):
            self.abandon()
        if self._connection.savepoint_ids or len(self._connection.atomic_blocks) > 1:
            # The last call entered a block that it never left.
            self.abandon()
        self._abandon_what_was_left_open()
        self._tidy_other_aliases(are_torn=is_torn)
        if not atomic:
            self.leave()
        elif self._block is None:
            self._enter()
        self._connection.run_on_commit = []
        self._connection.needs_rollback = False
        if atomic:
            self._session.begin()
        self._seen = self._seen_elsewhere = self._is_ready = False
        self._has_effects = self._has_savepoint = False
        self._callbacks_before = self._hook_callbacks_before = 0
        self._is_hooked = self._hook_waits = self._has_hook_mark = False
        self._is_call = atomic

    @property
    def is_touched(self) -> bool:
        """Whether the call's outcome must be settled in its own transaction."""
        return (
            self._seen
            or self._seen_elsewhere
            or len(self._connection.run_on_commit) > self._callbacks_before
            or self._connection.needs_rollback
            or (self._is_call and self._session.is_touched())
        )

    @property
    def is_touched_elsewhere(self) -> bool:
        """Whether the call has sent a statement on another alias."""
        return self._seen_elsewhere

    def commit(self, settle: Callable[[], None]) -> None:
        """Settle and commit; then run the call's ``on_commit`` callbacks.

        Args:
            settle: Writes the outcome inside the transaction; what it raises propagates.

        Raises:
            TransactionDoomedError: If the effects are gone already, or marked to go.
            CommitUncertain: If the connection broke and the server may have committed.
        """
        self.refuse_if_doomed()
        settle()
        callbacks = self._connection.run_on_commit
        self._connection.run_on_commit = []
        try:
            self._session.commit()
        except Error as error:
            if self.database.is_lost(error) and not self.database.is_usable(self._connection):
                raise CommitUncertain(callbacks) from error
            raise
        self._is_call = False
        reach("settled")
        # Announcements hand over a name and send nothing, so the block need not be left.
        if any(not isinstance(callback, Announcement) for _, callback, _ in callbacks):
            self.leave()
        run_callbacks(callbacks)

    @property
    def has_set_state(self) -> bool:
        """Whether the call set what would hold for others in its transaction as well."""
        return self._session.has_set_state

    @property
    def has_refused(self) -> bool:
        """Whether the call was kept from ending a transaction that it shares with others."""
        return self._session.has_refused

    def refuse_if_doomed(self) -> None:
        """Raise ``TransactionDoomedError`` if the call's effects are gone, or marked to go."""
        if self._session.has_refused:
            raise LeavesGroup
        if self._connection.closed_in_transaction:
            message = "The task closed its own database connection, so its effects are gone."
            raise TransactionDoomedError(message)
        if self._connection.needs_rollback:
            message = (
                "The task returned, but its transaction was marked for rollback: by "
                "set_rollback(True), or by a database error that was caught outside of an inner "
                "atomic(). Catch database errors around 'with transaction.atomic():'."
            )
            raise TransactionDoomedError(message)
        is_gone = (self._seen or self._session.is_touched()) and self._session.is_gone()
        if is_gone:
            message = (
                "The task returned, but the database had already rolled back its transaction, or "
                "the task had ended it, so its effects are gone. A deadlock does that, even if "
                "the error is caught: let it pass, and the task runs again."
            )
            raise TransactionDoomedError(message)

    def rollback(self) -> bool:
        """Undo what the call did; return whether the connection was still usable.

        Asked again before the next call begins, it answers the same.  One that
        :meth:`interrupt` has torn is no fault of the server's, and counts as usable.
        """
        was_call, self._is_call = self._is_call, False
        if self._is_lost:
            return False
        if not was_call:
            self.drop_what_is_open()
            if self._connection.errors_occurred and not self.database.is_usable(self._connection):
                self.abandon()
                self._is_lost = not self._is_torn
                return self._is_torn
            return True
        try:
            if self._connection.closed_in_transaction:
                # By the task itself, so nothing is wrong with the server.
                self.abandon()
            else:
                self._session.rollback()
        except Error:
            self.abandon()
            self._is_lost = not self._is_torn
            return self._is_torn
        return True

    def drop_what_is_open(self) -> None:
        """Undo what nobody will commit: transactions that were begun by hand and left open.

        The next call would find them; until it comes, they would keep others waiting.
        """
        self._abandon_what_was_left_open()
        if self._seen_elsewhere:
            self._tidy_other_aliases(are_torn=False)

    # --- hooks: what one did can be undone without the rest

    def begin_hook(self) -> None:
        """Get ready for a hook; nothing is sent before its first statement."""
        self._is_hooked = self._hook_waits = True
        self._has_hook_mark = False
        self._hook_callbacks_before = len(self._connection.run_on_commit)

    def end_hook(self) -> None:
        """Keep what the hook did.

        Raises:
            TransactionDoomedError: If it left the transaction marked for rollback.
            Error: If the database did: by an error that the hook has caught.
        """
        if self._connection.closed_in_transaction:
            message = "The hook closed its call's database connection, so their effects are gone."
            raise TransactionDoomedError(message)
        # Where no savepoint was needed, there is none whose release would tell.
        is_gone = not self._has_hook_mark and self._seen and self._session.is_gone()
        if self._connection.needs_rollback or is_gone:
            message = (
                "The hook returned, but its transaction was marked for rollback: by "
                "set_rollback(True), or by a database error that was caught outside of an inner "
                "atomic(). Catch database errors around 'with transaction.atomic():'."
            )
            raise TransactionDoomedError(message)
        self._is_hooked = self._hook_waits = False
        if self._has_hook_mark:
            self._session.release_hook()
            self._has_hook_mark = False

    def undo_hook(self) -> bool:
        """Undo what the hook did; return whether what the call did is still there."""
        connection = self._connection
        has_mark, was_hooked = self._has_hook_mark, self._is_hooked
        self._is_hooked = self._has_hook_mark = self._hook_waits = False
        if connection.closed_in_transaction or connection.savepoint_ids:
            return False
        try:
            if has_mark:
                self._session.undo_hook()
            elif not was_hooked and self.is_touched and not self._start_over():
                # It began together with the transaction, which has nothing else in it.
                return False
        except Error:
            return False
        connection.needs_rollback = False
        connection.run_on_commit = connection.run_on_commit[: self._hook_callbacks_before]
        return True

    def _start_over(self) -> bool:
        """Undo all that was done here, and go on with the call; return whether that worked."""
        callbacks, before = self._connection.run_on_commit, self._callbacks_before
        was_elsewhere, hooked_at = self._seen_elsewhere, self._hook_callbacks_before
        if not self.rollback():
            return False
        self.begin(atomic=True)
        self._connection.run_on_commit, self._callbacks_before = callbacks, before
        self._seen_elsewhere, self._hook_callbacks_before = was_elsewhere, hooked_at
        return True

    # --- several calls in one transaction

    def begin_member(self) -> None:
        """Get ready for a call that shares the transaction with those before it.

        What they did is kept by a savepoint.  It is set before the call, not at its first
        statement as :meth:`begin` would have it, because the statements of a raw cursor
        are not seen, and must be undone with the rest.
        """
        self._has_effects = self._has_effects or self.is_touched
        # What the one before has left open elsewhere would swallow what this one does there.
        self._tidy_other_aliases(are_torn=False)
        self._seen = self._seen_elsewhere = False
        self._callbacks_before = len(self._connection.run_on_commit)
        if self._has_effects:
            self._session.savepoint(is_first=not self._has_savepoint)
            self._has_savepoint = True

    def rollback_member(self) -> bool:
        """Undo the last call only; return whether that was possible."""
        connection = self._connection
        if not self._has_effects:
            # Nobody else's effects are in the transaction, so it ends, and another begins.
            try:
                if self.rollback():
                    self.begin(atomic=True)
                    return True
            except Error:
                logger.debug("The transaction of a group could not begin again", exc_info=True)
            return False
        if connection.closed_in_transaction or connection.savepoint_ids:
            return False
        try:
            self._session.rollback_to_savepoint()
        except Error:
            return False
        connection.needs_rollback = False
        connection.run_on_commit = connection.run_on_commit[: self._callbacks_before]
        return True

    # --- the block around them

    def _enter(self) -> None:
        connection = self._connection
        if connection.connection is not None and connection.errors_occurred:
            if not self.database.is_usable(connection):
                connection.close()
            connection.errors_occurred = False
        connection.ensure_connection()
        if connection.connection is not self._prepared:
            # A lane keeps its connection; CONN_MAX_AGE is about requests.
            connection.close_at = None
            self._prepared_for = self._owner()
            self.database.prepare(connection, self._prepared_for)
            self._prepared = connection.connection
        block = transaction.atomic(using=self.using)
        with self._session.opening():
            block.__enter__()
        self._block = block

    def leave(self) -> None:
        """End an untouched transaction, so that the connection is in autocommit mode."""
        self._is_call = False
        self._session.end()
        if self._block is None:
            return
        block, self._block = self._block, None
        self._connection.run_on_commit = []
        self._connection.needs_rollback = False
        try:
            block.__exit__(None, None, None)
        except Error:
            self.abandon()

    def _tidy_other_aliases(self, *, are_torn: bool) -> None:
        """Drop connections that the last call broke, or left a transaction open on."""
        for place, connection in enumerate(self._others):
            is_open = connection.in_atomic_block or (
                connection.connection is not None
                and connection.autocommit != connection.settings_dict["AUTOCOMMIT"]
            )
            if is_open or are_torn:
                with suppress(Error):
                    connection.close()
                del connections[connection.alias]
                self._others[place] = self._watched(connection.alias)
            elif connection.errors_occurred:
                connection.close_if_unusable_or_obsolete()

    def _abandon_what_was_left_open(self) -> None:
        """Drop a transaction that is not ours: a call without one had begun its own."""
        connection = self._connection
        is_ours = self._block is not None or connection.connection is None
        if not is_ours and (connection.in_atomic_block or not connection.autocommit):
            self.abandon()

    def abandon(self) -> None:
        """Drop the connection in whatever state it is, and start over with a new one."""
        self._is_call = False
        try:
            self._connection.close()
        except Error:
            logger.debug("Closing a broken connection failed", exc_info=True)
        del connections[self.using]
        self._prepared = None
        self._use_connection()

    def interruption(self, *, may_connect: bool = False) -> Callable[[], None]:
        """Return what ends the statement that runs now, where driver or server can.

        Called from another thread, as what is returned.  An exception is raised inside the
        call meanwhile, maybe in the midst of the driver's work, and a server may be slow to
        act: so the next call gets a connection of its own.

        Args:
            may_connect: Whether to ask the server through another connection, which may
                take a moment.  It is not asked if nothing runs: what it hit then would be the
                queries with which the call cleans up.
        """
        self._is_torn = True
        session, consumer = self._session, self._prepared_for
        is_busy = False
        # The lane may drop its connection at the same moment.
        with suppress(AttributeError, Error):
            is_busy = may_connect and session.is_busy()

        def end() -> None:
            with suppress(AttributeError, Error):
                session.interrupt()
                if is_busy:
                    session.cancel(consumer)

        return end

    def break_off(self) -> None:
        """From another thread: free what a call that cannot be interrupted holds."""
        with suppress(AttributeError, Error):
            self._session.break_off()

    def close(self) -> None:
        """End what is open and close every connection of this thread."""
        if self._is_call:
            self.abandon()
        self.leave()
        connections.close_all()

    # --- watching

    def _observe(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        self._seen = True
        if self._is_call:
            if not self._is_ready:
                self._session.before_statement()
                self._is_ready = True
            if self._hook_waits:
                self._hook_waits = False
                self._has_hook_mark = self._session.mark_hook()
                self._is_hooked = self._has_hook_mark
            if isinstance(sql, str):
                self._session.observe(sql)
        return execute(sql, params, many, context)

    def _observe_elsewhere(
        self, execute: Callable[..., Any], sql: Any, params: Any, many: bool, context: Any
    ) -> Any:
        self._seen_elsewhere = True
        return execute(sql, params, many, context)


def run_callbacks(callbacks: list[Any]) -> None:
    """Run what a committed call had registered with ``on_commit``, one by one.

    Args:
        callbacks: Entries of Django's ``connection.run_on_commit``.
    """
    for _, callback, _ in callbacks:
        try:
            callback()
        except BaseException:
            # User code, after the commit: nothing that it raises may change the outcome
            # or keep the next callback from running.
            logger.exception("An on_commit callback of a task raised; its outcome stands")
