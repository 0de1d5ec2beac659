"""MariaDB and MySQL, with mysqlclient."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from firefly_jobs.attempts import Claim
from firefly_jobs.exceptions import ImplicitCommitError

from .base import CLAIM_COLUMNS, TABLE, Completion, Database, Session

_CANDIDATES_PER_CLAIM = 3
_DEADLOCK, _LOCK_TIMEOUT, _SNAPSHOT_CONFLICT = 1213, 1205, 1020

# Statements that commit the open transaction by themselves:
# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
_BLANK = rb"(?:\s|/\*.*?\*/|(?:--\s|#)[^\n]*(?:\n|$))*"
_COMMITS_IMPLICITLY = re.compile(
    _BLANK + rb"(?:"
    rb"(?:CREATE|DROP)\s+(?!TEMPORARY\b)|ALTER\b|RENAME\b|TRUNCATE\b|GRANT\b|REVOKE\b|"
    rb"ANALYZE\s+TABLE|OPTIMIZE\b|REPAIR\b|LOCK\s+TABLES?|UNLOCK\s+TABLES|FLUSH\b|"
    rb"START\s+TRANSACTION|BEGIN\b|COMMIT\b|SET\s+(?:SESSION\s+|@@(?:SESSION\.)?)?AUTOCOMMIT\b)",
    re.IGNORECASE | re.DOTALL,
)


_ROLLS_BACK = re.compile(_BLANK + rb"ROLLBACK\b(?!\s+(?:WORK\s+)?TO\b)", re.IGNORECASE | re.DOTALL)


class MySQLSession(Session):
    """Watches the driver's ways to the server, since it tells nothing of transactions.

    Every statement of mysqlclient, whatever cursor or ``callproc`` it came from, goes
    through ``Connection.query``; that method, ``commit`` and ``rollback`` are replaced on
    the lane's own connection.
    """

    _touched = False

    def begin(self) -> None:
        """Forget the former call."""
        super().begin()
        self._touched = False

    def watch(self, driver: Any) -> None:
        """Notice every statement, and when one of them ends the transaction."""
        super().watch(driver)
        send = driver.query

        def query(statement: Any, *args: Any) -> Any:
            if not self._is_call or not self.connection.in_atomic_block:
                return send(statement, *args)
            self._touched = True
            text = (
                statement if isinstance(statement, bytes | bytearray) else str(statement).encode()
            )
            if _COMMITS_IMPLICITLY.match(text):
                word = text.split(None, 1)[0].decode()
                message = (
                    f"{word.upper()} commits the task's transaction on this database, so a later "
                    f"failure could not be rolled back. Put such statements into a task with "
                    f"@task(atomic=False), or run them outside of tasks."
                )
                raise ImplicitCommitError(message)
            if _ROLLS_BACK.match(text):
                self._ended = True
            try:
                return send(statement, *args)
            except Exception as error:
                # These have rolled back the whole transaction on the server; the call may
                # swallow the error, and its effects would be gone.
                if error.args and error.args[0] in {_DEADLOCK, _SNAPSHOT_CONFLICT}:
                    self._ended = True
                raise

        driver.query = query

    def is_touched(self) -> bool:
        """Whether a statement was sent."""
        return self._touched or self._ended

    def is_gone(self) -> bool:
        """Whether the server rolled back after a deadlock, or the call ended it itself."""
        return self._ended


class MySQL(Database):
    """Three statements claim, since these databases cannot return the rows they update."""

    session_class = MySQLSession
    now = "UTC_TIMESTAMP(6)"

    # deadlock, lock time-out, record changed since last read
    conflict_codes: ClassVar[frozenset[Any]] = frozenset(
        {_DEADLOCK, _LOCK_TIMEOUT, _SNAPSHOT_CONFLICT}
    )
    # killed, shut down, gone away, refused
    connection_codes: ClassVar[frozenset[Any]] = frozenset(
        {1053, 1079, 1152, 1158, 1159, 1160, 1161, 1317, 1927}
        | {2002, 2003, 2006, 2013, 2055, 4031, 0}
    )

    def claim(
        self,
        connection: Any,
        *,
        queue: str,
        priority: int,
        limit: int,
        consumer: int,
        not_below: Any = None,  # noqa: ARG002 - no dead entries here
    ) -> list[Claim]:
        """Find candidates without a lock, lock them with SKIP LOCKED, then update."""
        # MariaDB 10.11 and MySQL 8 cannot return the rows an UPDATE changed.  And a range
        # scan FOR UPDATE keeps the entry behind its end locked, which may be a running
        # row that a rescuer then has to pass over; so rows are locked by primary key.
        # Rows that another consumer has just locked are made up for by more candidates.
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM {TABLE} WHERE status = 'created' AND queue = %s "  # noqa: S608 - only our own names are formatted in
                f"AND priority = %s AND run_at <= {self.now} ORDER BY run_at, id LIMIT %s",
                [queue, priority, limit * _CANDIDATES_PER_CLAIM],
            )
            candidates = [pk for (pk,) in cursor.fetchall()]
        if not candidates:
            return []
        with self.write_transaction(connection), connection.cursor() as cursor:
            rows: list[Claim] = []
            while candidates and len(rows) < limit:
                rows += self._lock(cursor, candidates[:limit])
                candidates = candidates[limit:]
            rows = sorted(rows, key=lambda row: (row.run_at, row.id))[:limit]
            if not rows:
                return []
            cursor.execute(
                f"UPDATE {TABLE} SET status = 'running', fence = fence + 1, consumer = %s, "  # noqa: S608 - only our own names are formatted in
                f"started = {self.now} WHERE id IN ({', '.join(['%s'] * len(rows))})",
                [consumer, *(row.id for row in rows)],
            )
        return [row._replace(fence=row.fence + 1) for row in rows]

    def _lock(self, cursor: Any, ids: list[int]) -> list[Claim]:
        cursor.execute(
            f"SELECT {CLAIM_COLUMNS} FROM {TABLE} FORCE INDEX (PRIMARY) "  # noqa: S608 - only our own names are formatted in
            f"WHERE id IN ({', '.join(['%s'] * len(ids))}) AND status = 'created' "
            f"AND run_at <= {self.now} FOR UPDATE SKIP LOCKED",
            ids,
        )
        return [Claim._make(row) for row in cursor.fetchall()]

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete with one UPDATE joined to the outcomes, which travel as one JSON text."""
        # STRAIGHT_JOIN keeps the outcomes as the driving side: the other order would
        # scan, and lock, the whole table.
        sql = (
            f"UPDATE JSON_TABLE(%s, '$[*]' COLUMNS (id BIGINT PATH '$[0]', fence INT PATH '$[1]', "  # noqa: S608 - only our own names are formatted in
            f"duration DOUBLE PATH '$[2]', returned LONGTEXT PATH '$[3]')) o "
            f"STRAIGHT_JOIN {TABLE} t ON t.id = o.id "
            f"SET t.status = 'completed', t.completed = {self.now}, t.failed = NULL, "
            f"t.duration = o.duration, t.returned = o.returned, t.error = '' "
            f"WHERE t.status = 'running' AND t.fence = o.fence"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, [json.dumps(completions)])
            return int(cursor.rowcount)

    def error_code(self, error: BaseException) -> Any:
        """Return the server's or the client's error number."""
        if type(error).__module__.partition(".")[0] not in {"MySQLdb", "pymysql"}:
            return None
        return error.args[0] if error.args and isinstance(error.args[0], int) else ""
