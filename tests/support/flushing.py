"""Empty the database after a test, at the price of what the test wrote.

Django's ``flush`` truncates every table and then writes all content types and
permissions anew: that took longer than most tests do, on PostgreSQL a second.  No test
changes those, so they are kept, and of the others only tables with rows are touched.
"""

from typing import Any

from django.core.management.color import no_style
from django.db import connections, transaction
from django.test import TransactionTestCase

KEPT = {"django_migrations", "django_content_type", "auth_permission"}
# More rows are faster truncated; and their remains would slow the tests that follow.
DELETED_ROWS_MAX = 1_000


def empty_tables(alias: str) -> None:
    """Delete all rows of ``alias`` but those of :data:`KEPT`."""
    connection = connections[alias]
    names = set(connection.introspection.django_table_names(only_existing=True)) - KEPT
    counts = " UNION ALL ".join(
        f"SELECT '{name}' AS name, COUNT(*) AS many "
        f"FROM (SELECT 1 FROM {name} LIMIT {DELETED_ROWS_MAX + 1}) {name}_rows"
        for name in sorted(names)
    )
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT name, many FROM ({counts}) counts WHERE many > 0")
        filled = dict(cursor.fetchall())
    if not filled:
        return
    if max(filled.values()) > DELETED_ROWS_MAX:
        connection.ops.execute_sql_flush(connection.ops.sql_flush(no_style(), sorted(names)))
        return
    # Foreign keys are checked at the end of the transaction, or not at all.
    with (
        transaction.atomic(using=alias),
        connection.constraint_checks_disabled(),
        connection.cursor() as cursor,
    ):
        for name in filled:
            cursor.execute(f"DELETE FROM {name}")


def _fixture_teardown(test: Any) -> None:
    for alias in test._databases_names(include_mirrors=False):
        empty_tables(alias)


def install() -> None:
    """Let every transactional test be cleaned up after in this way."""
    TransactionTestCase._fixture_teardown = _fixture_teardown  # type: ignore[attr-defined]
