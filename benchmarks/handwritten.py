"""The hand-written SQL loop: what the server allows when nothing else is done.

``python -m benchmarks.handwritten noop|insert`` drains ``LoopJob``: claim 100 rows in
one commit (SKIP LOCKED and RETURNING where the database has them), finish 100 rows in
one commit.  With ``insert`` every job inserts a row and is finished in a commit of its
own, as exactly-once effects demand.
"""

from __future__ import annotations

import sys
from typing import Any

import django
from django.db import connection, transaction

BATCH = 100
TABLE = "benchmarks_loopjob"
_DUE = "status = 'created' AND queue = 'default' AND priority = 0 AND run_at <= {now}"
_NOW = {
    "postgresql": "STATEMENT_TIMESTAMP()",
    "mysql": "UTC_TIMESTAMP(6)",
    "sqlite": "STRFTIME('%%Y-%%m-%%d %%H:%%M:%%f', 'now')",
}


def drain(work: str) -> None:
    """Claim and finish until nothing is left."""
    now = _NOW[connection.vendor]
    with connection.cursor() as cursor:
        while ids := _claim(cursor, now):
            if work == "insert":
                for job in ids:
                    with transaction.atomic():
                        cursor.execute("INSERT INTO benchmarks_inserted (value) VALUES (1)")
                        _finish(cursor, now, [job])
            else:
                with transaction.atomic():
                    _finish(cursor, now, ids)


def _claim(cursor: Any, now: str) -> list[int]:
    due = _DUE.format(now=now)
    if connection.vendor == "mysql":
        with transaction.atomic():
            cursor.execute(
                f"SELECT id, params FROM {TABLE} WHERE {due} ORDER BY run_at, id LIMIT {BATCH} "
                f"FOR UPDATE SKIP LOCKED"
            )
            ids = [row[0] for row in cursor.fetchall()]
            if ids:
                marks = ",".join(["%s"] * len(ids))
                cursor.execute(
                    f"UPDATE {TABLE} SET status = 'running', started = {now} WHERE id IN ({marks})",
                    ids,
                )
        return ids
    skip = "FOR UPDATE SKIP LOCKED" if connection.vendor == "postgresql" else ""
    cursor.execute(
        f"UPDATE {TABLE} SET status = 'running', started = {now} WHERE id IN (SELECT id FROM "
        f"{TABLE} WHERE {due} ORDER BY run_at, id LIMIT {BATCH} {skip}) RETURNING id, params",
        [],  # with parameters, SQLite's backend reads %% as it does in ours
    )
    return [row[0] for row in cursor.fetchall()]


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


if __name__ == "__main__":
    django.setup()
    drain(sys.argv[1])
