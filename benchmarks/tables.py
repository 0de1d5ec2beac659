"""Fill, empty and question the tables that are worked on."""

from __future__ import annotations

import time
from typing import Any

from django.db import connection
from django.utils import timezone

from firefly_jobs import enqueue
from firefly_jobs.models import TaskModel
from firefly_jobs.states import Status
from firefly_jobs.wakeup import announce
from tests.support.consumer_process import ConsumerProcess

from .consumers import POLL_SECONDS, RUN_SECONDS_MAX
from .models import Inserted, LoopJob

TASKS = "firefly_jobs_taskmodel"
LOOP_JOBS = "benchmarks_loopjob"
EFFECTS = "benchmarks_inserted"
CHAOS_EFFECTS = "benchmarks_chaoseffect"
# What refers to tasks.
_REFERRING = [
    f"firefly_jobs_{name}"
    for name in ("taskattempt", "workflowedge", "workflowstep", "workflowgate", "workflowmodel")
]

# One row each millisecond, beginning a day ago or from now.
_MOMENTS = {
    "postgresql": "CURRENT_TIMESTAMP {sign} INTERVAL '1 day' + number * INTERVAL '1 ms'",
    "mysql": "UTC_TIMESTAMP(6) {sign} INTERVAL 1 DAY + INTERVAL number * 1000 MICROSECOND",
    "sqlite": (
        "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f', 'now', '{sign}1 day', (number / 1000.0) || ' seconds')"
    ),
}
_SECONDS = {
    "postgresql": "EXTRACT(EPOCH FROM MAX(completed) - MIN(started))",
    "mysql": "TIMESTAMPDIFF(MICROSECOND, MIN(started), MAX(completed)) / 1e6",
    "sqlite": "(JULIANDAY(MAX(completed)) - JULIANDAY(MIN(started))) * 86400",
}
_SETTLE = {
    "postgresql": ("VACUUM ANALYZE {table}", "CHECKPOINT"),
    # The export itself is of no use; beginning one writes all pages of the table to disk.
    "mysql": ("ANALYZE TABLE {table}", "FLUSH TABLES {table} FOR EXPORT", "UNLOCK TABLES"),
    "sqlite": ("PRAGMA wal_checkpoint(TRUNCATE)",),
}


def fill_tasks(task: Any, count: int) -> None:
    """Let ``count`` calls of ``task`` be due, each with its own argument, and nothing else."""
    empty(TASKS, EFFECTS)
    enqueue.insert_many(task.row((position,), {}) for position in range(count))
    settle(TASKS)


def multiply(
    task: Any, count: int, *, status: Status = Status.CREATED, ahead: bool = False
) -> None:
    """Add ``count`` rows of one call of ``task``, made by the database itself.

    Args:
        task: The call's task; all rows have the same arguments.
        count: How many.
        status: Due rows, or such that have completed.
        ahead: Due from tomorrow on.
    """
    row = task.row((0,), {})
    moment = _MOMENTS[connection.vendor]
    past, future = moment.format(sign="-"), moment.format(sign="+")
    values: dict[str, Any] = {
        str(field.column): field.get_db_prep_save(getattr(row, field.attname), connection)
        for field in TaskModel._meta.concrete_fields
        if not field.generated and field.attname not in {"id", "created", "not_before", "status"}
    }
    if status == Status.COMPLETED:
        values |= {"returned": values["params"], "duration": 0.001, "fence": 1}
    expressions = {"created": past} | ({"not_before": future} if ahead else {})
    if status == Status.COMPLETED:
        expressions |= {"started": past, "completed": past}
        values = {name: value for name, value in values.items() if name not in expressions}
    names = ", ".join([*values, "status", *expressions])
    marks = ", ".join(["%s"] * (len(values) + 1) + [*expressions.values()])
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION max_recursive_iterations = %s", [count + 1])
        cursor.execute(
            f"INSERT INTO {TASKS} ({names}) WITH RECURSIVE series(number) AS "
            f"(SELECT 1 UNION ALL SELECT number + 1 FROM series WHERE number < {int(count)}) "
            f"SELECT {marks} FROM series",
            [*values.values(), str(status)],
        )
    # A consumer that sleeps would find them when its nap is over.
    announce(connection.alias, (row.queue,))


def fill_loop(count: int) -> None:
    """Let ``count`` jobs of the hand-written loop be due, and nothing else."""
    empty(LOOP_JOBS, EFFECTS)
    now, params = timezone.now(), "x" * 120
    LoopJob.objects.bulk_create(
        (LoopJob(run_at=now, params=params) for _ in range(count)), batch_size=1_000
    )
    with connection.cursor() as cursor:
        columns = "queue, priority, run_at, id"
        if connection.vendor == "mysql":
            cursor.execute(f"DROP INDEX IF EXISTS loop_claim ON {LOOP_JOBS}")
            cursor.execute(f"CREATE INDEX loop_claim ON {LOOP_JOBS} (status, {columns})")
        else:
            cursor.execute(
                f"CREATE INDEX IF NOT EXISTS loop_claim ON {LOOP_JOBS} ({columns}) "
                f"WHERE status = 'created'"
            )
    settle(LOOP_JOBS)


def empty(*tables: str) -> None:
    """Empty tables, and the history and the workflows of tasks with them."""
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION foreign_key_checks = 0")
        for table in (*_REFERRING, *tables):
            if connection.vendor == "sqlite":
                cursor.execute(f"DELETE FROM {table}")
            else:
                cascade = " CASCADE" if connection.vendor == "postgresql" else ""
                cursor.execute(f"TRUNCATE TABLE {table}{cascade}")
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION foreign_key_checks = 1")


def settle(table: str) -> None:
    """Do now what the database would do later, under the clock."""
    with connection.cursor() as cursor:
        for statement in _SETTLE[connection.vendor]:
            cursor.execute(statement.format(table=table))


def seconds_taken(table: str, count: int) -> float:
    """Return the seconds from the first ``started`` to the last ``completed``.

    Both are written by the database, so starting a process does not count.  Tasks that
    :func:`multiply` made as completed are no consumer's, and are left out.

    Raises:
        RuntimeError: If it is not ``count`` rows that completed with a result.
    """
    ours = " AND consumer IS NOT NULL" if table == TASKS else ""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT COUNT(*), {_SECONDS[connection.vendor]} FROM {table} "
            f"WHERE status = 'completed' AND returned IS NOT NULL AND started IS NOT NULL{ours}"
        )
        done, seconds = cursor.fetchone()
    if done != count:
        message = f"{done} of {count} rows of {table} completed with a result"
        raise RuntimeError(message)
    return float(seconds)


def rate(table: str, count: int) -> float:
    """Return ``count`` tasks by :func:`seconds_taken`."""
    return count / seconds_taken(table, count)


def check_inserted(count: int) -> None:
    """Raise unless the inserting tasks have inserted ``count`` rows."""
    found = Inserted.objects.count()
    if found != count:
        message = f"{found} of {count} effects are there"
        raise RuntimeError(message)


def await_drained(process: ConsumerProcess) -> None:
    """Wait until ``process`` has ended every task.

    Raises:
        RuntimeError: If it ended before, or takes an hour.
    """
    deadline = time.monotonic() + RUN_SECONDS_MAX
    ended = [status for status in Status if status.is_terminal]
    while TaskModel.objects.exclude(status__in=ended).exists():
        if process.returncode is not None or time.monotonic() > deadline:
            message = f"the consumer has not ended every task:\n{process.output}"
            raise RuntimeError(message)
        time.sleep(POLL_SECONDS)
