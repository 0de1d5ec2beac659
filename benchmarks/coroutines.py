"""``async``: very many coroutines that sleep for a second, in one process.

Beside it: bare ``asyncio.gather`` of as many sleeps, which stores nothing.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from . import consumers, procfs, tables, tasks
from .figures import Figure, Mark
from .run import Run

SECONDS_MARKS = (Mark(below=6.0),)
MEMORY_MARKS = (Mark(below=300.0),)
GATHER = """
import asyncio, pathlib, sys, time
async def main(count):
    begin = time.perf_counter()
    await asyncio.gather(*(asyncio.sleep(1) for _ in range(count)))
    return time.perf_counter() - begin
seconds = asyncio.run(main(int(sys.argv[1])))
(peak,) = [line.split()[1] for line in pathlib.Path("/proc/self/status").read_text().splitlines()
           if line.startswith("VmHWM:")]
print(seconds, int(peak) * 1024 / 1e6)
"""


def measure(run: Run) -> Iterator[Figure]:
    """Start a consumer on that many due coroutines; read its memory before it ends."""
    count = run.size("tasks")
    gathered, ours = [], []
    for _ in range(run.rounds):
        gathered.append(_gather(count))
        ours.append(_ours(run, count))
    for position, (name, unit, marks) in enumerate(
        [("seconds", "s", SECONDS_MARKS), ("memory at most", "MB", MEMORY_MARKS)]
    ):
        samples = tuple(one[position] for one in ours)
        yield run.figure(
            case=f"{count:,} x asyncio.sleep(1), {name}",
            unit=unit,
            value=median(samples),
            samples=samples,
            reference=median(one[position] for one in gathered),
            reference_name="asyncio.gather",
            marks=marks,
        )


def _ours(run: Run, count: int) -> tuple[float, float]:
    """Return the seconds from the first start to the last completion, and the peak in MB."""
    tables.fill_tasks(tasks.sleep, count)
    words = consumers.arguments(async_slots=count)
    with consumers.consumer(run.place.url, *words) as process:
        tables.await_drained(process)
        peak = procfs.peak_mb(process.pid)
    return tables.seconds_taken(tables.TASKS, count), peak


def _gather(count: int) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", GATHER, str(count)], capture_output=True, text=True, check=True
    )
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak
