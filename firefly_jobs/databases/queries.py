"""Execute a statement that somebody else has written, and give its rows as dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class QueryResult(NamedTuple):
    """What a statement gave; without columns ``row_count`` is how many rows it changed."""

    rows: list[dict[str, Any]]
    row_count: int
    columns: list[str]


def fetch(
    connection: Any,
    query: str,
    params: Sequence[Any] | Mapping[str, Any] | None,
    *,
    max_rows: int,
) -> QueryResult:
    """Execute ``query`` on ``connection`` and return its rows.

    Raises:
        ValueError: If it gives more rows than ``max_rows``, or two columns of one name.
            A result that was cut, or has lost a column, would look like a whole one.
    """
    with connection.cursor() as cursor:
        cursor.execute(query, params)
        if cursor.description is None:
            return QueryResult([], cursor.rowcount, [])
        columns = [item[0] for item in cursor.description]
        if len(set(columns)) < len(columns):
            message = "The query gives two columns of one name; tell them apart with AS."
            raise ValueError(message)
        found = cursor.fetchmany(max_rows + 1)
    if len(found) > max_rows:
        message = (
            f"The query gives more than {max_rows:,} rows. Add a LIMIT, or define a type with "
            f"a larger max_rows."
        )
        raise ValueError(message)
    rows = [dict(zip(columns, map(_plain, row), strict=True)) for row in found]
    return QueryResult(rows, len(rows), columns)


def _plain(value: Any) -> Any:
    # Some drivers give binary data as a view of memory, which cannot be stored.
    return bytes(value) if isinstance(value, memoryview) else value
