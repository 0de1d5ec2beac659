"""The hand-written loops: what the server allows when nothing else is done.

``python -m benchmarks.handwritten LOOP`` drains ``LoopJob``.

``sql``: claim 100 rows in one commit (SKIP LOCKED and RETURNING where the database has them),
finish 100 rows in one commit.  On SQLite, which has no round trips to save: claim 10, finish each
in a commit of its own, on the bare driver.

``orm [THREADS]``: claim 100 rows with the ORM; for each job one transaction with an INSERT and
the job's own UPDATE, as exactly-once effects demand.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import django
from django.db import OperationalError, connection, transaction

BATCH = 100
SQLITE_BATCH = 10
CLAIM_ATTEMPTS = 20
TABLE = "benchmarks_loopjob"
_DUE = "status = 'created' AND queue = 'default' AND priority = 0 AND run_at <= {now}"
_NOW = {
    "postgresql": "STATEMENT_TIMESTAMP()",
    "mysql": "UTC_TIMESTAMP(6)",
    "sqlite": "STRFTIME('%Y-%m-%d %H:%M:%f', 'now')",
}


def drain_with_sql() -> None:
    """Claim and finish until nothing is left."""
    if connection.vendor == "sqlite":
        _drain_sqlite()
        return
    now = _NOW[connection.vendor]
    claim = _claim_postgresql if connection.vendor == "postgresql" else _claim_mariadb
    with connection.cursor() as cursor:
        while ids := claim(cursor, now):
            with transaction.atomic():
                _finish(cursor, now, ids)


def _claim_postgresql(cursor: Any, now: str) -> list[int]:
    cursor.execute(
        f"UPDATE {TABLE} SET status = 'running', started = {now} WHERE id IN (SELECT id FROM "
        f"{TABLE} WHERE {_DUE.format(now=now)} ORDER BY run_at, id LIMIT {BATCH} "
        f"FOR UPDATE SKIP LOCKED) RETURNING id, params"
    )
    return [row[0] for row in cursor.fetchall()]


def _claim_mariadb(cursor: Any, now: str) -> list[int]:
    with transaction.atomic():
        cursor.execute(
            f"SELECT id, params FROM {TABLE} WHERE {_DUE.format(now=now)} "
            f"ORDER BY run_at, id LIMIT {BATCH} FOR UPDATE SKIP LOCKED"
        )
        ids = [row[0] for row in cursor.fetchall()]
        if ids:
            marks = ",".join(["%s"] * len(ids))
            cursor.execute(
                f"UPDATE {TABLE} SET status = 'running', started = {now} WHERE id IN ({marks})",
                ids,
            )
    return ids


def _finish(cursor: Any, now: str, ids: list[int]) -> None:
    if connection.vendor == "postgresql":
        cursor.execute(
            f"UPDATE {TABLE} t SET status = 'completed', completed = {now}, returned = o.returned "
            f"FROM unnest(%s::bigint[], %s::text[]) AS o(id, returned) WHERE t.id = o.id",
            [ids, ["null"] * len(ids)],
        )
        return
    marks = ",".join(["%s"] * len(ids))
    cursor.execute(
        f"UPDATE {TABLE} SET status = 'completed', completed = {now}, returned = 'null' "
        f"WHERE id IN ({marks})",
        ids,
    )


def _drain_sqlite() -> None:
    connection.ensure_connection()
    execute = connection.connection.execute
    now = _NOW["sqlite"]
    claim = (
        f"UPDATE {TABLE} SET status = 'running', started = {now} WHERE id IN (SELECT id FROM "
        f"{TABLE} WHERE {_DUE.format(now=now)} ORDER BY run_at, id LIMIT {SQLITE_BATCH}) "
        f"RETURNING id, params"
    )
    finish = (
        f"UPDATE {TABLE} SET status = 'completed', completed = {now}, returned = ? WHERE id = ?"
    )
    while rows := execute(claim).fetchall():
        for job, _ in rows:
            execute(finish, ("null", job))


def drain_with_orm(threads: int) -> None:
    """Claim and finish on several threads, each with a connection of its own."""
    running = [threading.Thread(target=_drain_one_lane) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def _drain_one_lane() -> None:
    from firefly_jobs.databases.functions import DatabaseNow  # noqa: PLC0415 - needs django.setup()

    from .models import Inserted, LoopJob  # noqa: PLC0415 - needs django.setup()

    while jobs := _claim_with_orm():
        for job in jobs:
            with transaction.atomic():
                Inserted.objects.create(value=job)
                LoopJob.objects.filter(pk=job).update(
                    status="completed", completed=DatabaseNow(), returned="null"
                )
    connection.close()


def _claim_with_orm() -> list[int]:
    for attempt in range(CLAIM_ATTEMPTS):
        try:
            return _claim_once_with_orm()
        except OperationalError:
            # Two claims can deadlock on MariaDB, whose UPDATE locks index ranges.
            if attempt == CLAIM_ATTEMPTS - 1:
                raise
    return []


def _claim_once_with_orm() -> list[int]:
    from firefly_jobs.databases.functions import DatabaseNow  # noqa: PLC0415 - needs django.setup()

    from .models import LoopJob  # noqa: PLC0415 - needs django.setup()

    with transaction.atomic():
        due = LoopJob.objects.select_for_update(skip_locked=True).filter(
            status="created", queue="default", priority=0, run_at__lte=DatabaseNow()
        )
        jobs = list(due.order_by("run_at", "id").values_list("id", flat=True)[:BATCH])
        LoopJob.objects.filter(pk__in=jobs).update(status="running", started=DatabaseNow())
    return jobs


if __name__ == "__main__":
    django.setup()
    if sys.argv[1] == "sql":
        drain_with_sql()
    else:
        drain_with_orm(int(sys.argv[2]))
