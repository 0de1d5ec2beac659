"""``backlog``: whether a claim costs the same however many rows there are.

The first tasks of 10,000 due rows are timed, then those of a large table: of due rows, and of
few due ones beside rows that have ended and rows that are due later.  On PostgreSQL also a
long drain while another transaction keeps every dead row version alive.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from django.db import connection

from firefly_jobs.models import TaskModel
from firefly_jobs.states import Status

from . import consumers, tables, tasks
from .figures import Figure, Mark
from .run import Run

FEW = 10_000
# Of the large table's rows, how many are drained beside the open transaction.
HELD_OPEN_SHARE = 0.3
MARKS = (Mark(of="ratio", at_least=0.80),)


def measure(run: Run) -> Iterator[Figure]:
    """Time few rows before and after, and each large table in between."""
    rows, timed = run.size("rows"), run.size("tasks")
    cases: dict[str, Callable[[], None]] = {
        f"of {rows:,} due": lambda: tables.multiply(tasks.noop, rows),
        f"of {FEW:,} due, {rows:,} ended": lambda: _beside(rows, status=Status.COMPLETED),
        f"of {FEW:,} due, {rows:,} due later": lambda: _beside(rows, ahead=True),
    }
    few = _rates(run, lambda: _beside(0))
    found = {case: _rates(run, fill) for case, fill in cases.items()}
    few += _rates(run, lambda: _beside(0))
    for case, rates in found.items():
        yield run.figure(
            case=f"first {timed:,} {case}",
            unit="tasks/s",
            value=statistics.median(rates),
            samples=tuple(rates),
            reference=statistics.median(few),
            reference_name=f"first {timed:,} of {FEW:,} due",
            marks=MARKS,
        )
    if connection.vendor == "postgresql":
        yield _held_open(run, int(rows * HELD_OPEN_SHARE))


def _beside(rows: int, *, status: Status = Status.CREATED, ahead: bool = False) -> None:
    tables.multiply(tasks.noop, FEW)
    if rows:
        tables.multiply(tasks.noop, rows, status=status, ahead=ahead)


def _rates(run: Run, fill: Callable[[], None]) -> list[float]:
    """Return the tasks per second of a consumer over the first due rows, several times."""
    timed = run.size("tasks")
    tables.empty(tables.TASKS)
    fill()
    rates = []
    for _ in range(run.rounds):
        tables.settle(tables.TASKS)
        _drain(run, "--max-tasks", str(timed))
        rates.append(tables.rate(tables.TASKS, timed))
        # As it was before, for the next round.
        TaskModel.objects.filter(consumer__isnull=False).delete()
        tables.multiply(tasks.noop, timed)
    return rates


def _drain(run: Run, *words: str) -> None:
    consumers.drain(run.place.url, *consumers.arguments(processes=run.processes()), *words)


def _held_open(run: Run, rows: int) -> Figure:
    """Compare the end of a long drain with its beginning, while a snapshot is held."""
    tables.empty(tables.TASKS)
    tables.multiply(tasks.noop, rows)
    tables.settle(tables.TASKS)
    with _open_transaction():
        _drain(run)
    tables.seconds_taken(tables.TASKS, rows)
    first, last = _tenths()
    return run.figure(
        case=f"last 10% of {rows:,}, a transaction open",
        unit="tasks/s",
        value=rows / 10 / last,
        reference=rows / 10 / first,
        reference_name="first 10% of the same drain",
        marks=MARKS,
    )


@contextmanager
def _open_transaction() -> Iterator[None]:
    """Hold a snapshot on a connection of its own, so that nothing newer can be vacuumed."""
    other = connection.copy()
    other.set_autocommit(False)
    try:
        with other.cursor() as cursor:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            cursor.execute("SELECT txid_current()")
        yield
        other.rollback()
    finally:
        other.close()


def _tenths() -> tuple[float, float]:
    """Return the seconds that the first and the last tenth of the tasks took."""
    moment = "PERCENTILE_DISC({share}) WITHIN GROUP (ORDER BY completed)"
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT EXTRACT(EPOCH FROM {moment.format(share=0.1)} - MIN(started)), "
            f"EXTRACT(EPOCH FROM MAX(completed) - {moment.format(share=0.9)}) "
            f"FROM {tables.TASKS} WHERE status = 'completed'"
        )
        first, last = cursor.fetchone()
    return float(first), float(last)
