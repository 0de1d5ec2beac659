"""``drain``: how fast tasks run that do nothing, beside the hand-written SQL loop."""

from __future__ import annotations

from collections.abc import Iterator

from . import consumers, loops, tables, tasks
from .figures import Figure, Mark
from .run import Run, medians

MARKS = {
    "postgresql": (Mark(of="ratio", at_least=0.60),),
    "mariadb": (Mark(of="ratio", at_least=0.25),),
    "sqlite": (Mark(of="ratio", at_least=0.25), Mark(at_least=20_000)),
}


def measure(run: Run) -> Iterator[Figure]:
    """Drain in turns with the loop; on a server with several processes and with one."""
    yield _measure(run, run.processes(), marks=MARKS[run.kind])
    if run.processes() > 1:
        yield _measure(run, 1)


def _measure(run: Run, processes: int, *, marks: tuple[Mark, ...] = ()) -> Figure:
    url, count, threads = run.place.url, run.size("tasks"), run.size("threads")
    loop = "claim 10, finish each" if run.kind == "sqlite" else "claim 100, finish 100"

    def ours() -> float:
        tables.fill_tasks(tasks.noop, count)
        consumers.drain(url, *consumers.arguments(processes=processes, threads=threads))
        return tables.rate(tables.TASKS, count)

    return run.figure(
        case=f"no-op, {consumers.extent(processes, threads)}",
        unit="tasks/s",
        reference_name=f"SQL loop ({loop}), {processes} processes",
        marks=marks,
        **medians(
            run.in_turns(ours, lambda: loops.rate(url, "sql", tasks=count, processes=processes))
        ),
    )
