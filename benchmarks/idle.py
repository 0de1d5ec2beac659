"""``idle``: what a consumer costs that has nothing to do.

Statements are counted by the server.  PostgreSQL: ``pg_stat_statements`` where it is loaded,
else ``pg_stat_database``, which counts transactions: a consumer's are mostly of one statement.
MariaDB: ``Questions``, of the whole server.  So a server is started for this benchmark; where
that cannot be, nobody else may use the usual one meanwhile.
The processor time is that of the consumer's processes, from ``/proc``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from django.db import connection

from . import consumers, procfs, tables
from .figures import Figure, Mark
from .run import Run

STATEMENTS_MARKS = {"postgresql": (Mark(below=0.5),)}
CPU_MARKS = {"postgresql": (Mark(below=0.5),), "sqlite": (Mark(below=1.0),)}
# A backend of PostgreSQL that rests tells its counters within ten seconds, a busy one at once.
REST_SECONDS = 12.0


def measure(run: Run) -> Iterator[Figure]:
    """Watch one consumer for a while."""
    seconds = run.size("seconds")
    tables.empty(tables.TASKS)
    with consumers.consumer(run.place.url) as process:
        consumers.await_registered(process)
        time.sleep(REST_SECONDS)
        counter = _counter()
        cpu, begin = procfs.cpu_seconds(process.pid), time.monotonic()
        if counter is not None:
            name, count = counter
            statements = count()
        time.sleep(seconds)
        if counter is not None:
            statements = count() - statements
        taken = time.monotonic() - begin
        cpu = procfs.cpu_seconds(process.pid) - cpu
    if counter is not None:
        yield run.figure(
            case=f"statements, {seconds} s watched",
            unit="/s",
            value=statements / taken,
            marks=STATEMENTS_MARKS.get(run.kind, ()),
            details={"counted by": name},
        )
    yield run.figure(
        case=f"processor time, {seconds} s watched",
        unit="% of a core",
        value=100 * cpu / taken,
        marks=CPU_MARKS.get(run.kind, ()),
    )


def _counter() -> tuple[str, Callable[[], int]] | None:
    """Return how this database counts statements, and a function that reads the counter."""
    if connection.vendor == "mysql":
        # Each look counts itself, and this connection does nothing else.
        return "Questions, less our own", _counting("SHOW GLOBAL STATUS LIKE 'Questions'", own=1)
    if connection.vendor == "postgresql":
        this = "(SELECT oid FROM pg_database WHERE datname = CURRENT_DATABASE())"
        if _has_statement_statistics():
            counted = f"SELECT SUM(calls) FROM pg_stat_statements WHERE dbid = {this}"
            return "pg_stat_statements, less our own", _counting(counted, own=1)
        # Our own look is reported after the last one was read, if at all.
        counted = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datid = {this}"
        return "transactions in pg_stat_database", _counting(counted, own=1)
    return None


def _counting(question: str, *, own: int) -> Callable[[], int]:
    looks = 0

    def count() -> int:
        nonlocal looks
        with connection.cursor() as cursor:
            cursor.execute(question)
            found = int(cursor.fetchone()[-1])
        looks += own
        return found - looks

    return count


def _has_statement_statistics() -> bool:
    with connection.cursor() as cursor:
        cursor.execute("SHOW shared_preload_libraries")
        if "pg_stat_statements" not in cursor.fetchone()[0]:
            return False
        cursor.execute("CREATE EXTENSION IF NOT EXISTS pg_stat_statements")
    return True
