"""Set the counters of a workflow from its rows: to run again what failed, or where it stands still.

Who ends a step moves counters (``dependencies``).  Here nothing is moved: the gates are set to
what they count, the ends that stand are counted off anew, and whoever that lets go, goes.

Should a count be lost in spite of all (rows changed by hand, a process that ended between a
commit and what was to follow it), :func:`sweep` finds the workflow that stands still.
"""

from __future__ import annotations

import logging
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from time import monotonic
from typing import Any

from django.db import Error, IntegrityError, connections, transaction
from django.db.models import Exists, F, OuterRef, QuerySet

from . import databases, enqueue, events, following, tallies
from .columns import revived_columns
from .dependencies import Walk, finish_stopping
from .exceptions import TaskAlreadyScheduled
from .graphs import END_RANK, When
from .leftovers import left_over
from .lines import tried_again
from .models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowModel, WorkflowStep
from .states import Status, WorkflowStatus
from .unique import holder_of
from .workflow_models import IS_IGNORED

logger = logging.getLogger("firefly_jobs")

# Workflows that one sweep looks at.
SWEEP_MAX = 1_000
_BATCH = 1_000
_ENDED = [status for status in Status if status.is_terminal]


def retry_failed(workflow: int, *, using: str) -> int:
    """Run again what failed in an ended workflow, and what was cancelled; return how many.

    Raises:
        TaskAlreadyScheduled: If another row has the unique key of one by now; then nothing is
            changed.
    """
    return tried_again(partial(_retry_failed, workflow, using), using=using)


def _retry_failed(workflow: int, using: str) -> int:
    with databases.of(using).own_transaction(connections[using]):
        row = _locked(workflow, using).first()
        if row is None or row.status not in {WorkflowStatus.FAILED, WorkflowStatus.CANCELLED}:
            return 0
        steps = WorkflowStep.objects.using(using).filter(workflow=workflow)
        again = [
            *steps.alias(ignored=IS_IGNORED)
            .filter(task__status=Status.FAILED, ignored=False)
            .values_list("pk", flat=True),
            *steps.filter(task__status=Status.CANCELLED).values_list("pk", flat=True),
            *_last_calls(row).values(),
        ]
        for start in range(0, len(again), _BATCH):
            _revive(again[start : start + _BATCH], workflow, using)
        # All others have ended.
        _hold_the_end(steps.exclude(task__status__in=_ENDED), workflow, using)
        _replace_last_calls(row, using)
        WorkflowModel.objects.using(using).filter(pk=workflow).update(
            status=WorkflowStatus.RUNNING, error="", is_cancelled=False, ended=None
        )
        tallies.count_revived([row.schedule_id], using=using)
        _Rebuilding(workflow, using).rebuild()
        return len(again)


def sweep(*, using: str, seconds: float | None = None) -> int:
    """Let workflows go on that stand still, and finish those that stop; return how many stood.

    Args:
        using: Database alias.
        seconds: Begin with none after that; there is a next sweep, in another order.
    """
    ends_at = float("inf") if seconds is None else monotonic() + seconds
    stopping = left_over(using=using).order_by("workflow").values_list("workflow", flat=True)
    ends = set(stopping.distinct()[:SWEEP_MAX])
    tasks = TaskModel.objects.using(using).filter(workflow=OuterRef("pk"))
    moving = tasks.filter(status__in=[Status.CREATED, Status.RUNNING])
    in_line = tasks.filter(status=Status.BLOCKED, limit_key__isnull=False)
    running = WorkflowModel.objects.using(using).filter(status=WorkflowStatus.RUNNING)
    still = running.filter(~Exists(moving), ~Exists(in_line)).order_by("pk")
    stand = set(still.values_list("pk", flat=True)[:SWEEP_MAX])
    count = 0
    # So that no locked one is always before the others.
    for workflow in random.sample(sorted(ends | stand), len(ends | stand)):
        if monotonic() >= ends_at:
            break
        if workflow in ends:
            finish_stopping(workflow, using=using, waits=False)
        if workflow not in stand:
            continue
        try:
            count += _let_go_on(workflow, still, using)
        except Error as error:
            if not databases.of(using).is_conflict(error):
                raise
            logger.info("Workflow %s stands still, and is locked by another session", workflow)
    return count


def _let_go_on(workflow: int, still: QuerySet[WorkflowModel], using: str) -> bool:
    """Let a workflow go on if it is still among those that stand still; return whether it was."""
    with databases.of(using).own_transaction(connections[using]):
        walk = _Rebuilding(workflow, using)
        # In this order, as who cuts a workflow short writes so into its row.
        walk.lock_gates()
        list(_locked(workflow, using).values_list("pk"))
        if not still.filter(pk=workflow).exists():
            return False
        walk.rebuild()
    logger.warning("Workflow %s stood still, and was let go on", workflow)
    return True


def _locked(workflow: int, using: str) -> QuerySet[WorkflowModel]:
    return WorkflowModel.objects.using(using).select_for_update().filter(pk=workflow)


def _revive(ids: Sequence[int], workflow: int, using: str) -> None:
    """Let ended rows wait for their turn once more.

    Raises:
        TaskAlreadyScheduled: If another row has the unique key of one.
    """
    reviving = TaskModel.objects.using(using).filter(pk__in=ids, status__in=_ENDED)
    try:
        with transaction.atomic(using=using):
            events.reviving(reviving, using=using)
            reviving.update(
                **revived_columns() | {"status": Status.BLOCKED, "active_key": F("unique_key")}
            )
            # What a hook has said was about the failure that was.
            WorkflowStep.objects.using(using).filter(pk__in=ids).update(is_forgiven=None)
    except IntegrityError:
        raise _taken(reviving, workflow, using) from None


def _hold_the_end(revived: QuerySet[WorkflowStep], workflow: int, using: str) -> None:
    """Let those count at the end of the workflow behind whom nobody else who runs again does.

    What nothing waits for tells the end, as all others end before it; but a clean-up that has
    completed stays so, and what it had waited for runs again.
    """
    edges = WorkflowEdge.objects.using(using)
    gates = WorkflowGate.objects.using(using).filter(workflow=workflow)
    end = gates.get(rank=END_RANK)
    before: defaultdict[int, list[int]] = defaultdict(list)
    for source, gate in edges.filter(source__in=gates).values_list("source", "gate"):
        before[gate].append(source)
    # Gates that open late enough: one who runs again waits there, or the end does.
    late = {end.pk, *revived.filter(gate__isnull=False).values_list("gate", flat=True).distinct()}
    found = list(late)
    while found:
        further = [gate for gate in before[found.pop()] if gate not in late]
        late.update(further)
        found += further
    ends_early = set(revived.values_list("pk", flat=True))
    for step, gate in edges.filter(step__in=revived).values_list("step", "gate"):
        if gate in late:
            ends_early.discard(int(step))
    ids = sorted(ends_early)
    edges.bulk_create(
        [WorkflowEdge(step_id=pk, gate=end, when=When.ENDED) for pk in ids], batch_size=_BATCH
    )
    # Their rows may name one gate that is behind them, and there is another one now.
    for start in range(0, len(ids), _BATCH):
        rows = TaskModel.objects.using(using).filter(
            pk__in=ids[start : start + _BATCH], status=Status.BLOCKED
        )
        rows.update(next_gate=None)


def _taken(rows: QuerySet[TaskModel], workflow: int, using: str) -> TaskAlreadyScheduled:
    """Return what says which of ``rows`` has a unique key that another row has, too."""
    former: TaskModel | None = None
    keyed = rows.filter(unique_key__isnull=False).order_by("unique_key", "pk")
    for row in keyed.only("func_name", "status", "unique_key"):
        existing = holder_of(row.unique_key, connections[using])
        if existing is None and former is not None and former.unique_key == row.unique_key:
            # Both had it, one after the other.
            existing = former
        if existing is not None:
            step = WorkflowStep.objects.using(using).filter(pk=row.pk).first()
            who = f"Task {row.pk} ({row.func_name})" if step is None else f"Step {step.name!r}"
            message = (
                f"{who} of workflow {workflow} cannot run again: its unique key "
                f"{row.unique_key!r} belongs to task {existing.pk} ({existing.func_name}) by now, "
                f"which is {existing.status}. Nothing was changed."
            )
            return TaskAlreadyScheduled(message, existing)
        former = row
    message = (
        f"A unique key in workflow {workflow} changed hands while it was to run again, so nothing "
        f"was changed; try again."
    )
    return TaskAlreadyScheduled(message, None)


def _last_calls(row: WorkflowModel) -> dict[str, int]:
    """Return the ids of the calls that wait for the end, by their columns."""
    found = {"on_success": row.on_success, "on_failure": row.on_failure}
    return {column: pk for column, pk in found.items() if pk is not None}


def _replace_last_calls(row: WorkflowModel, using: str) -> None:
    """Let other calls wait for the next end in place of those that are still about the former.

    Those go on: somebody was promised a call for that end, and only its consumer may change a
    row that runs.

    Raises:
        TaskAlreadyScheduled: If the unique key of one allows no other beside it.
    """
    rows = TaskModel.objects.using(using)
    for column, pk in _last_calls(row).items():
        # What was revived a moment ago waits at no line, so it is blocked for the end alone.
        former = rows.filter(pk=pk).exclude(status=Status.BLOCKED, limit_key=None).first()
        if former is None:
            continue
        if former.active_key is not None:
            message = (
                f"Workflow {row.pk} cannot run again: task {pk} ({former.func_name}), its "
                f"{column}, has not ended since the former end, and its unique key "
                f"{former.active_key!r} allows no other one beside it. Nothing was changed; try "
                f"again once it has ended."
            )
            raise TaskAlreadyScheduled(message, former)
        words = (*enqueue.INSERTED, *enqueue.EXTRAS)
        call = TaskModel(**{word: getattr(former, word) for word in words})
        call.not_before = call.expires_at = None
        enqueue.insert_steps([call], workflow=row.pk, waiting=(0,), using=using)
        WorkflowModel.objects.using(using).filter(pk=row.pk).update(**{column: call.pk})


class _Rebuilding(Walk):
    """What follows in one workflow from its rows alone."""

    def rebuild(self) -> None:
        """Set all counters as the rows tell, and let go whom that lets go."""
        following.take_all(self._workflow, using=self._using)
        self._reset_gates()
        steps = WorkflowStep.objects.using(self._using).filter(workflow=self._workflow)
        ended = steps.filter(task__status__in=_ENDED)
        found = list(ended.values_list("pk", "task__status", IS_IGNORED))
        ignored = {pk for pk, _, is_ignored in found if is_ignored}
        self._arrive({pk: Status(status) for pk, status, _ in found}, ignored)
        self._let_go(list(steps.filter(gate=None).values_list("pk", flat=True)))
        self._walk()

    def _reset_gates(self) -> None:
        gates = WorkflowGate.objects.using(self._using).filter(workflow=self._workflow)
        edges = WorkflowEdge.objects.using(self._using).filter(gate__workflow=self._workflow)
        counts: defaultdict[int, int] = defaultdict(int)
        for gate in edges.values_list("gate", flat=True):
            counts[gate] += 1
        by_count: defaultdict[int, list[int]] = defaultdict(list)
        locked = gates.order_by("rank", "pk").select_for_update()
        for gate, rank in locked.values_list("pk", "rank"):
            by_count[counts[gate]].append(gate)
            if not counts[gate]:
                # All that counted there was deleted, and nobody else would open it.
                self._pending[rank][gate] = (0, False)
        deleted = edges.filter(step=None, source=None)
        for gate, rank in deleted.values_list("gate", "gate__rank"):
            self._count(rank, gate, is_met=False)
        for count, ids in by_count.items():
            # A gate that has nothing left to count keeps what it was told before.
            told: dict[str, Any] = {"is_unmet": False} if count else {}
            for start in range(0, len(ids), _BATCH):
                gates.filter(pk__in=ids[start : start + _BATCH]).update(waiting_for=count, **told)
