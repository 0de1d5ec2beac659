"""``memory``: by how much a consumer grows over very many tasks, once it has warmed up."""

from __future__ import annotations

from collections.abc import Iterator

from . import consumers, procfs, tables, tasks
from .figures import Figure, Mark
from .run import Run

MARKS = (Mark(below=5.0),)
WARM_UP_SHARE = 0.1


def measure(run: Run) -> Iterator[Figure]:
    """Run tasks that do nothing, then such that insert a row."""
    for name, task in (("no-op", tasks.noop), ("one INSERT each", tasks.insert)):
        count = run.size("tasks")
        first = int(count * WARM_UP_SHARE)
        tables.empty(tables.TASKS, tables.EFFECTS)
        with consumers.consumer(run.place.url) as process:
            sizes = []
            for rows in (first, count):
                tables.multiply(task, rows)
                tables.await_drained(process)
                sizes.append(procfs.resident_mb(process.pid))
        tables.seconds_taken(tables.TASKS, first + count)
        yield run.figure(
            case=f"{name}, growth over {count:,} after {first:,}",
            unit="MB",
            value=sizes[1] - sizes[0],
            marks=MARKS,
            details={"resident": f"{sizes[0]:.1f} MB, then {sizes[1]:.1f} MB"},
        )
