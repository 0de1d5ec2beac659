"""``drain``: how fast due tasks are run, beside a hand-written loop of the same work.

A rate is the number of tasks by the time from the first ``started`` to the last
``completed``, both written by the database; starting a process does not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

import django
from django.db import connection

from .servers import ROOT, environment

# The loop of the field's comparison has two processes; ours has one until it can have more.
LOOP_PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """Rates of one kind of work on one database, in tasks per second."""

    database: str
    work: str
    tasks: int
    ours: float
    loop: float
    loop_one_process: float

    @property
    def ratio(self) -> float:
        """Ours as a share of the loop with two processes."""
        return self.ours / self.loop


def measure(kind: str, url: str, *, work: str, tasks: int, rounds: int) -> Drained:
    """Drain ``tasks`` tasks ``rounds`` times, in turn with the loop; medians."""
    ours, loop, single = [], [], []
    for _ in range(rounds):
        loop.append(_loop(url, work, tasks, LOOP_PROCESSES))
        ours.append(_ours(url, work, tasks))
        single.append(_loop(url, work, tasks, 1))
    return Drained(
        database=kind,
        work=work,
        tasks=tasks,
        ours=statistics.median(ours),
        loop=statistics.median(loop),
        loop_one_process=statistics.median(single),
    )


def _ours(url: str, work: str, tasks: int) -> float:
    _inside(url, "fill", work, str(tasks))
    command = ["-m", "django", "consume_tasks", "--burst", "-v0"]
    _run_all(url, [command])
    return float(_inside(url, "rate", "firefly_jobs_taskmodel", str(tasks)))


def _loop(url: str, work: str, tasks: int, processes: int) -> float:
    _inside(url, "fill-loop", str(tasks))
    _run_all(url, [["-m", "benchmarks.handwritten", work]] * processes)
    return float(_inside(url, "rate", "benchmarks_loopjob", str(tasks)))


def _run_all(url: str, commands: list[list[str]]) -> None:
    running = [
        subprocess.Popen([sys.executable, "-W", "ignore", *command], env=environment(url), cwd=ROOT)
        for command in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        message = f"a measured process ended with {codes}"
        raise RuntimeError(message)


def _inside(url: str, *words: str) -> str:
    """Run one of the steps below in a process that has Django set up for ``url``."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.drain", *words],
        env=environment(url),
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


# --- steps that run in such a process


def _fill(work: str, tasks: int) -> None:
    from firefly_jobs.models import TaskModel  # noqa: PLC0415 - needs django.setup()

    from . import tasks as defined  # noqa: PLC0415 - needs django.setup()

    _empty("firefly_jobs_taskmodel", "benchmarks_inserted")
    task = getattr(defined, work)
    TaskModel.objects.bulk_create(
        (task.row((number,), {}) for number in range(tasks)), batch_size=1_000
    )
    _analyze("firefly_jobs_taskmodel")


def _fill_loop(tasks: int) -> None:
    from django.utils import timezone  # noqa: PLC0415 - needs django.setup()

    from .models import LoopJob  # noqa: PLC0415 - needs django.setup()

    _empty("benchmarks_loopjob", "benchmarks_inserted")
    now, params = timezone.now(), "x" * 120
    LoopJob.objects.bulk_create(
        (LoopJob(run_at=now, params=params) for _ in range(tasks)), batch_size=1_000
    )
    with connection.cursor() as cursor:
        columns = "queue, priority, run_at, id"
        if connection.vendor == "mysql":
            cursor.execute("DROP INDEX IF EXISTS loop_claim ON benchmarks_loopjob")
            cursor.execute(f"CREATE INDEX loop_claim ON benchmarks_loopjob (status, {columns})")
        else:
            cursor.execute(
                f"CREATE INDEX IF NOT EXISTS loop_claim ON benchmarks_loopjob ({columns}) "
                f"WHERE status = 'created'"
            )
    _analyze("benchmarks_loopjob")


def _empty(*tables: str) -> None:
    with connection.cursor() as cursor:
        for table in tables:
            if connection.vendor == "postgresql":
                cursor.execute(f"TRUNCATE {table} CASCADE")
            else:
                cursor.execute(f"DELETE FROM {table}")


def _analyze(table: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            {
                "postgresql": f"VACUUM ANALYZE {table}",
                "mysql": f"ANALYZE TABLE {table}",
                "sqlite": "PRAGMA wal_checkpoint(TRUNCATE)",
            }[connection.vendor]
        )
        if connection.vendor == "postgresql":
            cursor.execute("CHECKPOINT")


def _rate(table: str, tasks: int) -> None:
    seconds = {
        "postgresql": "EXTRACT(EPOCH FROM MAX(completed) - MIN(started))",
        "mysql": "TIMESTAMPDIFF(MICROSECOND, MIN(started), MAX(completed)) / 1e6",
        "sqlite": "(JULIANDAY(MAX(completed)) - JULIANDAY(MIN(started))) * 86400",
    }[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT COUNT(*), {seconds} FROM {table} WHERE status = 'completed'")
        done, taken = cursor.fetchone()
    if done != tasks:
        message = f"{done} of {tasks} rows of {table} completed"
        raise RuntimeError(message)
    print(tasks / float(taken))


def as_json(drained: list[Drained]) -> str:
    """Return the figures as JSON."""
    return json.dumps([{**asdict(one), "ratio": one.ratio} for one in drained], indent=2)


if __name__ == "__main__":
    django.setup()
    step, *words = sys.argv[1:]
    if step == "fill":
        _fill(words[0], int(words[1]))
    elif step == "fill-loop":
        _fill_loop(int(words[0]))
    else:
        _rate(words[0], int(words[1]))
