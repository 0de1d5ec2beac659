"""``drain-group``: tasks that insert a row with group commit, beside the same without."""

from __future__ import annotations

from collections.abc import Iterator

from . import consumers, drain_db
from .figures import Figure, Mark
from .run import Run, medians

OPTION = "--group-commit"
MARKS = {"postgresql": (Mark(of="ratio", at_least=3.0),)}


def measure(run: Run) -> Iterator[Figure]:
    """Drain with group commit, in turns with our own figure of ``drain-db``."""
    processes, threads = run.processes(), run.size("threads")
    yield run.figure(
        case=f"one INSERT each, {consumers.extent(processes, threads)}",
        unit="tasks/s",
        reference_name="ours without group commit",
        marks=MARKS.get(run.kind, ()),
        **medians(
            run.in_turns(
                lambda: drain_db.rate(run, processes, threads, OPTION),
                lambda: drain_db.rate(run, processes, threads),
            )
        ),
    )
