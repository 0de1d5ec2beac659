"""PostgreSQL, with psycopg 3."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from django.core.exceptions import ImproperlyConfigured
from django.db.backends.postgresql.psycopg_any import IsolationLevel, is_psycopg3

from firefly_jobs.attempts import Claim

from .base import (
    CANCEL_SECONDS,
    CLAIM_COLUMNS,
    DISPATCHER_LOCK_SECONDS,
    INSERT_COLUMNS,
    IS_LIMITED,
    WITHDRAWN,
    Database,
    new_columns,
)
from .completing import COUNTED, GATES, TABLE, Completion, Counted
from .functions import SecondsFromNow, isolation_sql
from .notices import Channel, Notice, Subscription
from .sessions import Session

if is_psycopg3:
    from psycopg.errors import error_from_result
    from psycopg.pq import ExecStatus

_IDLE, _ACTIVE, _IN_ERROR = 0, 1, 3  # libpq's PGTransactionStatusType
_KEEPALIVE_SECONDS = 30
_COPY_FROM = 1_000
_MARK_MARGIN = "INTERVAL '1 second'"
# Tells our table from that of the same name in another schema.
_TABLE_ID = f"'{TABLE}'::regclass::oid"
_HIGHEST_PRIORITY = f"(SELECT MAX(priority) FROM {TABLE} WHERE status = 'created' AND queue = %s)"  # noqa: S608 - only our own names are formatted in
# As the server is told in prepare(), for the direction that it cannot see.
_KEEPALIVE_OPTIONS = {
    "TCP_KEEPIDLE": _KEEPALIVE_SECONDS,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 60_000,
}

# How long the one who fires schedules waits for each unique key.
_BRIEF_LOCK_MILLISECONDS = 20


class PostgreSQLSession(Session):
    """The driver sends BEGIN with the first statement and knows libpq's transaction status.

    It does not know whose transaction that is: after a COMMIT by the call it sends the next
    BEGIN as well.  So the statements of its cursors are looked at, Django's among them.
    """

    def watch(self, driver: Any) -> None:
        """Look at all statements, and let the driver's own blocks find a transaction."""
        super().watch(driver)
        factory, transaction = driver.cursor_factory, driver.transaction
        sends = ("execute", "executemany", "stream")
        watched = {name: self._looking(getattr(factory, name)) for name in sends}
        driver.cursor_factory = type(factory.__name__, (factory,), watched)

        @contextmanager
        def block(*args: Any, **options: Any) -> Iterator[Any]:
            if self._is_call:
                # Within a transaction it sets a savepoint; without one it would commit.
                self._begin()
            try:
                with transaction(*args, **options) as entered:
                    yield entered
            finally:
                self.forget_probe()

        driver.transaction = block

    def _looking(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def look_and_send(cursor: Any, query: Any, *args: Any, **options: Any) -> Any:
            if self._is_call:
                self.look_at(_text(query, cursor))
            return send(cursor, query, *args, **options)

        return look_and_send

    def observe(self, statement: str) -> None:
        """Do nothing: the cursor looks at every statement."""

    def _status(self) -> int:
        return int(self.connection.connection.pgconn.transaction_status)

    def _send(self, statement: str) -> None:
        # Straight to libpq: a cursor costs as much as the round trip.
        with self.connection.wrap_database_errors:
            result = self.connection.connection.pgconn.exec_(statement.encode())
            if result.status != ExecStatus.COMMAND_OK:
                raise error_from_result(result)

    def mark_hook(self) -> bool:
        """Set no savepoint before the BEGIN, which the driver sends with a statement."""
        return self._status() != _IDLE and super().mark_hook()

    def probe(self) -> None:
        """Begin first, as the driver would with the statement that is about to be sent."""
        self._begin()
        super().probe()

    def _begin(self) -> None:
        if self._status() == _IDLE:
            with (
                self.connection.wrap_database_errors,
                self.connection.connection.cursor() as cursor,
            ):
                cursor.execute("SELECT 1")

    def is_touched(self) -> bool:
        """Whether the driver has left the idle state, or did so before the call ended it.

        A call that shares its transaction found it begun: idle is what it left behind.
        """
        return self._ended or self._is_shared or self._status() != _IDLE

    def is_busy(self) -> bool:
        """Whether the server has not answered yet."""
        return self._status() == _ACTIVE

    def cancel(self, consumer: int) -> None:  # noqa: ARG002 - the request carries the session's own key
        """Send a cancel request; a pooler passes it on to the session that it is about."""
        with self.connection.wrap_database_errors:
            self.connection.connection.cancel_safe(timeout=CANCEL_SECONDS)

    def is_gone(self) -> bool:
        """Whether the call ended it, it is idle again, or a swallowed error has doomed it."""
        return self._ended or self._status() in {_IDLE, _IN_ERROR} or self._has_lost_probe()


def _text(query: Any, cursor: Any) -> str:
    """Return what psycopg is asked to send, in whatever form."""
    if isinstance(query, bytes):
        return query.decode(errors="replace")
    return str(query.as_string(cursor)) if hasattr(query, "as_string") else str(query)


class PostgreSQLSubscription(Subscription):
    """LISTEN, with what the driver offers for reading notifications without waiting."""

    def __init__(self, connection: Any, channels: Sequence[Channel]) -> None:
        self._connection = connection
        self._channels = channels
        self._driver = connection.connection
        self._heard: set[Notice] = set()
        # Notifications that arrive together with the answer to a statement.
        self._driver.add_notify_handler(self._hear)
        _keep_alive(self.fileno())

    def _hear(self, notification: Any) -> None:
        self._heard.add(Notice(Channel(notification.channel), notification.payload))

    def fileno(self) -> int:
        """Return the descriptor of libpq's socket."""
        return int(self._driver.fileno())

    def receive(self) -> set[Notice]:
        """Read what has arrived."""
        with self._connection.wrap_database_errors:
            self._driver.pgconn.consume_input()
            while notification := self._driver.pgconn.notifies():
                channel = Channel(notification.relname.decode())
                self._heard.add(Notice(channel, notification.extra.decode()))
        heard, self._heard = self._heard, set()
        return heard

    def check(self) -> None:
        """Run the cheapest statement."""
        with self._connection.cursor() as cursor:
            cursor.execute("SELECT 1")

    def close(self) -> None:
        """Leave the channels: a pool in this process may hand the connection to others."""
        self._driver.remove_notify_handler(self._hear)
        with self._connection.cursor() as cursor:
            cursor.execute("; ".join(f"UNLISTEN {channel}" for channel in self._channels))


def _keep_alive(descriptor: int) -> None:
    """Let the client's side notice a dead connection, too, although it only reads."""
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        if duplicate.family not in {socket.AF_INET, socket.AF_INET6}:
            return
        duplicate.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE_OPTIONS.items():
            # Not every platform has all of them.
            if hasattr(socket, name):
                duplicate.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class PostgreSQL(Database):
    """One statement claims, one statement settles."""

    session_class = PostgreSQLSession
    needs_low_water_mark = True

    can_notify = True
    can_claim_highest = True
    now = "STATEMENT_TIMESTAMP()"
    until = "EXTRACT(EPOCH FROM {} - STATEMENT_TIMESTAMP())::float8"

    # serialization failure, deadlock, lock not available
    conflict_codes: ClassVar[frozenset[Any]] = frozenset({"40001", "40P01", "55P03"})
    deadlock_code = "40P01"
    # what a restart or a broken connection looks like: class 08, 57P0x, and no code at all
    connection_codes: ClassVar[frozenset[Any]] = frozenset(
        {"57P01", "57P02", "57P03", "57P05", "25P03", "no connection"}
        | {"08000", "08001", "08003", "08004", "08006", "08007"}
    )

    def __init__(self) -> None:
        if not is_psycopg3:
            message = (
                "firefly_jobs needs psycopg 3 on PostgreSQL; the connections of psycopg2 cannot be "
                "watched. Install it: pip install 'django-firefly-jobs[postgresql]'."
            )
            raise ImproperlyConfigured(message)
        super().__init__()

    def _priorities(self, connection: Any, queue: str, low: int, high: int) -> list[int]:
        """Look them up one after the other as everywhere, but in one statement."""
        # What a woken consumer asks first, so a round trip less is heard.  Loose index
        # scan: https://wiki.postgresql.org/wiki/Loose_indexscan
        highest = (
            f"SELECT MAX(priority) AS priority FROM {TABLE} "  # noqa: S608 - only our own names are formatted in
            f"WHERE status = 'created' AND queue = %s AND priority"
        )
        sql = (
            f"WITH RECURSIVE found AS ({highest} <= %s UNION ALL "  # noqa: S608 - only our own names are formatted in
            f"SELECT ({highest} < found.priority) FROM found WHERE found.priority >= %s) "
            f"SELECT priority FROM found WHERE priority >= %s ORDER BY priority DESC"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, [queue, high, queue, low, low])
            return [priority for (priority,) in cursor.fetchall()]

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
        """Claim with one UPDATE … RETURNING."""
        # ARRAY(SELECT …) is evaluated once; with IN (SELECT …) the planner may run the
        # locking subquery again per row and take more than LIMIT.
        # run_at is only compared, and parsing it as a datetime would be an eighth of what
        # a task costs; so it comes as seconds since the epoch.
        columns = ", ".join(f"t.{column}" for column in CLAIM_COLUMNS.split(", ")).replace(
            "t.run_at", "EXTRACT(EPOCH FROM t.run_at)::float8"
        )
        until = self.until.format("t.expires_at")
        returning = f"{columns}, {IS_LIMITED}, {WITHDRAWN.format('t')}, {until}"
        mark = "" if not_below is None else f"AND run_at >= to_timestamp(%s) - {_MARK_MARGIN} "
        at = "%s" if priority is not None else _HIGHEST_PRIORITY
        sql = (
            f"UPDATE {TABLE} t SET status = 'running', fence = t.fence + 1, consumer = %s, "  # noqa: S608 - only our own names are formatted in
            f"started = STATEMENT_TIMESTAMP() WHERE t.id = ANY(ARRAY("
            f"SELECT id FROM {TABLE} WHERE status = 'created' AND queue = %s AND priority = {at} "
            f"AND run_at <= STATEMENT_TIMESTAMP() {mark}"
            f"ORDER BY run_at, id LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING {returning}"
        )
        marks = [] if not_below is None else [not_below]
        with connection.cursor() as cursor:
            # The highest is looked for within the same queue.
            wanted = queue if priority is None else priority
            cursor.execute(sql, [consumer, queue, wanted, *marks, limit])
            claims = [Claim._make(row) for row in cursor.fetchall()]
        claims.sort(key=lambda claim: (claim.run_at, claim.id))
        return claims

    # COPY takes any number of rows; this bounds what is held in memory.
    insert_batch_size: ClassVar[int] = 10_000

    def insert(
        self, connection: Any, rows: Sequence[tuple[Any, ...]], *, columns: str = INSERT_COLUMNS
    ) -> list[int]:
        """Insert with COPY, where rows are many."""
        if len(rows) <= _COPY_FROM:
            return super().insert(connection, rows, columns=columns)
        if any(isinstance(value, SecondsFromNow) for row in rows for value in row):
            # COPY takes values only.
            first, rest = rows[:_COPY_FROM], rows[_COPY_FROM:]
            return [
                *self.insert(connection, first, columns=columns),
                *self.insert(connection, rest, columns=columns),
            ]
        with connection.cursor() as cursor:
            # COPY cannot tell the ids, so they are drawn beforehand.
            cursor.execute(
                "SELECT nextval(pg_get_serial_sequence(%s, 'id')) FROM generate_series(1, %s)",
                [TABLE, len(rows)],
            )
            ids = [pk for (pk,) in cursor.fetchall()]
            more, _ = new_columns(columns)
            fixed = (0, 0, 0, 0, "created")[: more.count(",") + 1]
            with cursor.copy(f"COPY {TABLE} (id, {columns}, {more}) FROM STDIN") as copy:
                for pk, row in zip(ids, rows, strict=True):
                    copy.write_row((pk, *row, *fixed))
        return ids

    def notify(self, connection: Any, notices: Sequence[Notice]) -> None:
        """Send all notifications in one statement."""
        # It writes nothing else, so its commit does not wait for the disk.
        with connection.cursor() as cursor:
            calls = ", ".join(["pg_notify(%s, %s)"] * len(notices))
            cursor.execute(
                f"SELECT {calls}",
                [word for notice in notices for word in (notice.channel.value, notice.text)],
            )

    def listen(self, connection: Any, channels: Sequence[Channel]) -> Subscription | None:
        """LISTEN, unless the session is a pooler's and another would get what we asked for."""
        if not self._is_own_session(connection):
            return None
        with connection.cursor() as cursor:
            cursor.execute("; ".join(f"LISTEN {channel}" for channel in channels))
        return PostgreSQLSubscription(connection, channels)

    def _is_own_session(self, connection: Any) -> bool:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return bool(cursor.fetchone()[0] == _told_pid(connection))

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete with one UPDATE joined to the outcomes, which travel as one JSON text."""
        # Arrays for unnest() would be the obvious way; psycopg quotes them element by
        # element, which costs four times the Python of one json.dumps.
        # A plain status = 'running' would let the planner scan the index of running rows,
        # dead entries and all, in place of the primary key.
        sql = (
            f"UPDATE {TABLE} t SET status = 'completed', completed = STATEMENT_TIMESTAMP(), "  # noqa: S608 - only our own names are formatted in
            f"failed = NULL, duration = o.duration, returned = o.returned, error = '', "
            f"active_key = NULL, limit_key = NULL "
            f"FROM (SELECT (e->>0)::bigint AS id, (e->>1)::int AS fence, "
            f"(e->>2)::float8 AS duration, e->>3 AS returned "
            f"FROM json_array_elements(%s::json) e) o "
            f"WHERE t.id = o.id AND t.status || '' = 'running' AND t.fence = o.fence"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, [json.dumps(completions)])
            return int(cursor.rowcount)

    def complete_step(self, connection: Any, completion: Completion) -> tuple[bool, Counted | None]:
        """Complete and count off with one statement."""
        # The row is changed, and locked, before its gate: what is asked of the gate is what the
        # change returns.
        counted = ", ".join(f"counted.{column}" for column in COUNTED.split(", "))
        sql = (
            f"WITH done AS ({self.complete_sql} RETURNING next_gate), counted AS ("  # noqa: S608 - only our own names are formatted in
            f"UPDATE {GATES} SET waiting_for = waiting_for - 1 "
            f"WHERE id = (SELECT next_gate FROM done) "
            f"AND {isolation_sql(connection)} = 'read-committed' RETURNING {COUNTED}) "
            f"SELECT {counted} FROM done LEFT JOIN counted ON TRUE"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, completion.values)
            row = cursor.fetchone()
        return row is not None, Counted.of(row)

    @contextmanager
    def own_transaction(self, connection: Any) -> Iterator[None]:
        """Isolate it as READ COMMITTED: other snapshots are older than the first lock."""
        connection.ensure_connection()
        is_first = not connection.in_atomic_block
        with self.write_transaction(connection):
            if is_first and connection.isolation_level != IsolationLevel.READ_COMMITTED:
                with connection.cursor() as cursor:
                    cursor.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
            yield

    def leave_pool(self, connection: Any) -> None:
        """Close Django's connection pool, and take it out of the connection's settings."""
        if connection.settings_dict["OPTIONS"].get("pool"):
            # In this order: each step asks the settings which pool it is about.
            connection.close()
            connection.close_pool()
            del connection.settings_dict["OPTIONS"]["pool"]

    def unpooled_copy(self, connection: Any) -> Any:
        """Leave the pool itself as it is: others in this process use it."""
        copy = super().unpooled_copy(connection)
        copy.settings_dict["OPTIONS"].pop("pool", None)
        return copy

    def error_code(self, error: BaseException) -> Any:
        """Return the SQLSTATE; "no connection" where the driver lost the server."""
        if type(error).__module__.partition(".")[0] != "psycopg":
            return None
        code = getattr(error, "sqlstate", None)
        # An OperationalError without SQLSTATE was raised by libpq itself: the server
        # closed the connection, or could not be reached.
        is_libpq = any(cls.__name__ == "OperationalError" for cls in type(error).__mro__)
        return code or ("no connection" if is_libpq else "")

    def prepare(self, connection: Any, consumer: int) -> None:
        """Ask the server to notice a vanished machine, and mark the session as ours.

        The mark is a shared advisory lock on the consumer's id, so that a rescuer finds
        the sessions of the dead.  Behind a pooler the session belongs to everybody: the
        process id the driver was told is not the server's then, and no mark is set.
        """
        with connection.cursor() as cursor:
            cursor.execute(
                f"SET tcp_keepalives_idle = {_KEEPALIVE_SECONDS}; "
                f"SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"
            )
            cursor.execute(
                "SELECT CASE WHEN pg_backend_pid() = %s "
                f"THEN pg_try_advisory_lock_shared(({_TABLE_ID}::bigint << 32) + %s) END",
                [_told_pid(connection), consumer % 2**32],
            )

    def wait_briefly(self, connection: Any) -> None:
        """Likewise; it holds until the transaction ends."""
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{_BRIEF_LOCK_MILLISECONDS}ms'")

    def prepare_dispatcher(self, connection: Any, consumer: int) -> None:
        """Wait a second for a lock at most, unless the project waits for less."""
        self.prepare(connection, consumer)
        with connection.cursor() as cursor:
            # Not behind a pooler, where the next one would have the setting.
            cursor.execute(
                "SELECT set_config('lock_timeout', %s, false) FROM pg_settings "
                "WHERE name = 'lock_timeout' AND setting::int NOT BETWEEN 1 AND %s "
                "AND pg_backend_pid() = %s",
                [
                    f"{DISPATCHER_LOCK_SECONDS}s",
                    DISPATCHER_LOCK_SECONDS * 1000,
                    _told_pid(connection),
                ],
            )

    def end_sessions(self, connection: Any, consumer: int) -> int:
        """End the sessions that carry the dead consumer's mark."""
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT COUNT(pg_terminate_backend(pid)) FROM pg_locks "  # noqa: S608 - only our own names are formatted in
                f"WHERE locktype = 'advisory' AND classid = {_TABLE_ID} AND objid = %s "
                f"AND objsubid = 1 AND pid <> pg_backend_pid() "
                f"AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                [consumer % 2**32],
            )
            return int(cursor.fetchone()[0])


def _told_pid(connection: Any) -> int:
    """Return the process id that the driver was told at connecting."""
    return int(connection.connection.pgconn.backend_pid)
