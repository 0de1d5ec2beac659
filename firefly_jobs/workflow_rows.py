"""Write a workflow's plan as rows: the run, its gates, its steps and what counts where.

All of it is one transaction, or belongs to the caller's.  From then on ``dependencies``
moves the counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from django.db import connections

from . import databases, enqueue, messenger
from .declarations import Occurrence
from .graphs import Node, Plan, When
from .models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowModel, WorkflowStep

_BATCH = 1_000


class NewStep(NamedTuple):
    """A step that is to be written."""

    row: TaskModel
    node: Node
    ignore_result: bool


def insert(
    name: str,
    steps: Sequence[NewStep],
    plan: Plan,
    *,
    last: Mapping[str, TaskModel],
    using: str,
    occurrence: Occurrence | None = None,
) -> WorkflowModel:
    """Write a run of a workflow.

    Args:
        name: Its name.
        steps: Its steps.
        plan: The gates they wait at.
        last: Unwritten rows of calls that wait for its end: ``on_success``, ``on_failure``.
        using: Database alias.
        occurrence: Which start of which schedule it is.

    Returns:
        The run.

    Raises:
        TaskAlreadyScheduled: If another row has the unique key of a step.
    """
    with databases.of(using).write_transaction(connections[using]):
        run = WorkflowModel(name=name)
        if occurrence is not None:
            run.schedule_id, run.occurrence = occurrence.schedule, occurrence.moment
            run.is_manual = occurrence.is_manual
        run.save(using=using, force_insert=True)
        gates = _insert_gates(run, plan, using)
        waiting = {n for n, place in enumerate(plan.places) if place is not None}
        waiting.update(range(len(steps), len(steps) + len(last)))
        for step, gate in zip(steps, _next_gates(len(steps), plan, gates), strict=True):
            step.row.next_gate = gate
        if occurrence is not None and occurrence.due is not None:
            for n, step in enumerate(steps):
                if n not in waiting and step.row.not_before is None:
                    step.row.not_before = occurrence.due
        rows = [*(step.row for step in steps), *last.values()]
        enqueue.insert_steps(rows, workflow=run.pk, waiting=waiting, using=using)
        _insert_steps(run, steps, [None if n is None else gates[n] for n in plan.places], using)
        _insert_edges(steps, plan, gates, using)
        if last:
            changes = {word: row.pk for word, row in last.items()}
            WorkflowModel.objects.using(using).filter(pk=run.pk).update(**changes)
            for word, pk in changes.items():
                setattr(run, word, pk)
        messenger.workflow_started(run, using=using)
    return run


def _insert_gates(run: WorkflowModel, plan: Plan, using: str) -> list[int]:
    """Write the gates, and return their ids in the same order, which is that of their ranks."""
    gates = [WorkflowGate(workflow=run, rank=g.rank, waiting_for=g.count) for g in plan.gates]
    written = WorkflowGate.objects.using(using).bulk_create(gates, batch_size=_BATCH)
    ids = [gate.pk for gate in written]
    if None not in ids:
        return ids
    # MySQL does not tell them; they rise in the order in which the gates were written.
    found = WorkflowGate.objects.using(using).filter(workflow=run).order_by("pk")
    return list(found.values_list("pk", flat=True))


def _next_gates(count: int, plan: Plan, gates: Sequence[int]) -> list[int | None]:
    """Return the gate at which alone the success of each step counts, if there is one."""
    edges: list[list[tuple[int, When]]] = [[] for _ in range(count)]
    for pk, gate in zip(gates, plan.gates, strict=True):
        for dependency in gate.steps:
            edges[dependency.parent].append((pk, dependency.when))
    return [
        found[0][0] if len(found) == 1 and found[0][1] is not When.FAILURE else None
        for found in edges
    ]


def _insert_steps(
    run: WorkflowModel, steps: Sequence[NewStep], gates: Sequence[int | None], using: str
) -> None:
    WorkflowStep.objects.using(using).bulk_create(
        [
            WorkflowStep(
                task_id=step.row.pk,
                workflow=run,
                name=step.node.name,
                priority=step.node.priority,
                gate_id=gate,
                ignore_result=step.ignore_result,
                is_cleanup=any(d.when is not When.SUCCESS for d in step.node.parents),
            )
            for step, gate in zip(steps, gates, strict=True)
        ],
        batch_size=_BATCH,
    )


def _insert_edges(steps: Sequence[NewStep], plan: Plan, gates: Sequence[int], using: str) -> None:
    edges = [
        WorkflowEdge(gate_id=pk, step_id=steps[d.parent].row.pk, when=d.when)
        for pk, gate in zip(gates, plan.gates, strict=True)
        for d in gate.steps
    ]
    edges += [
        # It opens unmet if what it counted was, and so it counts as failed.
        WorkflowEdge(gate_id=pk, source_id=gates[source], when=When.SUCCESS)
        for pk, gate in zip(gates, plan.gates, strict=True)
        for source in gate.gates
    ]
    WorkflowEdge.objects.using(using).bulk_create(edges, batch_size=_BATCH)
