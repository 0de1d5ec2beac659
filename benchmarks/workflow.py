"""``workflow``: a step, very many that insert a row, and one behind all of them.

Beside the same calls without a workflow; and how long the last one waits for its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from django.db import connection
from django.utils import timezone

from firefly_jobs import Workflow, schedule_many
from firefly_jobs.models import TaskModel, WorkflowStep
from firefly_jobs.wakeup import announce

from . import consumers, tables, tasks
from .figures import Figure, Mark
from .run import Run, medians

RATIO = Mark(of="ratio", at_least=0.80)
WAITS = {"postgresql": (Mark(below=200.0),)}


def measure(run: Run) -> Iterator[Figure]:
    """Drain a workflow, in turns with as many plain calls."""
    processes, threads = run.processes(), run.size("threads")
    waits: list[float] = []

    def of_workflow() -> float:
        _fill_workflow(run.size("tasks"))
        found = _drained(run, processes, threads, step__name="first")
        waits.append(_milliseconds_waited())
        return found

    def of_calls() -> float:
        _fill_calls(run.size("tasks"))
        return _drained(run, processes, threads)

    yield run.figure(
        case=f"1, {run.size('tasks') - 2:,} and 1 steps, {consumers.extent(processes, threads)}",
        unit="tasks/s",
        reference_name="ours without a workflow",
        marks=(RATIO,),
        **medians(run.in_turns(of_workflow, of_calls)),
    )
    yield run.figure(
        case="from the last parent's end to the start",
        unit="ms",
        marks=WAITS.get(run.kind, ()),
        value=sorted(waits)[len(waits) // 2],
        samples=waits,
    )


def _fill_workflow(count: int) -> None:
    tables.empty(tables.TASKS, tables.EFFECTS)
    plan = Workflow("benchmark")
    first = plan.add(tasks.insert.job.with_args(0).with_eta(_later()), name="first")
    middle = [
        plan.add(tasks.insert.job.with_args(n), name=str(n), depends_on=first)
        for n in range(1, count - 1)
    ]
    plan.add(tasks.insert.job.with_args(count), name="last", depends_on=middle)
    plan.schedule()


def _fill_calls(count: int) -> None:
    tables.empty(tables.TASKS, tables.EFFECTS)
    schedule_many(tasks.insert.job.with_args(n).with_eta(_later()) for n in range(count))


def _later() -> datetime:
    return timezone.now() + timedelta(days=1)


def _drained(run: Run, processes: int, threads: int, **due: str) -> float:
    """Let all rows start, or those ``due``, and return the tasks per second."""
    tables.settle(tables.TASKS)
    options = consumers.arguments(processes=processes, threads=threads)
    # No burst: while only the first step is due, all processes but one would end at once.
    with consumers.consumer(run.place.url, *options) as process:
        consumers.await_registered(process, processes=processes)
        TaskModel.objects.filter(**due).update(not_before=None)
        announce(connection.alias, ("default",))
        tables.await_drained(process)
    count = run.size("tasks")
    tables.check_inserted(count)
    return tables.rate(tables.TASKS, count)


def _milliseconds_waited() -> float:
    last = WorkflowStep.objects.get(name="last").task
    before = TaskModel.objects.exclude(pk=last.pk).latest("completed")
    assert last.started is not None
    assert before.completed is not None
    return (last.started - before.completed).total_seconds() * 1000
