"""SQL expressions that every database spells in its own way."""

from __future__ import annotations

from typing import Any

from django.db.models import BigIntegerField, CharField, DateTimeField, Func
from django.db.models.functions import Now


class DatabaseNow(Now):
    """The moment of the statement, by the database's clock, as Django stores moments.

    ``Now()`` speaks the session's time zone on MySQL and MariaDB, while Django stores
    UTC there; so this is ``UTC_TIMESTAMP(6)`` on those two, and ``Now()`` elsewhere.
    """

    def as_mysql(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for MySQL and MariaDB."""
        return Func.as_sql(self, compiler, connection, template="UTC_TIMESTAMP(6)", **extra_context)


class SecondsFromNow(Func):
    """The database's clock plus a number of seconds; negative means ago."""

    output_field = DateTimeField()

    def as_postgresql(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for PostgreSQL."""
        return self.as_sql(
            compiler,
            connection,
            template="(STATEMENT_TIMESTAMP() + (%(expressions)s) * INTERVAL '1 second')",
            **extra_context,
        )

    def as_mysql(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for MySQL and MariaDB, whose intervals take whole microseconds."""
        return self.as_sql(
            compiler,
            connection,
            template=(
                "(UTC_TIMESTAMP(6) + INTERVAL ROUND((%(expressions)s) * 1000000) MICROSECOND)"
            ),
            **extra_context,
        )

    def as_sqlite(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for SQLite, whose clock has milliseconds."""
        return self.as_sql(
            compiler,
            connection,
            template=(
                "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f', 'NOW', "
                "(%(expressions)s) || ' seconds')"
            ),
            **extra_context,
        )


class DatabaseMicroseconds(Func):
    """The moment of the statement, by the database's clock, in microseconds since 1970."""

    output_field = BigIntegerField()
    arity = 0

    def as_postgresql(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for PostgreSQL."""
        template = "(EXTRACT(EPOCH FROM STATEMENT_TIMESTAMP()) * 1000000)::bigint"
        return self.as_sql(compiler, connection, template=template, **extra_context)

    def as_mysql(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for MySQL and MariaDB, without the session's zone and its summer time."""
        template = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))"
        return self.as_sql(compiler, connection, template=template, **extra_context)

    def as_sqlite(self, compiler: Any, connection: Any, **extra_context: Any) -> Any:
        """Render for SQLite, whose clock has milliseconds."""
        template = "(CAST(ROUND((JULIANDAY('now') - 2440587.5) * 86400000) AS INTEGER) * 1000)"
        return self.as_sql(compiler, connection, template=template, **extra_context)


class Isolation(Func):
    """The isolation of the open transaction, as one word in lower case."""

    output_field = CharField()
    arity = 0

    def as_sql(self, compiler: Any, connection: Any, *args: Any, **extra_context: Any) -> Any:
        """Render for any database."""
        extra_context["template"] = isolation_sql(connection)
        return super().as_sql(compiler, connection, *args, **extra_context)


def isolation_sql(connection: Any) -> str:
    """Return what :class:`Isolation` asks a database."""
    if connection.vendor == "postgresql":
        return "REPLACE(CURRENT_SETTING('transaction_isolation'), ' ', '-')"
    if connection.vendor == "mysql":
        # Older versions of MariaDB know the former name only.
        name = "tx_isolation" if connection.mysql_is_mariadb else "transaction_isolation"
        return f"LOWER(@@{name})"
    # Nobody commits beside a transaction that writes.
    return "'read-committed'"
