"""What every database has to be able to do, and the answers most of them share.

:class:`Database` holds the statements that run once per task or more often; the ORM
does the rest.  What is to know about one connection's transaction stands in ``sessions``.
Vendors override only what differs.  This package is the only home of vendor SQL:
elsewhere ask a method or a flag, never ``connection.vendor``.

To add a database: subclass it and :class:`Session`, name it in ``databases/__init__.py``,
and run ``tests/conformance`` against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

from django.db import Error, InterfaceError, transaction
from django.db.models.sql import Query

from firefly_jobs.attempts import Claim
from firefly_jobs.priorities import Band
from firefly_jobs.states import WORKFLOW_CANCELLED

from .completing import STEPS, TABLE, WORKFLOWS, Completing
from .functions import SecondsFromNow
from .notices import Channel, Notice, Subscription
from .sessions import Session

# Rows written by hand may have priorities that no option takes.
ALL_BANDS: tuple[Band, ...] = ((-32_768, 32_766),)
CLAIM_COLUMNS = (
    "id, fence, func_name, queue, priority, run_at, params, "
    "retry_attempts, max_retries, retry_delay, retry, rescues, lost_alone, "
    "time_limit, memory_limit, workflow_id, schedule_id"
)

# Whether a row has to be admitted once it is claimed.
IS_LIMITED = "COALESCE(concurrency_key, rate_key, limit_key) IS NOT NULL"

# Why a step is not to start, if its workflow stops; {} is the name of our table.
WITHDRAWN = (
    f"CASE WHEN workflow_id IS NULL THEN '' ELSE COALESCE((SELECT CASE "  # noqa: S608 - only our own names are formatted in
    f"WHEN w.is_cancelled THEN '{WORKFLOW_CANCELLED}' "
    f"WHEN s.is_cleanup THEN '' ELSE w.error END FROM {STEPS} s "
    f"JOIN {WORKFLOWS} w ON w.id = s.workflow_id AND w.status = 'running' "
    f"WHERE s.task_id = {{}}.id), '') END"
)

# How long the dispatcher waits for a lock: it answers signals and hands out work meanwhile.
DISPATCHER_LOCK_SECONDS = 1
# How long a server may take to end a statement on request.
CANCEL_SECONDS = 2
# Servers bound the length of a statement: MariaDB's max_allowed_packet is 16 MiB.
STATEMENT_BYTES_MAX = 4 * 1024 * 1024

# What a scheduler says about a new row; the rest of it is the same for all.
INSERT_COLUMNS = "func_name, queue, priority, not_before, params, retry_delay, max_retries, retry"
# And what few of them say: named in an INSERT only if one of its rows does.
EXTRA_COLUMNS = (
    "unique_key, active_key, expires_at, time_limit, memory_limit, "
    "label, description, metadata, tags, concurrency_key, max_concurrent, rate_key, rate_limit"
)
# Steps of workflows say these as well: some of them have to wait.
STEP_COLUMNS = "workflow_id, next_gate, status"
# And what a schedule has started.
SCHEDULE_COLUMNS = "schedule_id, occurrence, is_manual"
NEW_COLUMNS = "retry_attempts, fence, rescues, lost_alone, status"
NEW_VALUES = ("0", "0", "0", "0", "'created'")


def new_columns(columns: str) -> tuple[str, str]:
    """Return the columns of a new row that ``columns`` say nothing about, and their values."""
    if not columns.endswith(STEP_COLUMNS):
        return NEW_COLUMNS, ", ".join(NEW_VALUES)
    return NEW_COLUMNS.removesuffix(", status"), ", ".join(NEW_VALUES[:-1])


class Problem(NamedTuple):
    """What a system check tells about one connection; ``id`` starts with E or W."""

    id: str
    message: str
    hint: str


class Database(Completing):
    """The statements and capabilities of one kind of database."""

    session_class: ClassVar[type[Session]] = Session

    # Whether two consumers can claim from the same range at the same time.
    can_skip_locked: ClassVar[bool] = True
    # Whether dead entries at the front of the claim index cost every claim, so that
    # a low-water mark pays.
    needs_low_water_mark: ClassVar[bool] = False
    # Whether the highest priority can be found within the claim, where a round trip counts.
    can_claim_highest: ClassVar[bool] = False
    # Whether one session can tell another that rows are due.
    can_notify: ClassVar[bool] = False

    # The seconds from now until a moment, as a number; its column stands for {}.
    until: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        until = self.until.format("expires_at")
        self.claimed = f"{CLAIM_COLUMNS}, {IS_LIMITED}, {WITHDRAWN.format(TABLE)}, {until}"

    # --- scheduling

    # Rows per statement when many are written at once.
    insert_batch_size: ClassVar[int] = 1_000

    def insert(
        self, connection: Any, rows: Sequence[tuple[Any, ...]], *, columns: str = INSERT_COLUMNS
    ) -> list[int]:
        """Insert new rows with one statement and return their ids, in the same order.

        Args:
            connection: Where.
            rows: Values of ``columns``: what the database takes, moments as aware datetimes,
                or as ``SecondsFromNow``.
            columns: ``INSERT_COLUMNS``, with ``EXTRA_COLUMNS`` behind them if need be, and
                ``SCHEDULE_COLUMNS`` or ``STEP_COLUMNS`` behind those.
        """
        sql, values = self._insert_sql(connection, rows, columns)
        with connection.cursor() as cursor:
            cursor.execute(f"{sql}{self.returning_id(connection)}", values)
            return self.inserted_ids(connection, cursor, len(rows))

    def _insert_sql(
        self, connection: Any, rows: Sequence[tuple[Any, ...]], columns: str
    ) -> tuple[str, list[Any]]:
        adapt = connection.ops.adapt_datetimefield_value
        values = [
            adapt(value) if isinstance(value, datetime) else value for row in rows for value in row
        ]
        width = columns.count(",") + 1
        marks = ["%s"] * width
        more, fixed = new_columns(columns)
        one = f"({', '.join(marks)}, {fixed})"
        every = [one] * len(rows)
        if width > INSERT_COLUMNS.count(",") + 1:
            compiler = Query(None).get_compiler(connection=connection)
            for place, value in enumerate(values):
                if isinstance(value, SecondsFromNow):
                    sql, (values[place],) = compiler.compile(value)
                    row, column = divmod(place, width)
                    own = [*marks[:column], sql, *marks[column + 1 :]]
                    every[row] = f"({', '.join(own)}, {fixed})"
        sql = f"INSERT INTO {TABLE} ({columns}, {more}) VALUES {', '.join(every)}"  # noqa: S608 - only our own names are formatted in
        return sql, values

    def insert_unless_taken(
        self, connection: Any, rows: Sequence[tuple[Any, ...]], *, columns: str
    ) -> list[int | None]:
        """Insert rows whose keys differ; return their ids, ``None`` where a key was taken.

        Whoever else is about to take one of the keys is waited for.  A key that is taken is
        no error of the caller's transaction.

        Args:
            connection: Where.
            rows: As for :meth:`insert`.
            columns: As for :meth:`insert`, ``active_key`` among them.
        """
        sql, values = self._insert_sql(connection, rows, columns)
        place = columns.split(", ").index("active_key")
        with connection.cursor() as cursor:
            cursor.execute(f"{sql} ON CONFLICT DO NOTHING RETURNING active_key, id", values)
            ids = dict(cursor.fetchall())
        return [ids.get(row[place]) for row in rows]

    def holder(self, connection: Any, key: str) -> int | None:
        """Return the id of the row that has a key, though a snapshot may not show it."""
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT id FROM {TABLE} WHERE active_key = %s", [key])  # noqa: S608 - only our own names are formatted in
            row = cursor.fetchone()
        return None if row is None else int(row[0])

    def taken_keys(self, connection: Any, keys: Sequence[str]) -> set[str]:
        """Return which of some keys are taken, as far as that can be told without waiting.

        In a transaction of our own, which is READ COMMITTED.

        Raises:
            Error: A conflict, where somebody is about to take or to free one.
        """
        with connection.cursor() as cursor:
            cursor.execute(self._taken_sql(len(keys)), list(keys))
            return {key for (key,) in cursor.fetchall()}

    def wait_briefly(self, connection: Any) -> None:
        """Wait for locks only briefly in the open transaction, where they are waited for."""

    def _taken_sql(self, count: int) -> str:
        marks = ", ".join(["%s"] * count)
        return f"SELECT active_key FROM {TABLE} WHERE active_key IN ({marks})"  # noqa: S608 - only our own names are formatted in

    def returning_id(self, connection: Any) -> str:  # noqa: ARG002 - not everywhere
        """Return the clause that makes an INSERT tell the ids, if there is one."""
        return " RETURNING id"

    def inserted_ids(self, connection: Any, cursor: Any, count: int) -> list[int]:  # noqa: ARG002 - not everywhere
        """Return the ids of the rows just inserted."""
        return [pk for (pk,) in cursor.fetchall()]

    # --- claiming

    def priorities(
        self, connection: Any, queue: str, bands: Sequence[Band] = ALL_BANDS
    ) -> list[int]:
        """Return the priorities within ``bands`` that rows of ``queue`` wait at, highest first.

        Each is one look-up in the claim index, so a million rows at one priority cost
        as much as one, and those of other bands nothing; there are at most 201.
        """
        return [n for band in bands for n in self._priorities(connection, queue, *band)]

    def _priorities(self, connection: Any, queue: str, low: int, high: int) -> list[int]:
        found: list[int] = []
        with connection.cursor() as cursor:
            while True:
                below = found[-1] if found else high + 1
                cursor.execute(
                    f"SELECT MAX(priority) FROM {TABLE} "  # noqa: S608 - only our own names are formatted in
                    f"WHERE status = 'created' AND queue = %s AND priority < %s",
                    [queue, below],
                )
                (highest,) = cursor.fetchone()
                if highest is None or highest < low:
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
        priority: int | None,
        limit: int,
        consumer: int,
        not_below: Any = None,
    ) -> list[Claim]:
        """Claim up to ``limit`` due rows of one queue and priority, in one transaction.

        Args:
            connection: Where; not inside a transaction.
            queue: The queue's name.
            priority: The one priority of the range; ``None``, where ``can_claim_highest``, for
                the highest that any row of the queue waits at.
            limit: How many at most.
            consumer: Who claims; its ``ConsumerModel`` id.
            not_below: The ``run_at`` of a claim; nothing is looked for that was due more than
                a second before it.  ``None``: look at everything.

        Returns:
            The claimed rows in order of ``run_at``, ``id``.
        """
        raise NotImplementedError

    def seconds_until_due(self, connection: Any, queue: str, priority: int) -> float | None:
        """Return how long the first row of one range has to wait; ``None`` if there is none.

        Zero or less: one is due, but was not there, or was locked, when it was claimed.
        """
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT {self.until.format('run_at')} FROM {TABLE} WHERE status = 'created' "  # noqa: S608 - only our own names are formatted in
                f"AND queue = %s AND priority = %s ORDER BY run_at, id LIMIT 1",
                [queue, priority],
            )
            row = cursor.fetchone()
        return None if row is None else float(row[0])

    # --- waking up

    def notify(self, connection: Any, notices: Sequence[Notice]) -> None:
        """Tell listening sessions, in one statement; where ``can_notify``."""
        raise NotImplementedError

    def listen(self, connection: Any, channels: Sequence[Channel]) -> Subscription | None:  # noqa: ARG002 - where possible
        """Hear on ``connection`` what others announce; ``None`` if it cannot be heard there."""
        return None

    def data_version(self, connection: Any) -> int | None:  # noqa: ARG002 - where possible
        """Return a number that changes when another connection commits; ``None`` if unknown.

        Asked hundreds of times a second, so it must cost microseconds.
        """
        return None

    # --- transactions

    def write_transaction(self, connection: Any) -> AbstractContextManager[Any]:
        """Return ``atomic`` for a transaction that is going to write."""
        atomic: AbstractContextManager[Any] = transaction.atomic(using=connection.alias)
        return atomic

    def own_transaction(self, connection: Any) -> AbstractContextManager[Any]:
        """Return :meth:`write_transaction`, isolated as READ COMMITTED if it is the outermost.

        Each statement sees what others have committed, above all who held a lock before,
        however the project's transactions are isolated.
        """
        return self.write_transaction(connection)

    # --- errors

    conflict_codes: ClassVar[frozenset[Any]] = frozenset()
    deadlock_code: ClassVar[Any] = None
    connection_codes: ClassVar[frozenset[Any]] = frozenset()

    def error_code(self, error: BaseException) -> Any:
        """Return the vendor's code of a driver error, or ``None``."""
        raise NotImplementedError

    def is_conflict(self, error: BaseException) -> bool:
        """Whether ``error`` is about others: a deadlock, a serialization failure, a lock.

        What counts is the first driver error on the chain of explicit causes.
        """
        return self._first_code(error) in self.conflict_codes

    def is_deadlock(self, error: BaseException) -> bool:
        """Whether ``error`` is about others as well, and nobody has waited for long."""
        code = self._first_code(error)
        return code is not None and code == self.deadlock_code

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

    def leave_pool(self, connection: Any) -> None:
        """Make connections to this alias the threads' own from now on, not those of a pool.

        A consumer keeps its connections; several threads that each keep one would soon
        wait for each other at a pool, the heartbeat among them.
        """

    def unpooled_copy(self, connection: Any) -> Any:
        """Return a connection to the same database that is nobody else's, and not a pool's."""
        return connection.copy()

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
