"""What every database has to be able to do, and the answers most of them share.

:class:`Database` holds the statements that run once per task or more often; the ORM
does the rest.  :class:`Session` knows one connection's transaction: whether a call
touched it, and whether it is still there.  Vendors override only what differs.  This
package is the only home of vendor SQL: elsewhere ask a method or a flag, never
``connection.vendor``.

To add a database: subclass both, name them in ``databases/__init__.py``, and run
``tests/conformance`` against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple

from django.db import Error, InterfaceError, transaction

from firefly_jobs.attempts import Claim

TABLE = "firefly_jobs_taskmodel"
CLAIM_COLUMNS = (
    "id, fence, func_name, queue, priority, run_at, params, "
    "retry_attempts, max_retries, retry_delay, retry, rescues, lost_alone"
)


class Completion(NamedTuple):
    """The settling of a task that returned: what the batched statement needs."""

    id: int
    fence: int
    duration: float
    returned: str


class Problem(NamedTuple):
    """What a system check tells about one connection; ``id`` starts with E or W."""

    id: str
    message: str
    hint: str


class Session:
    """The state of the transaction on one connection, as far as the driver tells.

    A lane has one.  ``begin`` is called before each call, inside an entered ``atomic``
    block; ``before_statement`` at the call's first statement.
    """

    _is_call = False
    _ended = False
    _watched: Any = None

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
        self._ended = False
        self._is_call = True

    def watch(self, driver: Any) -> None:
        """Notice when a call ends the transaction itself, on the driver's connection."""
        driver.commit = self._ending(driver.commit)
        driver.rollback = self._ending(driver.rollback)

    def _ending(self, end: Callable[[], None]) -> Callable[[], None]:
        def watched() -> None:
            if self._is_call:
                self._ended = True
            end()

        return watched

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

    def end(self) -> None:
        """Forget the call: what follows on the connection is not its doing."""
        self._is_call = False

    def break_off(self) -> None:
        """Free what the transaction of a call that cannot be interrupted holds here.

        Called from another thread, as the last thing before the process ends; the call
        must not be able to use the connection afterwards.
        """


class Database:
    """The statements and capabilities of one kind of database."""

    session_class: ClassVar[type[Session]] = Session

    # Whether two consumers can claim from the same range at the same time.
    can_skip_locked: ClassVar[bool] = True
    # Whether dead entries at the front of the claim index cost every claim, so that
    # a low-water mark pays.
    needs_low_water_mark: ClassVar[bool] = False

    now: ClassVar[str] = ""

    def __init__(self) -> None:
        self.complete_sql = (
            f"UPDATE {TABLE} SET status = 'completed', completed = {self.now}, failed = NULL, "  # noqa: S608 - only our own names are formatted in
            f"duration = %s, returned = %s, error = '' "
            f"WHERE id = %s AND status = 'running' AND fence = %s"
        )

    # --- claiming

    def priorities(self, connection: Any, queue: str) -> list[int]:
        """Return the priorities that rows of ``queue`` wait at, highest first.

        Each is one look-up in the claim index, so a million rows at one priority cost
        as much as one; there are at most 201.
        """
        found: list[int] = []
        with connection.cursor() as cursor:
            while True:
                below = found[-1] if found else 32767
                cursor.execute(
                    f"SELECT MAX(priority) FROM {TABLE} "  # noqa: S608 - only our own names are formatted in
                    f"WHERE status = 'created' AND queue = %s AND priority < %s",
                    [queue, below],
                )
                (highest,) = cursor.fetchone()
                if highest is None:
                    return found
                found.append(highest)

    def queues(self, connection: Any) -> list[str]:
        """Return the queues that have waiting rows, by name; one index look-up each."""
        found: list[str] = []
        with connection.cursor() as cursor:
            while True:
                cursor.execute(
                    f"SELECT MIN(queue) FROM {TABLE} WHERE status = 'created' AND queue > %s",  # noqa: S608 - only our own names are formatted in
                    [found[-1] if found else ""],
                )
                (name,) = cursor.fetchone()
                if name is None:
                    return found
                found.append(name)

    def claim(
        self,
        connection: Any,
        *,
        queue: str,
        priority: int,
        limit: int,
        consumer: int,
        not_below: Any = None,
    ) -> list[Claim]:
        """Claim up to ``limit`` due rows of one queue and priority, in one transaction.

        Args:
            connection: Where; not inside a transaction.
            queue: The queue's name.
            priority: The one priority of the range.
            limit: How many at most.
            consumer: Who claims; its ``ConsumerModel`` id.
            not_below: The ``run_at`` of a claim; nothing is looked for that was due more than
                a second before it.  ``None``: look at everything.

        Returns:
            The claimed rows in order of ``run_at``, ``id``.
        """
        raise NotImplementedError

    # --- settling

    def complete(self, connection: Any, completion: Completion) -> bool:
        """Complete one row under its fence; return whether it was still held."""
        with connection.cursor() as cursor:
            cursor.execute(
                self.complete_sql,
                [completion.duration, completion.returned, completion.id, completion.fence],
            )
            return bool(cursor.rowcount == 1)

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete rows under their fences in one statement; return how many were held."""
        raise NotImplementedError

    def write_transaction(self, connection: Any) -> AbstractContextManager[Any]:
        """Return ``atomic`` for a transaction that is going to write."""
        atomic: AbstractContextManager[Any] = transaction.atomic(using=connection.alias)
        return atomic

    # --- errors

    conflict_codes: ClassVar[frozenset[Any]] = frozenset()
    connection_codes: ClassVar[frozenset[Any]] = frozenset()

    def error_code(self, error: BaseException) -> Any:
        """Return the vendor's code of a driver error, or ``None``."""
        raise NotImplementedError

    def is_conflict(self, error: BaseException) -> bool:
        """Whether ``error`` is about others: a deadlock, a serialization failure, a lock.

        What counts is the first driver error on the chain of explicit causes.
        """
        return self._first_code(error) in self.conflict_codes

    def is_lost(self, error: BaseException) -> bool:
        """Whether one of our own statements failed in a conflict, or with its connection."""
        if any(isinstance(cause, InterfaceError) for cause in causes(error)):
            return True
        return self._first_code(error) in self.conflict_codes | self.connection_codes

    def _first_code(self, error: BaseException) -> Any:
        codes = (self.error_code(cause) for cause in causes(error))
        return next((code for code in codes if code is not None), None)

    def is_usable(self, connection: Any) -> bool:
        """Whether the server still answers on ``connection``."""
        try:
            return connection.connection is not None and connection.is_usable()
        except Error:
            return False

    def prepare(self, connection: Any, consumer: int) -> None:
        """Set up a new connection that ``consumer`` keeps for long, whatever it is used for."""

    def prepare_dispatcher(self, connection: Any, consumer: int) -> None:
        """Set up a connection that must never wait for long: it answers signals and leases."""
        self.prepare(connection, consumer)

    def end_sessions(self, connection: Any, consumer: int) -> int:  # noqa: ARG002 - where possible
        """End the sessions of a dead consumer, where permitted; return how many."""
        return 0

    def is_busy(self, error: BaseException) -> bool:  # noqa: ARG002 - most databases queue writers
        """Whether ``error`` only says that another writer was faster."""
        return False

    # --- system checks

    def is_present(self, connection: Any) -> bool:  # noqa: ARG002 - a server always is
        """Whether there is a database to connect to, which connecting must not create."""
        return True

    def problems(self, connection: Any) -> list[Problem]:
        """Return what keeps this app from running well on ``connection``; asks the server."""
        if not self.can_skip_locked or connection.features.has_select_for_update_skip_locked:
            return []
        return [
            Problem(
                "E005",
                f"The server of database {connection.alias!r} has no SELECT ... FOR UPDATE SKIP "
                f"LOCKED, so consumers cannot claim tasks.",
                "Upgrade it to MariaDB 10.6 or MySQL 8.0.4 at least.",
            )
        ]


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and its explicit causes, at most 20."""
    current: BaseException | None = error
    for _ in range(20):
        if current is None:
            return
        yield current
        current = current.__cause__
