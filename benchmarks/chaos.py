"""``chaos``: mixed load while consumers are killed and the server restarts.

Consumers come and go by ``kill -9``; a private server is restarted at even distances, at once
and in order by turns.  When the time is over nobody is killed any more, everything has to end,
and then it is counted what the database says: each task ended once, effects exactly once.
The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from itertools import cycle

from django.db import Error, connections

from firefly_jobs.models import TaskModel
from firefly_jobs.states import Status
from tests.support.consumer_process import ConsumerProcess

from . import consumers, procfs, tables
from .chaos_load import Load
from .chaos_tally import EXAMPLES_MAX, tally
from .figures import Figure, Mark
from .run import Run

JOBS_SETTINGS = {
    # Short, so that the dead are found out while the load goes on.
    "LEASE_SECONDS": 2.0,
    "CONSUMER_NAP_TIME": 0.2,
    "SHUTDOWN_TIMEOUT": 10.0,
    # A task that is killed here is never to blame, so none may fail for it.
    "MAX_RESCUES": 10_000,
    "IMPORTS": ["benchmarks.chaos_tasks"],
}
KILL_SECONDS = (0.5, 3.0)
# What is left when nobody kills any more has to end in this time.
END_SECONDS = 120.0
LOOK_SECONDS = 0.1
# One after the other, as far as consume_tasks has them.
VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("--threads", "4"),
    ("--processes", "2", "--max-tasks", "100"),
    ("--group-commit", "--threads", "2"),
)
MARKS = (Mark(below=1),)


class Fleet:
    """Consumers that are killed and replaced.

    Attributes:
        kills: How many processes were killed.
        complaints: What a consumer did by itself that it should not.
    """

    def __init__(self, url: str, size: int) -> None:
        self._url = url
        self._variants = cycle(VARIANTS)
        self._all: list[ConsumerProcess] = []
        self._living = [self._start() for _ in range(size)]
        self.kills = 0
        self.complaints: list[str] = []

    def kill_one(self) -> None:
        """Kill one process of a consumer; replace the consumer if that was the first one."""
        position = random.randrange(len(self._living))
        consumer = self._living[position]
        victim = random.choice(procfs.tree(consumer.pid))
        if victim == consumer.pid:
            consumer.kill9()
            self._living[position] = self._start()
        else:
            # Its supervisor has to start another by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        self.kills += 1

    def look(self) -> None:
        """Replace consumers that have ended by themselves, and complain about them."""
        for position, consumer in enumerate(self._living):
            if consumer.returncode is not None:
                self._complain(consumer)
                self._living[position] = self._start()

    def stop(self) -> None:
        """Ask all to end, and complain about those that do not end well."""
        for consumer in self._living:
            consumer.terminate()
        for consumer in self._living:
            self._complain_unless_ended_well(consumer)

    def close(self) -> None:
        """End everything that was ever started, orphans too."""
        for consumer in self._all:
            consumer.close()

    def _start(self) -> ConsumerProcess:
        consumer = consumers.start(self._url, *next(self._variants), **JOBS_SETTINGS)
        self._all.append(consumer)
        return consumer

    def _complain_unless_ended_well(self, consumer: ConsumerProcess) -> None:
        try:
            code = consumer.wait()
        except AssertionError:
            code = None
        if code != 0:
            self._complain(consumer)

    def _complain(self, consumer: ConsumerProcess) -> None:
        self.complaints.append(f"a consumer ended with {consumer.returncode}")
        print(f"{self.complaints[-1]}:\n{consumer.output}", file=sys.stderr)


def measure(run: Run) -> Iterator[Figure]:
    """Let it rage, let it end, count."""
    tables.empty(tables.TASKS, tables.CHAOS_EFFECTS)
    load = Load(most=run.size("tasks"))
    fleet = Fleet(run.place.url, run.size("consumers"))
    try:
        load.start()
        restarts = _rage(run, fleet, load)
        load.end()
        seconds_to_end = _await_end(fleet)
        fleet.stop()
    finally:
        fleet.close()
    counts, wrong = tally(load.acknowledged)
    for complaint, ids in wrong.items():
        print(f"{complaint}: {len(ids)} tasks, {ids[:EXAMPLES_MAX]}", file=sys.stderr)
    yield run.figure(
        case=f"{run.size('seconds')} s, {fleet.kills} kills, {restarts} restarts",
        unit="wrong",
        value=sum(map(len, wrong.values())) + len(fleet.complaints),
        marks=MARKS,
        details={
            **counts,
            "kills": fleet.kills,
            "restarts": restarts,
            "schedules that raised": load.errors,
            "seconds to end": round(seconds_to_end, 1),
            "wrong": {complaint: len(ids) for complaint, ids in wrong.items()},
            "consumers": fleet.complaints,
        },
    )


def _rage(run: Run, fleet: Fleet, load: Load) -> int:
    """Kill and restart until the time is over; return how often the server restarted."""
    begin, restarts = time.monotonic(), 0
    server, seconds = run.place.server, run.sizes["seconds"]
    distance = seconds / (run.size("restarts") + 1)
    next_kill = random.uniform(*KILL_SECONDS)
    while (passed := time.monotonic() - begin) < seconds:
        if server is not None and passed > distance * (restarts + 1):
            server.restart(immediate=restarts % 2 == 0)
            restarts += 1
        if passed > next_kill:
            fleet.kill_one()
            next_kill = passed + random.uniform(*KILL_SECONDS)
        fleet.look()
        if not load.is_alive() and len(load.acknowledged) < run.size("tasks"):
            message = "the thread that schedules has ended; see above"
            raise RuntimeError(message)
        time.sleep(LOOK_SECONDS)
    return restarts


def _await_end(fleet: Fleet) -> float:
    """Wait until every task has ended, within bounds; return the seconds that took."""
    begin = time.monotonic()
    ended = [status for status in Status if status.is_terminal]
    while (passed := time.monotonic() - begin) < END_SECONDS:
        fleet.look()
        try:
            if not TaskModel.objects.exclude(status__in=ended).exists():
                break
        except Error:
            # The connection is from before a restart.
            connections.close_all()
        time.sleep(LOOK_SECONDS)
    return passed
