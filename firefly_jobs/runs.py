"""What people ask of a workflow that is scheduled, and what they add to it.

The verbs of ``WorkflowModel`` with the same names hand over to these functions.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from threading import Event
from time import monotonic
from typing import Any

from django.db import connections
from django.db.models import F, Max

from . import databases, enqueue
from .conf import get_settings, suggestion
from .exceptions import WorkflowError
from .fencing import held
from .following import NOT_FOLLOWED
from .graphs import END_RANK, When
from .jobs import Job
from .lines import tried_again
from .models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowModel, WorkflowStep
from .options import LABEL_LENGTH_MAX, check_step_name
from .placeholders import ParentResults, StepResult, placeholders_in
from .references import TaskReference, timeout_seconds_of
from .states import Status, WorkflowStatus
from .workflow_models import IS_IGNORED

# How often a workflow is looked at that stands still.
STILL_SECONDS = 0.2
_PARENT_RESULTS = "parent_results"
_COLOURS = {
    Status.CREATED: "fill:#e7effb,stroke:#4a74b5",
    Status.BLOCKED: "fill:#f2f2f2,stroke:#8a8a8a",
    Status.RUNNING: "fill:#fff3cf,stroke:#b58a1a",
    Status.COMPLETED: "fill:#dff3e1,stroke:#3c8a49",
    Status.FAILED: "fill:#fbdedc,stroke:#b5443c",
    Status.CANCELLED: "fill:#eae4ee,stroke:#7c6a8a",
}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a workflow is.

    Attributes:
        done: How many of its steps have ended.
        total: How many steps it has.
        by_status: How many are in each state.
    """

    done: int
    total: int
    by_status: dict[str, int]


def progress_of(run: WorkflowModel) -> Progress:
    """Return how far a workflow is, in one query."""
    found = Counter(_steps_of(run).values_list("task__status", flat=True))
    done = sum(count for status, count in found.items() if Status(status).is_terminal)
    return Progress(done, found.total(), dict(found))


def ignored_failures_of(run: WorkflowModel, *, limit: int | None = None) -> list[str]:
    """Return the names of the steps whose failure was ignored."""
    ignored = _steps_of(run).alias(ignored=IS_IGNORED).filter(ignored=True)
    failed = ignored.filter(task__status=Status.FAILED)
    return list(failed.order_by("pk").values_list("name", flat=True)[:limit])


def wait(run: WorkflowModel, timeout: float | timedelta | None) -> None:
    """Wait until a workflow has ended, and read it anew.

    Raises:
        TimeoutError: If it has not ended in time.
        WaitInsideTransactionError: If it has not ended, and a transaction is open here.
    """
    seconds = timeout_seconds_of(timeout)
    deadline = None if seconds is None else monotonic() + seconds
    while True:
        # It ends in the same transaction as the last of its steps.
        step = _steps_of(run).exclude(task__status__in=_terminal()).order_by("-pk").first()
        run.refresh_from_db()
        if run.status != WorkflowStatus.RUNNING:
            return
        left = None if deadline is None else max(deadline - monotonic(), 0.0)
        if step is None:
            # Rows were changed by hand; a consumer's sweep lets it go on.
            if left == 0:
                message = f"Workflow {run} has not ended in time, though all its steps have."
                raise TimeoutError(message)
            Event().wait(STILL_SECONDS if left is None else min(left, STILL_SECONDS))
            continue
        TaskReference(step.pk, using=run._state.db).wait_finished(left)


def _terminal() -> list[Status]:
    return [status for status in Status if status.is_terminal]


def _steps_of(run: WorkflowModel) -> Any:
    return WorkflowStep.objects.using(run._state.db).filter(workflow=run.pk)


# --- adding


def add(
    run: WorkflowModel,
    job: Any,
    *,
    name: str | None,
    depends_on: Any,
    ignore_result: bool,
    when: When,
) -> TaskModel:
    """Add a step to a workflow that has not ended, in the caller's transaction.

    Args:
        run: The workflow.
        job: A job, or a task that is called without arguments.
        name: Its name; by default as for :meth:`Workflow.add`.
        depends_on: Names of steps, their rows, or a list of both.
        ignore_result: Whether its failure stops nothing.
        when: What has to become of those.

    Returns:
        The row.

    Raises:
        WorkflowError: If the workflow has ended or stops, or a name is taken or unknown.
    """
    using = run._state.db or "default"
    job = job if isinstance(job, Job) else Job(job)
    if (alias := job.options.database or get_settings().DATABASE) != using:
        message = f"A job of database {alias!r} cannot be a step of workflow {run}, of {using!r}."
        raise WorkflowError(message)
    named = [p.step for p in placeholders_in((job.args, job.kwargs)) if isinstance(p, StepResult)]

    def work() -> TaskModel:
        asked = {"depends_on": depends_on, "named": named, "when": when}
        return _add(run, job, name, ignore_result=ignore_result, using=using, **asked)

    # It locks rows before gates, as who ends a step does, and who cancels the other way round.
    return tried_again(work, using=using)


def _add(
    run: WorkflowModel,
    job: Job,
    name: str | None,
    *,
    depends_on: Any,
    named: Sequence[str],
    ignore_result: bool,
    when: When,
    using: str,
) -> TaskModel:
    with databases.of(using).write_transaction(connections[using]):
        # What is taken from others asks for their success, unless it is said otherwise.
        asked = dict.fromkeys(_resolved(run, named), When.SUCCESS)
        asked |= dict.fromkeys(_resolved(run, depends_on), when)
        parents = {step.pk: step for step in asked}
        conditions = {step.pk: condition for step, condition in asked.items()}
        waits_for = _lock_parents(run, parents, conditions, using)
        end = WorkflowGate.objects.using(using).filter(workflow=run, rank=END_RANK)
        row: TaskModel = with_parent_results(job, [step.name for step in asked]).row()
        row.next_gate = end.values_list("pk", flat=True).first()
        waiting = (0,) if waits_for else ()
        enqueue.insert_steps([row], workflow=run.pk, waiting=waiting, using=using)
        # The end comes after all other locks: whoever ends a step locks it after all other gates.
        is_open = WorkflowModel.objects.using(using).filter(
            pk=run.pk, status=WorkflowStatus.RUNNING, error="", is_cancelled=False
        )
        if not end.filter(waiting_for__gt=0).update(waiting_for=F("waiting_for") + 1) or not (
            is_open.exists()
        ):
            message = f"Workflow {run} has ended, or stops, so nothing can be added to it."
            raise WorkflowError(message)
        gate = None
        if parents:
            # Open at once if all of them have ended; should they run again, it is waited at.
            rank = _steps_of(run).filter(pk__in=parents).aggregate(Max("gate__rank"))
            gate = WorkflowGate.objects.using(using).create(
                workflow=run, rank=1 + _or(rank["gate__rank__max"], -1), waiting_for=len(waits_for)
            )
        step = WorkflowStep(
            task_id=row.pk,
            workflow=run,
            # Nobody else can add one, and take the name, before this transaction has ended.
            name=_free_name(run, name, job),
            gate=gate,
            ignore_result=ignore_result,
            is_cleanup=any(when is not When.SUCCESS for when in conditions.values()),
        )
        step.save(using=using, force_insert=True)
        edges = [WorkflowEdge(gate=gate, step_id=pk, when=when) for pk, when in conditions.items()]
        edges.append(WorkflowEdge(gate=end.get(), step_id=row.pk, when=When.ENDED))
        WorkflowEdge.objects.using(using).bulk_create(edges)
    return row


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _resolved(run: WorkflowModel, depends_on: Any) -> list[WorkflowStep]:
    if depends_on is None:
        return []
    if isinstance(depends_on, str | TaskModel) or not isinstance(depends_on, Iterable):
        depends_on = [depends_on]
    found = []
    for parent in depends_on:
        steps = _steps_of(run)
        key = {"pk": parent.pk} if isinstance(parent, TaskModel) else {"name": parent}
        step = steps.filter(**key).first()
        if step is None:
            names = list(steps.values_list("name", flat=True)[:1_000])
            hint = suggestion(parent, names) if isinstance(parent, str) else ""
            message = f"{parent!r} is no step of workflow {run}.{hint}"
            raise WorkflowError(message)
        found.append(step)
    return found


def _lock_parents(
    run: WorkflowModel, parents: dict[int, WorkflowStep], asked: dict[int, When], using: str
) -> list[int]:
    """Return those of ``parents`` that have yet to be counted, and keep them from it meanwhile."""
    rows = TaskModel.objects.using(using).filter(pk__in=list(parents)).order_by("pk")
    locked = rows.select_for_update().values_list("pk", "status", "fence", "next_gate")
    waits_for = []
    for pk, status, fence, next_gate in locked:
        if not Status(status).is_terminal or next_gate == NOT_FOLLOWED:
            waits_for.append(pk)
        elif not asked[pk].is_met(Status(status), is_ignored=parents[pk].is_ignored):
            message = (
                f"A step of workflow {run} cannot depend on {parents[pk].name!r}, which is "
                f"{status}."
            )
            raise WorkflowError(message)
        if status == Status.RUNNING:
            # It counts at another gate as well from now on; so does whoever waits.
            held(using, fence, pk).update(next_gate=None)
    rows.filter(status__in=[Status.CREATED, Status.BLOCKED]).update(next_gate=None)
    return waits_for


def _free_name(run: WorkflowModel, name: str | None, job: Job) -> str:
    steps = _steps_of(run)
    if name is not None:
        if steps.filter(name=check_step_name(name)).exists():
            message = f"Workflow {run} has a step {name!r} already; names are unique."
            raise WorkflowError(message)
        return name
    found = job.default_name[:LABEL_LENGTH_MAX]
    if not steps.filter(name=found).exists():
        return found
    stem = found[: LABEL_LENGTH_MAX - 8]
    # Mostly those that are counted are all of its own.
    number = 2 + steps.filter(name__startswith=f"{stem}-").count()
    while steps.filter(name=f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def with_parent_results(job: Job, parents: Sequence[str]) -> Job:
    """Return a job that gets the results of steps, if its function takes them.

    Args:
        job: The job.
        parents: The names of the steps that it depends on.
    """
    signature = job.task.signature
    is_taken = _PARENT_RESULTS in signature.plain.parameters
    if not is_taken or _PARENT_RESULTS in job.kwargs:
        return job
    try:
        if _PARENT_RESULTS in signature.bind(job.args, job.kwargs).arguments:
            return job
    except TypeError:
        pass
    return job.with_kwargs(parent_results=ParentResults(tuple(dict.fromkeys(parents))))


# --- a picture


def edges_of(run: WorkflowModel) -> list[tuple[int, int, When]]:
    """Return who waits for whom, as ids of steps: ``(parent, child, when)``.

    What waits for a whole level of priorities is not told step by step.
    """
    parents = ParentsByGate(run)
    waiting = _steps_of(run).exclude(gate=None).order_by("pk").values_list("pk", "gate")
    return [(parent, child, when) for child, gate in waiting for parent, when in parents.of(gate)]


class ParentsByGate:
    """Which steps are asked for at the gates of a workflow, read in two queries.

    Args:
        run: The workflow.
        edges_max: Edges that may be read; ``None`` reads all.
    """

    def __init__(self, run: WorkflowModel, *, edges_max: int | None = None) -> None:
        edges = WorkflowEdge.objects.using(run._state.db)
        limit = None if edges_max is None else edges_max + 1
        # By what they come from: gates have no index of what counts at them.
        links = edges.filter(source__workflow=run.pk).values_list("gate", "source")
        told = edges.filter(step__workflow=run.pk).exclude(when=When.ENDED)
        self._sources: defaultdict[int, list[int]] = defaultdict(list)
        self._steps: defaultdict[int, list[tuple[int, When]]] = defaultdict(list)
        count = 0
        for gate, source in links[:limit]:
            self._sources[gate].append(source)
            count += 1
        for gate, step, when in told.values_list("gate", "step", "when")[:limit]:
            self._steps[gate].append((step, When(when)))
            count += 1
        # Whether all edges were read.
        self.is_complete = edges_max is None or count <= edges_max

    def of(self, gate: int) -> list[tuple[int, When]]:
        """Return the steps that a gate waits for, in order, and what is asked of them."""
        return sorted(pair for one in self.gates_behind(gate) for pair in self._steps[one])

    def gates_behind(self, gate: int) -> Iterator[int]:
        """Yield a gate, and all that have to open before it."""
        todo = deque([gate])
        while todo:
            one = todo.popleft()
            yield one
            todo += self._sources[one]


def as_mermaid(run: WorkflowModel) -> str:
    """Return the workflow as a Mermaid flowchart, coloured by status."""
    steps = list(
        _steps_of(run).order_by("pk").values_list("pk", "name", "priority", "task__status")
    )
    levels = sorted({priority for _, _, priority, _ in steps}, reverse=True)
    lines = ["flowchart TD"]
    for level in levels:
        if len(levels) > 1:
            lines.append(f'    subgraph level{_id(level)}["priority {level}"]')
        lines += [
            f'    s{pk}["{_escaped(name)}"]:::{status}'
            for pk, name, priority, status in steps
            if priority == level
        ]
        if len(levels) > 1:
            lines.append("    end")
    for above, below in pairwise(levels):
        lines.append(f"    level{_id(above)} --> level{_id(below)}")
    for parent, child, when in edges_of(run):
        arrow = "-->" if when is When.SUCCESS else f"-. {when} .->"
        lines.append(f"    s{parent} {arrow} s{child}")
    lines += [f"    classDef {status} {colour}" for status, colour in _COLOURS.items()]
    return "\n".join(lines) + "\n"


def _id(level: int) -> str:
    return str(level).replace("-", "minus")


def _escaped(name: str) -> str:
    return "".join(c if c.isalnum() or c in " ._-()/" else f"#{ord(c)};" for c in name)
