"""PostgreSQL, with psycopg 3 or psycopg2."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from firefly_jobs.attempts import Claim

from .base import CLAIM_COLUMNS, TABLE, Completion, Database, Session

_IDLE, _IN_ERROR = 0, 3  # libpq's PGTransactionStatusType
_KEEPALIVE_SECONDS = 30
_MARK_MARGIN = "INTERVAL '1 second'"
_ADVISORY_CLASS = 0x66697265  # "fire"


class PostgreSQLSession(Session):
    """The driver sends BEGIN with the first statement and knows libpq's transaction status."""

    def _status(self) -> int:
        driver = self.connection.connection
        if hasattr(driver, "pgconn"):
            return int(driver.pgconn.transaction_status)
        return int(driver.get_transaction_status())

    def is_touched(self) -> bool:
        """Whether the driver has left the idle state, or did so before the call ended it."""
        return self._ended or self._status() != _IDLE

    def is_gone(self) -> bool:
        """Whether the call ended it, it is idle again, or a swallowed error has doomed it."""
        return self._ended or self._status() in {_IDLE, _IN_ERROR}


class PostgreSQL(Database):
    """One statement claims, one statement settles."""

    session_class = PostgreSQLSession
    needs_low_water_mark = True
    now = "STATEMENT_TIMESTAMP()"

    # serialization failure, deadlock, lock not available
    conflict_codes: ClassVar[frozenset[Any]] = frozenset({"40001", "40P01", "55P03"})
    # what a restart or a broken connection looks like: class 08, 57P0x, and no code at all
    connection_codes: ClassVar[frozenset[Any]] = frozenset(
        {"57P01", "57P02", "57P03", "57P05", "25P03", "no connection"}
        | {"08000", "08001", "08003", "08004", "08006", "08007"}
    )

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
        """Claim with one UPDATE … RETURNING."""
        # ARRAY(SELECT …) is evaluated once; with IN (SELECT …) the planner may run the
        # locking subquery again per row and take more than LIMIT.
        # run_at is only compared, and parsing it as a datetime would be an eighth of what
        # a task costs; so it comes as seconds since the epoch.
        returning = ", ".join(f"t.{column}" for column in CLAIM_COLUMNS.split(", ")).replace(
            "t.run_at", "EXTRACT(EPOCH FROM t.run_at)::float8"
        )
        mark = "" if not_below is None else f"AND run_at >= to_timestamp(%s) - {_MARK_MARGIN} "
        sql = (
            f"UPDATE {TABLE} t SET status = 'running', fence = t.fence + 1, consumer = %s, "  # noqa: S608 - only our own names are formatted in
            f"started = STATEMENT_TIMESTAMP() WHERE t.id = ANY(ARRAY("
            f"SELECT id FROM {TABLE} WHERE status = 'created' AND queue = %s AND priority = %s "
            f"AND run_at <= STATEMENT_TIMESTAMP() {mark}"
            f"ORDER BY run_at, id LIMIT %s FOR UPDATE SKIP LOCKED)) RETURNING {returning}"
        )
        marks = [] if not_below is None else [not_below]
        with connection.cursor() as cursor:
            cursor.execute(sql, [consumer, queue, priority, *marks, limit])
            claims = [Claim._make(row) for row in cursor.fetchall()]
        claims.sort(key=lambda claim: (claim.run_at, claim.id))
        return claims

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete with one UPDATE joined to the outcomes, which travel as one JSON text."""
        # Arrays for unnest() would be the obvious way; psycopg quotes them element by
        # element, which costs four times the Python of one json.dumps.
        sql = (
            f"UPDATE {TABLE} t SET status = 'completed', completed = STATEMENT_TIMESTAMP(), "  # noqa: S608 - only our own names are formatted in
            f"failed = NULL, duration = o.duration, returned = o.returned, error = '' "
            f"FROM (SELECT (e->>0)::bigint AS id, (e->>1)::int AS fence, "
            f"(e->>2)::float8 AS duration, e->>3 AS returned "
            f"FROM json_array_elements(%s::json) e) o "
            f"WHERE t.id = o.id AND t.status = 'running' AND t.fence = o.fence"
        )
        with connection.cursor() as cursor:
            cursor.execute(sql, [json.dumps(completions)])
            return int(cursor.rowcount)

    def error_code(self, error: BaseException) -> Any:
        """Return the SQLSTATE; "no connection" where the driver lost the server."""
        module = type(error).__module__.partition(".")[0]
        if module not in {"psycopg", "psycopg2"}:
            return None
        code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
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
        driver = connection.connection
        told = driver.pgconn.backend_pid if hasattr(driver, "pgconn") else driver.get_backend_pid()
        with connection.cursor() as cursor:
            cursor.execute(
                f"SET tcp_keepalives_idle = {_KEEPALIVE_SECONDS}; "
                f"SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3"
            )
            cursor.execute(
                "SELECT CASE WHEN pg_backend_pid() = %s "
                "THEN pg_try_advisory_lock_shared(%s, %s) END",
                [told, _ADVISORY_CLASS, consumer % 2**31],
            )

    def end_sessions(self, connection: Any, consumer: int) -> int:
        """End the sessions that carry the dead consumer's mark."""
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT COUNT(pg_terminate_backend(pid)) FROM pg_locks WHERE locktype = 'advisory' "
                "AND classid = %s AND objid = %s AND objsubid = 2 AND pid <> pg_backend_pid() "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
                [_ADVISORY_CLASS, consumer % 2**31],
            )
            return int(cursor.fetchone()[0])
