"""``latency``: from the commit of ``schedule`` to the start of the call in an idle consumer.

The call returns when it began, and the scheduler notes when ``schedule`` came back from its
commit: the same clock, since both are on this machine.  What ``schedule`` does after its
commit is not in it.  Beside it: the round trip of one SELECT 1 from the scheduler.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator

from django.db import connection

from . import consumers, tables, tasks
from .figures import Figure, Mark
from .run import Run, medians

GAP_SECONDS = (0.02, 0.12)
# The first ones start what is started lazily, on both sides.
WARM_UP = 10
MARKS = {
    "postgresql": {50: 3.0, 99: 15.0},
    "sqlite": {50: 5.0},
    "mariadb": {50: 25.0},
}


def measure(run: Run) -> Iterator[Figure]:
    """Schedule at random moments; the median of each round's percentiles."""
    rounds = [_round(run) for _ in range(run.rounds)]
    for percent in (50, 99):
        below = MARKS[run.kind].get(percent)
        yield run.figure(
            case=f"commit to start of the call, p{percent}",
            unit="ms",
            reference_name="round trip of SELECT 1",
            marks=() if below is None else (Mark(below=below),),
            **medians(
                [(_percentile(ours, percent), _percentile(one, percent)) for ours, one in rounds]
            ),
        )


def _round(run: Run) -> tuple[list[float], list[float]]:
    """Return the latencies and the round trips of one consumer's life, in milliseconds."""
    tables.empty(tables.TASKS)
    with consumers.consumer(run.place.url) as process:
        consumers.await_registered(process)
        waits = random.Random(run.name)
        committed, round_trips = [], []
        for number in range(WARM_UP + run.size("tasks")):
            time.sleep(waits.uniform(*GAP_SECONDS))
            round_trips.append(_round_trip())
            row = tasks.started_at.schedule(number)
            committed.append((row, time.time_ns()))
        tables.await_drained(process)
    latencies = []
    for row, moment in committed[WARM_UP:]:
        row.refresh_from_db()
        latencies.append((row.returned - moment) / 1e6)
    return latencies, round_trips[WARM_UP:]


def _round_trip() -> float:
    begin = time.perf_counter()
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        cursor.fetchone()
    return (time.perf_counter() - begin) * 1e3


def _percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
