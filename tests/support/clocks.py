"""Set the clock of the database, for one connection: nothing of ours is told another time."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from typing import Any

SCHEMA = "firefly_clock"


@contextmanager
def database_clock(connection: Any, moment: datetime) -> Iterator[None]:
    """Let the database think that it is ``moment``, and stand still.

    Args:
        connection: The connection that sees it.
        moment: An aware datetime.
    """
    connection.ensure_connection()
    set_clock, reset = {
        "postgresql": (_set_postgresql, _reset_postgresql),
        "mysql": (_set_mysql, _reset_mysql),
        "sqlite": (_set_sqlite, _reset_sqlite),
    }[connection.vendor]
    set_clock(connection, moment)
    try:
        yield
    finally:
        reset(connection)


def _set_postgresql(connection: Any, moment: datetime) -> None:
    # Found before the built-in one, which is looked for first unless the path names it.
    text = moment.isoformat()
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}")
        cursor.execute(
            f"CREATE OR REPLACE FUNCTION {SCHEMA}.statement_timestamp() RETURNS timestamptz "
            f"LANGUAGE sql STABLE AS $$ SELECT '{text}'::timestamptz $$"
        )
        cursor.execute(f"SET search_path = {SCHEMA}, pg_catalog, public")


def _reset_postgresql(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("RESET search_path")
        cursor.execute(f"DROP SCHEMA {SCHEMA} CASCADE")


def _set_mysql(connection: Any, moment: datetime) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET TIMESTAMP = %s", [moment.timestamp()])


def _reset_mysql(connection: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET TIMESTAMP = DEFAULT")


def _set_sqlite(connection: Any, moment: datetime) -> None:
    import sqlite3

    def strftime(pattern: str, what: str, *modifiers: str) -> str:
        if what.lower() == "now":
            what = moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
        marks = ", ".join("?" * (2 + len(modifiers)))
        with closing(sqlite3.connect(":memory:")) as outside:
            values = [pattern, what, *modifiers]
            (found,) = outside.execute(f"SELECT STRFTIME({marks})", values).fetchone()
        return str(found)

    connection.connection.create_function("STRFTIME", -1, strftime)


def _reset_sqlite(connection: Any) -> None:
    # There is no way back to the built-in one.
    connection.close()
