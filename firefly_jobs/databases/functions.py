"""SQL expressions that every database spells in its own way."""

from __future__ import annotations

from typing import Any

from django.db.models import DateTimeField, Func
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
