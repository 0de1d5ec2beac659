"""``drain-db``: how fast tasks run that insert a row, beside a hand-written loop with the ORM.

Each task's effects and its completion are a commit of their own, in the loop as well.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import consumers, loops, tables, tasks
from .figures import Figure, Mark
from .run import Run, medians

MARKS = {"postgresql": (Mark(of="ratio", at_least=0.70), Mark(at_least=2_500))}


def measure(run: Run) -> Iterator[Figure]:
    """Drain in turns with a loop of as many processes and threads."""
    url, count = run.place.url, run.size("tasks")
    processes, threads = run.processes(), run.size("threads")
    yield run.figure(
        case=f"one INSERT each, {consumers.extent(processes, threads)}",
        unit="tasks/s",
        reference_name=f"ORM loop, {consumers.extent(processes, threads)}",
        marks=MARKS.get(run.kind, ()),
        **medians(
            run.in_turns(
                lambda: rate(run, processes, threads),
                lambda: loops.rate(url, "orm", str(threads), tasks=count, processes=processes),
            )
        ),
    )


def rate(run: Run, processes: int, threads: int, *words: str) -> float:
    """Return the tasks per second of a consumer with these options."""
    count = run.size("tasks")
    tables.fill_tasks(tasks.insert, count)
    options = consumers.arguments(processes=processes, threads=threads)
    consumers.drain(run.place.url, *options, *words)
    found = tables.rate(tables.TASKS, count)
    tables.check_inserted(count)
    return found
