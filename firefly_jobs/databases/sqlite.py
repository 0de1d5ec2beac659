"""SQLite: one writer at a time, so the art is to hold the write lock briefly."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from django.db import transaction

from firefly_jobs.attempts import Claim

from .base import DISPATCHER_LOCK_SECONDS, Database, Problem
from .completing import COUNT_OFF, COUNTED, TABLE, Completion, Counted
from .sessions import SAVEPOINT, Session

# UPDATE ... RETURNING: https://sqlite.org/lang_returning.html
_RETURNING_SINCE = (3, 35)

# Matches no row, yet takes the write lock and honours the busy timeout.  Starting with
# a read and upgrading later would fail at once with SQLITE_BUSY_SNAPSHOT if another
# connection committed in between (https://sqlite.org/isolation.html).
_TAKE_WRITE_LOCK = f"UPDATE {TABLE} SET id = id WHERE id = -1"  # noqa: S608 - only our own names are formatted in


@contextmanager
def _transaction_mode(connection: Any, mode: str) -> Iterator[None]:
    former = connection.transaction_mode
    connection.transaction_mode = mode
    try:
        yield
    finally:
        connection.transaction_mode = former


class _Immediate:
    """``atomic`` that takes the write lock at BEGIN, whatever the project's OPTIONS say."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._atomic = transaction.atomic(using=connection.alias)

    def __enter__(self) -> None:
        # Django reads the mode from OPTIONS when it connects.
        self._connection.ensure_connection()
        with _transaction_mode(self._connection, "IMMEDIATE"):
            self._atomic.__enter__()

    def __exit__(self, *exc_info: Any) -> None:
        self._atomic.__exit__(*exc_info)


class SQLiteSession(Session):
    """A deferred transaction holds nothing until its first statement takes the write lock."""

    _touched = False

    def opening(self) -> AbstractContextManager[Any]:
        """Enter ``atomic`` with BEGIN DEFERRED, whatever the project's OPTIONS say."""
        return _transaction_mode(self.connection, "DEFERRED")

    def begin(self) -> None:
        """Open a deferred transaction unless an untouched one is still open."""
        super().begin()
        driver = self.connection.connection
        if not driver.in_transaction:
            driver.execute("BEGIN DEFERRED")
        self._touched = False

    def watch(self, driver: Any) -> None:
        """Let the driver tell of every statement; its methods cannot be replaced."""
        driver.set_trace_callback(self._saw)

    def _saw(self, _: str) -> None:
        self._touched = True

    def before_statement(self) -> None:
        """Take the write lock, waiting for it as long as the busy timeout says."""
        with self.connection.wrap_database_errors:
            self.connection.connection.execute(_TAKE_WRITE_LOCK)

    def _mark(self, *, is_first: bool) -> None:
        """Send one statement at a time."""
        if not is_first:
            self._send(f"RELEASE {SAVEPOINT}")
        self._send(SAVEPOINT)
        self._touched = False

    def _send(self, statement: str) -> None:
        with self.connection.wrap_database_errors:
            self.connection.connection.execute(statement)

    def probe(self) -> None:
        """Do nothing: the driver runs one statement at a time and tells how it stands."""

    def is_touched(self) -> bool:
        """Whether the driver ran a statement: ``total_changes`` would miss reads and DDL."""
        return self._touched

    def is_gone(self) -> bool:
        """Whether the call ended it, or SQLite did (disk full, I/O error, out of memory)."""
        return self._ended or not self.connection.connection.in_transaction

    def interrupt(self) -> None:
        """End a running query; the one call of the driver that is safe from other threads."""
        self.connection.connection.interrupt()

    def break_off(self) -> None:
        """Close the file, and with it the write lock: nobody can settle anything before."""
        self.connection.connection.close()


def _for_driver(sql: str) -> str:
    """Return a statement as the driver takes it, without Django in between."""
    return sql.replace("%%", "%").replace("%s", "?")


class SQLite(Database):
    """A claim is one UPDATE; a batch is settled in one transaction."""

    session_class = SQLiteSession
    can_skip_locked = False
    now = "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f', 'now')"
    until = "(JULIANDAY({}) - JULIANDAY('now')) * 86400.0"

    conflict_codes: ClassVar[frozenset[Any]] = frozenset(
        {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
    )

    def claim(
        self,
        connection: Any,
        *,
        queue: str,
        priority: int | None,
        limit: int,
        consumer: int,
        not_below: Any = None,  # noqa: ARG002 - no dead entries here
    ) -> list[Claim]:
        """Claim with one UPDATE … RETURNING, which takes the write lock as it starts."""
        sql = (
            f"UPDATE {TABLE} SET status = 'running', fence = fence + 1, consumer = %s, "  # noqa: S608 - only our own names are formatted in
            f"started = {self.now} WHERE id IN ("
            f"SELECT id FROM {TABLE} WHERE status = 'created' AND queue = %s AND priority = %s "
            f"AND run_at <= {self.now} ORDER BY run_at, id LIMIT %s) RETURNING {self.claimed}"
        )
        with connection.cursor() as cursor:
            # An UPDATE takes the write lock even if it finds nothing, and an idle consumer
            # with future rows would disturb every writer.
            cursor.execute(
                f"SELECT 1 FROM {TABLE} WHERE status = 'created' AND queue = %s "  # noqa: S608 - only our own names are formatted in
                f"AND priority = %s AND run_at <= {self.now} LIMIT 1",
                [queue, priority],
            )
            if cursor.fetchone() is None:
                return []
            cursor.execute(sql, [consumer, queue, priority, limit])
            claims = [Claim._make(row) for row in cursor.fetchall()]
        claims.sort(key=lambda claim: (claim.run_at, claim.id))
        return claims

    def data_version(self, connection: Any) -> int | None:
        """Return SQLite's own number: https://sqlite.org/pragma.html#pragma_data_version."""
        # Connections to a database in memory share a cache, where the number tells nothing.
        if connection.is_in_memory_db():
            return None
        with connection.wrap_database_errors:
            (version,) = connection.connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def __init__(self) -> None:
        super().__init__()
        self._complete = _for_driver(self.complete_sql)
        self._complete_step = f"{self._complete} RETURNING next_gate"
        self._count_off = f"{_for_driver(COUNT_OFF)} RETURNING {COUNTED}"

    def complete(self, connection: Any, completion: Completion) -> bool:
        """Tell the driver itself: the way there through Django takes longer than the statement."""
        with connection.wrap_database_errors:
            cursor = connection.connection.execute(self._complete, completion.values)
        return bool(cursor.rowcount == 1)

    def complete_step(self, connection: Any, completion: Completion) -> tuple[bool, Counted | None]:
        """Likewise."""
        with connection.wrap_database_errors:
            cursor = connection.connection.execute(self._complete_step, completion.values)
            row = cursor.fetchone()
        if row is None or row[0] is None:
            return row is not None, None
        return True, self.count_off(connection, row[0], 1, is_unmet=False)

    def count_off(
        self, connection: Any, gate: int, count: int, *, is_unmet: bool
    ) -> Counted | None:
        """Likewise."""
        with connection.wrap_database_errors:
            cursor = connection.connection.execute(self._count_off, [count, is_unmet, gate])
            return Counted.of(cursor.fetchone())

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete with one prepared statement, many times."""
        with self.write_transaction(connection), connection.cursor() as cursor:
            cursor.executemany(
                self.complete_sql, [(c.duration, c.returned, c.id, c.fence) for c in completions]
            )
            return int(cursor.rowcount)

    def write_transaction(self, connection: Any) -> AbstractContextManager[Any]:
        """Take the write lock at BEGIN, so that no later statement fails as busy."""
        return _Immediate(connection)

    def prepare_dispatcher(self, connection: Any, consumer: int) -> None:  # noqa: ARG002 - no sessions
        """Wait a second for the write lock, not the project's timeout: then look around."""
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA busy_timeout")
            (milliseconds,) = cursor.fetchone()
            cursor.execute(
                f"PRAGMA busy_timeout = {min(milliseconds, DISPATCHER_LOCK_SECONDS * 1000)}"
            )

    def is_busy(self, error: BaseException) -> bool:
        """Whether another connection held the write lock for too long."""
        return self.is_lost(error)

    def error_code(self, error: BaseException) -> Any:
        """Return SQLite's primary result code."""
        if not isinstance(error, sqlite3.Error):
            return None
        code = getattr(error, "sqlite_errorcode", None)
        return "" if code is None else code & 0xFF

    def is_present(self, connection: Any) -> bool:
        """Whether the file is there; SQLite makes an empty one for whoever connects."""
        if connection.is_in_memory_db():
            return True
        name = str(connection.settings_dict["NAME"])
        return Path(unquote(urlsplit(name).path) if name.startswith("file:") else name).exists()

    def problems(self, connection: Any) -> list[Problem]:
        """Look at the library's version and at the journal mode of the real connection."""
        found = super().problems(connection)
        if sqlite3.sqlite_version_info < _RETURNING_SINCE:
            found.append(
                Problem(
                    "E006",
                    f"SQLite {sqlite3.sqlite_version} has no UPDATE ... RETURNING, so consumers "
                    f"cannot claim tasks from database {connection.alias!r}.",
                    "Run Python with SQLite 3.35 or newer.",
                )
            )
        if not connection.is_in_memory_db() and self._journal_mode(connection) != "wal":
            found.append(
                Problem(
                    "W004",
                    f"SQLite connection {connection.alias!r} is not in WAL mode, so readers and "
                    f"the consumer block each other.",
                    'Add "init_command": "PRAGMA journal_mode=WAL;" to its OPTIONS.',
                )
            )
        return found

    def _journal_mode(self, connection: Any) -> str:
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA journal_mode")
            return str(cursor.fetchone()[0]).lower()
