"""``bulk``: how fast many tasks are scheduled at once, beside raw SQL for the same rows.

The raw side is COPY on PostgreSQL and one INSERT per 1,000 rows elsewhere, in one transaction
on a bare cursor.  ``insert_many`` is timed with rows that are there, and with the time that
making them from calls takes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from django.db import connection, transaction

from firefly_jobs import enqueue
from firefly_jobs.models import TaskModel

from . import tables, tasks
from .figures import Figure
from .run import Run, medians

BATCH = 1_000
# What a scheduler has to say; the database fills in the rest.
COLUMNS = (
    *("func_name", "queue", "status", "priority", "not_before", "params", "retry_attempts"),
    *("retry_delay", "max_retries", "retry", "fence", "rescues", "lost_alone"),
)
_FIELDS = {field.column: field.attname for field in TaskModel._meta.concrete_fields if field.column}


def measure(run: Run) -> Iterator[Figure]:
    """Write the same number of rows in turns."""
    count = run.size("tasks")
    reference_name = "COPY" if run.kind == "postgresql" else f"INSERT of {BATCH:,} rows each"
    for case, ours in (("rows", _rows_at_once), ("calls", _calls_at_once)):
        yield run.figure(
            case=f"insert_many of {count:,} {case}",
            unit="rows/s",
            reference_name=reference_name,
            **medians(run.in_turns(partial(ours, count), partial(_raw, count))),
        )


def _rows_at_once(count: int) -> float:
    _prepare()
    rows = _rows(count)
    begin = time.perf_counter()
    enqueue.insert_many(rows)
    return count / (time.perf_counter() - begin)


def _calls_at_once(count: int) -> float:
    _prepare()
    begin = time.perf_counter()
    enqueue.insert_many(_rows(count))
    return count / (time.perf_counter() - begin)


def _raw(count: int) -> float:
    _prepare()
    values = [tuple(getattr(row, _FIELDS[name]) for name in COLUMNS) for row in _rows(count)]
    begin = time.perf_counter()
    with transaction.atomic(), connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            _copy(cursor, values)
        else:
            _insert(cursor, values)
    return count / (time.perf_counter() - begin)


def _copy(cursor: Any, values: list[tuple[Any, ...]]) -> None:
    with cursor.copy(f"COPY {tables.TASKS} ({', '.join(COLUMNS)}) FROM STDIN") as copy:
        for row in values:
            copy.write_row(row)


def _insert(cursor: Any, values: list[tuple[Any, ...]]) -> None:
    one = f"({', '.join(['%s'] * len(COLUMNS))})"
    for first in range(0, len(values), BATCH):
        batch = values[first : first + BATCH]
        cursor.execute(
            f"INSERT INTO {tables.TASKS} ({', '.join(COLUMNS)}) VALUES "
            f"{', '.join([one] * len(batch))}",
            [value for row in batch for value in row],
        )


def _rows(count: int) -> list[TaskModel]:
    return [tasks.noop.row((number,), {}) for number in range(count)]


def _prepare() -> None:
    tables.empty(tables.TASKS)
    tables.settle(tables.TASKS)
