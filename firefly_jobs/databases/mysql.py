"""MariaDB and MySQL, with mysqlclient."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from django.db import DatabaseError, Error, IntegrityError

from firefly_jobs.attempts import Claim
from firefly_jobs.exceptions import ImplicitCommitError

from .base import (
    CANCEL_SECONDS,
    DISPATCHER_LOCK_SECONDS,
    Database,
)
from .completing import (
    COUNT_OFF,
    COUNTED,
    GATES,
    TABLE,
    Completion,
    Counted,
)
from .functions import isolation_sql
from .sessions import SAVEPOINT, Session

_ISOLATE = "SET SESSION TRANSACTION ISOLATION LEVEL {}"
logger = logging.getLogger("firefly_jobs")

_CANDIDATES_PER_CLAIM = 3
_DEADLOCK, _LOCK_TIMEOUT, _SNAPSHOT_CONFLICT = 1213, 1205, 1020
_DUPLICATE = 1062
# RANK is a word of its own in MySQL since window functions.
_COUNTED = COUNTED.replace("rank", "`rank`")
# Rows that completing changes if one gate waits for the step.
_WITH_GATE = 2

# Statements that commit the open transaction by themselves:
# https://mariadb.com/kb/en/sql-statements-that-cause-an-implicit-commit/
_BLANK = rb"(?:\s|/\*.*?\*/|(?:--\s|#)[^\n]*(?:\n|$))*"
_COMMITS_IMPLICITLY = re.compile(
    _BLANK + rb"(?:SET\s+STATEMENT\b.*?\bFOR\s+)?(?:"
    rb"(?:CREATE(?:\s+OR\s+REPLACE)?|DROP)\s+(?!TEMPORARY\b|OR\b)|ALTER\b|RENAME\b|TRUNCATE\b|GRANT\b|REVOKE\b|"
    rb"ANALYZE\s+(?:LOCAL\s+|NO_WRITE_TO_BINLOG\s+)?TABLE|CHECK\s+TABLE|SET\s+PASSWORD\b|OPTIMIZE\b|REPAIR\b|LOCK\s+TABLES?|UNLOCK\s+TABLES|FLUSH\b|"
    rb"(?:UN)?INSTALL\b|RESET\b|START\s+TRANSACTION|BEGIN\b|COMMIT\b|SET\b[^;]*\bAUTOCOMMIT\b)",
    re.IGNORECASE | re.DOTALL,
)


_ROLLS_BACK = re.compile(_BLANK + rb"ROLLBACK\b(?!\s+(?:WORK\s+)?TO\b)", re.IGNORECASE | re.DOTALL)


# What ends a savepoint and all that were set after it.
_ENDS_SAVEPOINTS = re.compile(
    _BLANK + rb"(?:RELEASE|ROLLBACK\s+(?:WORK\s+)?TO)\b", re.IGNORECASE | re.DOTALL
)
# What may hide a statement that ends the transaction: by its first word, or behind what
# the text contains.
_CALLS = re.compile(_BLANK + rb"(?:CALL|EXECUTE|BEGIN\s+NOT\s+ATOMIC)\b", re.IGNORECASE | re.DOTALL)
_HIDES = re.compile(rb";\s*\S|/\*M?!")


def _mark(session: str) -> str:
    """Return the SQL for the name of a session's mark; ``%s`` in it is the consumer."""
    # Names of user locks are the server's, not the schema's, and 64 characters at most.
    return f"CONCAT('firefly_jobs.', LEFT(MD5(DATABASE()), 12), '.', %s, '.', {session})"


class MySQLSession(Session):
    """Watches the driver's ways to the server, since it tells nothing of transactions.

    Every statement of mysqlclient, whatever cursor or ``callproc`` it came from, goes
    through ``Connection.query``; that method, ``commit`` and ``rollback`` are replaced on
    the lane's own connection.
    """

    _touched = _is_sending = False
    _session_id = 0

    def begin(self) -> None:
        """Forget the former call."""
        super().begin()
        self._touched = False

    def watch(self, driver: Any) -> None:
        """Notice every statement, and when one of them ends the transaction."""
        send = self._telling(driver.query)
        # Asked here: the driver answers to one thread only.
        self._session_id = driver.thread_id()
        gone_after = {_DEADLOCK, _SNAPSHOT_CONFLICT}
        # The session may have ended since its last statement.
        with self.connection.wrap_database_errors:
            send("SELECT @@innodb_rollback_on_timeout")
            if driver.store_result().fetch_row()[0][0] in {1, b"1", "1"}:
                gone_after.add(_LOCK_TIMEOUT)
        super().watch(driver)

        def query(statement: Any, *args: Any) -> Any:
            if not self._is_call or not self.connection.in_atomic_block:
                return send(statement, *args)
            self._touched = True
            text = (
                statement if isinstance(statement, bytes | bytearray) else str(statement).encode()
            )
            if _COMMITS_IMPLICITLY.match(text):
                word = (
                    re.sub(_BLANK, b"", text, count=1, flags=re.DOTALL).split(None, 1)[0].decode()
                )
                message = (
                    f"{word.upper()} commits the task's transaction on this database, so a later "
                    f"failure could not be rolled back. Put such statements into a task with "
                    f"@task(atomic=False), or run them outside of tasks."
                )
                raise ImplicitCommitError(message)
            if _ROLLS_BACK.match(text):
                self.refuse_end("ROLLBACK")
            elif _ENDS_SAVEPOINTS.match(text):
                self.forget_probe()
            elif _CALLS.match(text) or ((b";" in text or b"/*" in text) and _HIDES.search(text)):
                self.refuse_if_shared()
                self.probe()
            try:
                return send(statement, *args)
            except Exception as error:
                # These have rolled back the whole transaction on the server; the call may
                # swallow the error, and its effects would be gone.
                if error.args and error.args[0] in gone_after:
                    self._ended = True
                raise

        driver.query = query

    def _telling(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def send_and_tell(*args: Any) -> Any:
            self._is_sending = True
            try:
                return send(*args)
            finally:
                self._is_sending = False

        return send_and_tell

    def observe(self, statement: str) -> None:
        """Do nothing: ``query`` looks at every statement, Django's among them."""

    def _mark(self, *, is_first: bool) -> None:  # noqa: ARG002 - the same statement here
        """Replace a mark of the same name."""
        self._send(SAVEPOINT)
        self._touched = False

    def is_touched(self) -> bool:
        """Whether a statement was sent."""
        return self._touched or self._ended

    def is_gone(self) -> bool:
        """Whether the server rolled back after a deadlock, or the call ended it itself."""
        return self._ended or self._has_lost_probe()

    def is_busy(self) -> bool:
        """Whether the driver waits for the answer to a statement."""
        return self._is_sending

    def cancel(self, consumer: int) -> None:
        """KILL QUERY, if the session carries our mark: behind a proxy the id is a stranger's."""
        if self.connection.connection is not self._watched:
            return
        other = self.connection.copy()
        timeouts = [f"{step}_timeout" for step in ("connect", "read", "write")]
        other.settings_dict["OPTIONS"] |= dict.fromkeys(timeouts, CANCEL_SECONDS)
        session = self._session_id
        try:
            with other.cursor() as cursor:
                cursor.execute(
                    f"SELECT IS_USED_LOCK({_mark('%s')}) = %s",
                    [consumer, session, session],
                )
                if cursor.fetchone()[0]:
                    cursor.execute("KILL QUERY %s", [session])
        finally:
            other.close()

    def _send(self, statement: str) -> None:
        is_call, self._is_call = self._is_call, False
        try:
            super()._send(statement)
        finally:
            self._is_call = is_call


class MySQL(Database):
    """Three statements claim, since these databases cannot return the rows they update."""

    session_class = MySQLSession
    now = "UTC_TIMESTAMP(6)"
    until = "TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), {}) / 1e6"

    # deadlock, lock time-out, record changed since last read
    conflict_codes: ClassVar[frozenset[Any]] = frozenset(
        {_DEADLOCK, _LOCK_TIMEOUT, _SNAPSHOT_CONFLICT}
    )
    deadlock_code = _DEADLOCK
    # killed, shut down, gone away, refused, full, not found
    connection_codes: ClassVar[frozenset[Any]] = frozenset(
        {1053, 1079, 1152, 1158, 1159, 1160, 1161, 1317, 1927}
        | {1040, 2002, 2003, 2005, 2006, 2013, 2055, 4031, 0}
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
            # Without the hint a small table is scanned, and two that claim wait for each other.
            cursor.execute(
                f"UPDATE {TABLE} FORCE INDEX (PRIMARY) SET status = 'running', "  # noqa: S608 - only our own names are formatted in
                f"fence = fence + 1, consumer = %s, started = {self.now} "
                f"WHERE id IN ({', '.join(['%s'] * len(rows))})",
                [consumer, *(row.id for row in rows)],
            )
        return [row._replace(fence=row.fence + 1) for row in rows]

    def _lock(self, cursor: Any, ids: list[int]) -> list[Claim]:
        cursor.execute(
            f"SELECT {self.claimed} FROM {TABLE} FORCE INDEX (PRIMARY) "  # noqa: S608 - only our own names are formatted in
            f"WHERE id IN ({', '.join(['%s'] * len(ids))}) AND status = 'created' "
            f"AND run_at <= {self.now} FOR UPDATE SKIP LOCKED",
            ids,
        )
        return [Claim._make(row) for row in cursor.fetchall()]

    def insert_unless_taken(
        self, connection: Any, rows: Sequence[tuple[Any, ...]], *, columns: str
    ) -> list[int | None]:
        """Insert all of them, or one by one if a key among them is taken."""
        # A duplicate key undoes the statement only, and not the transaction, so no savepoint
        # is needed: https://mariadb.com/kb/en/innodb-error-codes/ and
        # https://dev.mysql.com/doc/refman/8.0/en/innodb-error-handling.html.  INSERT IGNORE
        # would swallow other errors too, and ON DUPLICATE KEY UPDATE would lock the row that
        # its consumer is about to settle, in the opposite order.
        try:
            return [*self.insert(connection, rows, columns=columns)]
        except IntegrityError as error:
            if self._first_code(error) != _DUPLICATE:
                raise
        if len(rows) == 1:
            return [None]
        return [
            pk
            for row in rows
            for pk in self.insert_unless_taken(connection, [row], columns=columns)
        ]

    def _taken_sql(self, count: int) -> str:
        """Lock what is there, or raise at once.

        An INSERT that waits for the owner of a key closes the gap in front of it, also when it
        has given up, until that owner's transaction ends; and in front of the first key is where
        all rows without one go.
        """
        return f"{super()._taken_sql(count)} FOR UPDATE NOWAIT"

    def holder(self, connection: Any, key: str) -> int | None:
        """Read the entry of the index that the failed INSERT has locked, and nothing else."""
        # A plain SELECT under REPEATABLE READ shows the snapshot, where the row may not be
        # yet.  The lock is the one that the failed INSERT has left until the transaction ends,
        # so to read without it would free nobody.  Whoever settles the row holds that and
        # waits for the index: a deadlock only if this transaction goes on to lock something
        # that the other one has, such as the slot of a concurrency key that both share.
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM {TABLE} FORCE INDEX (firefly_active_key) "  # noqa: S608 - only our own names are formatted in
                f"WHERE active_key = %s LOCK IN SHARE MODE",
                [key],
            )
            row = cursor.fetchone()
        return None if row is None else int(row[0])

    def returning_id(self, connection: Any) -> str:
        """MariaDB tells the ids, MySQL does not."""
        return super().returning_id(connection) if connection.mysql_is_mariadb else ""

    def inserted_ids(self, connection: Any, cursor: Any, count: int) -> list[int]:
        """Return what MariaDB returned; on MySQL the ids that follow the first."""
        if connection.mysql_is_mariadb:
            return super().inserted_ids(connection, cursor, count)
        if count == 1:
            return [int(cursor.lastrowid)]
        # One INSERT whose number of rows is known beforehand gets consecutive values:
        # https://dev.mysql.com/doc/refman/8.0/en/innodb-auto-increment-handling.html
        cursor.execute("SELECT LAST_INSERT_ID(), @@auto_increment_increment")
        first, step = cursor.fetchone()
        return list(range(first, first + count * step, step))

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete with one UPDATE joined to the outcomes, which travel as one JSON text."""
        # STRAIGHT_JOIN keeps the outcomes as the driving side: the other order would
        # scan, and lock, the whole table.  So would a small table's plan without the hint, and
        # wait for rows of others that somebody has locked.
        sql = (
            f"UPDATE JSON_TABLE(%s, '$[*]' COLUMNS (id BIGINT PATH '$[0]', fence INT PATH '$[1]', "  # noqa: S608 - only our own names are formatted in
            f"duration DOUBLE PATH '$[2]', returned LONGTEXT PATH '$[3]')) o "
            f"STRAIGHT_JOIN {TABLE} t FORCE INDEX (PRIMARY) ON t.id = o.id "
            f"SET t.status = 'completed', t.completed = {self.now}, t.failed = NULL, "
            f"t.duration = o.duration, t.returned = o.returned, t.error = '', "
            f"t.active_key = NULL, t.limit_key = NULL "
            f"WHERE t.status = 'running' AND t.fence = o.fence"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, [json.dumps(completions)])
            return int(cursor.rowcount)

    def complete_step(self, connection: Any, completion: Completion) -> tuple[bool, Counted | None]:
        """Complete and count off with one statement, whose answer is a number."""
        # An UPDATE may change rows of two tables; that of ours is read, and locked, first.  None
        # returns rows here, but it may leave a number behind, as one that inserts does:
        # https://mariadb.com/kb/en/update/ and https://mariadb.com/kb/en/last_insert_id/
        sql = (
            f"UPDATE {TABLE} t LEFT JOIN {GATES} g ON g.id = t.next_gate "  # noqa: S608 - only our own names are formatted in
            f"AND {isolation_sql(connection)} = 'read-committed' "
            f"AND LAST_INSERT_ID(4 * waiting_for + 2 * is_unmet + is_cut_short) IS NOT NULL "
            f"SET {self.completed}, waiting_for = waiting_for - 1 "
            f"WHERE t.id = %s AND t.status = 'running' AND t.fence = %s"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, completion.values)
            if cursor.rowcount < _WITH_GATE:
                return cursor.rowcount > 0, None
            before, flags = divmod(int(cursor.lastrowid), 4)
            if before > 1 and not flags & 1:
                return True, Counted(before - 1, bool(flags & 2), is_cut_short=False)
            cursor.execute(
                f"SELECT {_COUNTED} FROM {GATES} WHERE id = "  # noqa: S608 - only our own names are formatted in
                f"(SELECT next_gate FROM {TABLE} WHERE id = %s)",
                [completion.id],
            )
            return True, Counted.of(cursor.fetchone())

    def count_off(
        self, connection: Any, gate: int, count: int, *, is_unmet: bool
    ) -> Counted | None:
        """Update, which locks, and then read."""
        with connection.cursor() as cursor:
            cursor.execute(COUNT_OFF, [count, is_unmet, gate])
            cursor.execute(f"SELECT {_COUNTED} FROM {GATES} WHERE id = %s", [gate])  # noqa: S608 - only our own names are formatted in
            return Counted.of(cursor.fetchone())

    @contextmanager
    def own_transaction(self, connection: Any) -> Iterator[None]:
        """Isolate it as READ COMMITTED, and the session again as it was."""
        connection.ensure_connection()
        if connection.in_atomic_block or connection.isolation_level == "read committed":
            with self.write_transaction(connection):
                yield
            return
        # Of the next transaction alone it could be said as well, but nobody could ask for it then.
        with connection.cursor() as cursor:
            cursor.execute(f"SELECT {isolation_sql(connection)}")
            (before,) = cursor.fetchone()
            cursor.execute(_ISOLATE.format("READ COMMITTED"))
        try:
            with self.write_transaction(connection):
                yield
        finally:
            try:
                with connection.cursor() as cursor:
                    cursor.execute(_ISOLATE.format(before.replace("-", " ")))
            except Error as error:
                logger.debug("This connection is not used any more: %s", error)
                connection.close()

    def prepare(self, connection: Any, consumer: int) -> None:
        """Mark the session as ours by a user lock of its own, so that a rescuer finds it.

        Behind a proxy the session belongs to everybody: its id is not the one that the
        driver was told at connecting, and no mark is set.
        """
        try:
            with connection.cursor() as cursor:
                cursor.execute(
                    f"SELECT IF(CONNECTION_ID() = %s, GET_LOCK({_mark('CONNECTION_ID()')}, 0), 0)",
                    [connection.connection.thread_id(), consumer],
                )
                cursor.fetchall()
        except DatabaseError as error:
            if self.is_lost(error):
                raise
            # Some clusters have no user locks.  Then the server notices a vanished consumer.
            logger.debug("This session carries no mark: %s", error)

    def prepare_dispatcher(self, connection: Any, consumer: int) -> None:
        """Wait a second for a lock at most, unless the project waits for less."""
        self.prepare(connection, consumer)
        with connection.cursor() as cursor:
            cursor.execute(
                f"SET SESSION innodb_lock_wait_timeout = "
                f"LEAST(@@SESSION.innodb_lock_wait_timeout, {DISPATCHER_LOCK_SECONDS})"
            )

    def end_sessions(self, connection: Any, consumer: int) -> int:
        """End the sessions that carry the dead consumer's mark."""
        # User locks have one holder each and cannot be listed, so every session that the
        # server shows us is asked for the name that its mark would have.
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT id FROM information_schema.processlist "  # noqa: S608 - only our own names are formatted in
                f"WHERE id <> CONNECTION_ID() AND IS_USED_LOCK({_mark('id')}) = id",
                [consumer],
            )
            sessions = [session for (session,) in cursor.fetchall()]
            for session in sessions:
                cursor.execute("KILL CONNECTION %s", [session])
        return len(sessions)

    def error_code(self, error: BaseException) -> Any:
        """Return the server's or the client's error number."""
        if type(error).__module__.partition(".")[0] not in {"MySQLdb", "pymysql"}:
            return None
        return error.args[0] if error.args and isinstance(error.args[0], int) else ""
