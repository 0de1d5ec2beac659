"""May it start yet?  Count the ends of steps at their gates, and let go who waits there.

A step that ends counts itself off in its own settling transaction, so whatever follows from
its end is committed together with it.  Gates are locked by rank, and nothing opens because
of a gate but gates of a higher rank, so two who end at the same time wait for each other in
one order.  A step that waits at a gate is changed only by who has locked the gate.

A step that fails stops its workflow, unless its result is ignored: what has not started is
cancelled, but for steps that wait for just that.  They see how those before them ended.

What sets all counters of a workflow from its rows stands in ``rebuilding``.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from django.db import Error, connections, transaction
from django.db.models import F, Value
from django.db.models.functions import Concat

from . import admission, databases, events, following, messenger, tallies
from .columns import withdrawn_columns
from .databases import ANY_QUEUE, Counted
from .databases.functions import DatabaseNow, Isolation
from .event_models import EventKind
from .graphs import END_RANK, When
from .history import note_withdrawn
from .leftovers import WAITING, left_over, why_stopped
from .lines import tried_again
from .models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowModel, WorkflowStep
from .states import WORKFLOW_CANCELLED, Status, WorkflowStatus
from .wakeup import announce, announce_ended
from .workflow_models import ENDS_AS, IS_IGNORED

logger = logging.getLogger("firefly_jobs")

SKIPPED = "skipped: a step before it did not end as this one asks"
_BATCH = 1_000
_ENDED = [status for status in Status if status.is_terminal]


class End(NamedTuple):
    """A step that has just ended, in the transaction that is open."""

    id: int
    workflow: int
    status: Status
    error: str = ""
    # If it has failed: whether that is ignored; None: as the step says.
    is_ignored: bool | None = None


def follow(ends: Sequence[End], *, using: str, counted: Counted | None = None) -> None:
    """Do what follows from the end of some steps, in the transaction that is open.

    Args:
        ends: Their ends; their rows are written, and locked by that.
        using: Database alias.
        counted: The one gate behind the only one of them, if it was counted off there already.
    """
    if counted is not None:
        Walk(ends[0].workflow, using).go_on(ends[0], counted)
        return
    by_workflow: defaultdict[int, list[End]] = defaultdict(list)
    for end in ends:
        by_workflow[end.workflow].append(end)
    for workflow, found in sorted(by_workflow.items()):
        Walk(workflow, using).follow(found)


class Walk:
    """What follows in one workflow, rank by rank.

    Args:
        workflow: Its id.
        using: Database alias.
    """

    def __init__(self, workflow: int, using: str) -> None:
        self._workflow = workflow
        self._using = using
        self._database, self._connection = databases.of(using), connections[using]
        # By rank and gate: how many have ended, and whether one did so otherwise than asked.
        self._pending: defaultdict[int, dict[int, tuple[int, bool]]] = defaultdict(dict)
        # Steps that count at the end of the workflow themselves.
        self._at_end: set[int] = set()
        self._first: dict[int, Status] = {}
        self._has_let_go = False
        self._cancelled: list[int] = []

    def follow(self, ends: Sequence[End]) -> None:
        """Count steps off that have ended, and do what follows."""
        ignored = self._ignored(ends)
        self._first = {end.id: end.status for end in ends}
        if not self._arrive(self._first, ignored, first=ends):
            return
        fatal = [e for e in ends if e.status is Status.FAILED and e.id not in ignored]
        self._tell(ends, fatal)
        if fatal:
            self._stop(fatal[0])
        self._walk()

    def go_on(self, end: End, counted: Counted) -> None:
        """Do what follows from a completed step that was counted off where its row says."""
        self._first = {end.id: end.status}
        if counted.rank == END_RANK:
            self._at_end.add(end.id)
        self._heed(counted.rank, {counted.id: counted})
        self._walk()

    def _ignored(self, ends: Sequence[End]) -> set[int]:
        failed = [end.id for end in ends if end.status is Status.FAILED]
        if not failed:
            return set()
        steps = WorkflowStep.objects.using(self._using).filter(pk__in=failed)
        for answer in (True, False):
            if answered := [end.id for end in ends if end.is_ignored is answer]:
                steps.filter(pk__in=answered).update(is_forgiven=answer)
        ignored = steps.alias(ignored=IS_IGNORED).filter(ignored=True)
        return set(ignored.values_list("pk", flat=True))

    def _tell(self, ends: Sequence[End], fatal: Sequence[End]) -> None:
        """Keep as events what the failures of steps mean."""
        failed = {end.id: end for end in ends if end.status is Status.FAILED}
        if not failed or not events.are_kept():
            return
        steps = WorkflowStep.objects.using(self._using).filter(pk__in=failed).order_by("pk")
        for pk, name in steps.values_list("pk", "name"):
            end = failed[pk]
            outcome = "the workflow stops" if end in fatal else "the workflow goes on"
            message = f"step {name!r} failed, {outcome}: {end.error}"
            events.told([pk], EventKind.PREREQUISITE_FAILED, message, using=self._using)

    def _arrive(
        self,
        statuses: Mapping[int, Status],
        ignored: Collection[int],
        *,
        first: Sequence[End] = (),
    ) -> bool:
        """Take note of ended steps at the gates behind them.

        Returns:
            ``False`` if it has to be done once the open transaction has committed: there no
            statement would see what others have committed meanwhile.
        """
        ids = list(statuses)
        for start in range(0, len(ids), _BATCH):
            found = self._database.edges_behind(self._connection, ids[start : start + _BATCH])
            for step, gate, rank, when, isolation in found:
                if first and isolation != "read-committed" and self._connection.in_atomic_block:
                    self._pending.clear()
                    following.postpone(ids, using=self._using)
                    again = partial(_follow_after, list(first), using=self._using)
                    transaction.on_commit(again, self._using)
                    return False
                is_met = When(when).is_met(statuses[step], is_ignored=step in ignored)
                self._count(rank, gate, is_met=is_met)
                if rank == END_RANK:
                    self._at_end.add(step)
        return True

    def _count(self, rank: int, gate: int, *, is_met: bool) -> None:
        count, is_unmet = self._pending[rank].get(gate, (0, False))
        self._pending[rank][gate] = (count + 1, is_unmet or not is_met)

    # --- gates

    def _walk(self) -> None:
        """Move the counters, and what opens because of them, until nothing more opens."""
        while self._pending:
            rank = min(self._pending)
            self._move(rank, self._pending.pop(rank))
        if self._has_let_go:
            announce(self._using, (ANY_QUEUE,))
        if self._cancelled:
            announce_ended(self._using, self._cancelled)

    def _move(self, rank: int, counts: Mapping[int, tuple[int, bool]]) -> None:
        """Move the counters of one rank."""
        found: dict[int, Counted] = {}
        for gate, (count, is_unmet) in sorted(counts.items()):
            counted = self._database.count_off(self._connection, gate, count, is_unmet=is_unmet)
            if counted is not None:
                found[gate] = counted
        self._heed(rank, found)

    def _heed(self, rank: int, found: Mapping[int, Counted]) -> None:
        """Do what follows from what the counters of one rank say now."""
        if any(counted.is_cut_short for counted in found.values()):
            self._look_at_the_end_again()
        opened = {
            gate: counted.is_unmet for gate, counted in found.items() if counted.waiting_for == 0
        }
        if opened and rank == END_RANK:
            self._end()
        elif opened:
            self._open(opened)

    def _look_at_the_end_again(self) -> None:
        """Count at the end of the workflow what was not said to when its edges were read.

        Whoever cut it short has held the lock that was waited for a moment ago.
        """
        missed, self._first = self._first.keys() - self._at_end, {}
        edges = WorkflowEdge.objects.using(self._using).filter(step__in=missed, gate__rank=END_RANK)
        for step, gate in edges.values_list("step", "gate"):
            self._at_end.add(step)
            self._count(END_RANK, gate, is_met=True)

    def _open(self, gates: Mapping[int, bool]) -> None:
        """Let go who waits at some gates; cancel who waits for what did not happen.

        Args:
            gates: Whether something before them ended otherwise than asked.
        """
        ids, steps = list(gates), {False: list[int](), True: list[int]()}
        for start in range(0, len(ids), _BATCH):
            found = self._database.behind_gates(self._connection, ids[start : start + _BATCH])
            for gate, step, next_gate, rank in found:
                if step is not None:
                    steps[gates[gate]].append(step)
                else:
                    self._count(rank, next_gate, is_met=not gates[gate])
        self._let_go(steps[False])
        self._cancel(steps[True], SKIPPED)

    def _let_go(self, ids: Sequence[int]) -> None:
        for start in range(0, len(ids), _BATCH):
            rows = TaskModel.objects.using(self._using).filter(
                pk__in=ids[start : start + _BATCH], status=Status.BLOCKED
            )
            self._has_let_go |= rows.update(status=Status.CREATED) > 0

    def _cancel(self, ids: Sequence[int], error: str) -> None:
        """Cancel those of some steps that have not started; they count as ended."""
        for start in range(0, len(ids), _BATCH):
            found = self._lock_not_started(ids[start : start + _BATCH])
            rows = TaskModel.objects.using(self._using).filter(status__in=WAITING)
            cancelled = [pk for pk, _, _ in found]
            if any(fence for _, _, fence in found):
                note_withdrawn(rows.filter(pk__in=cancelled), error, using=self._using)
            messenger.cancelling(rows.filter(pk__in=cancelled), error, using=self._using)
            if any(line is not None for _, line, _ in found):
                places = admission.places_of(rows.filter(pk__in=cancelled))
                _write_cancelled(cancelled, error, self._using)
                admission.pass_on(places, using=self._using)
            else:
                _write_cancelled(cancelled, error, self._using)
            self._cancelled += cancelled
            events.told(cancelled, EventKind.CANCELLED, error, using=self._using)
            self._arrive(dict.fromkeys(cancelled, Status.CANCELLED), ())

    def _lock_not_started(self, ids: Sequence[int]) -> list[tuple[int, str | None, int]]:
        """Lock those of some steps that have not started; return their ids, lines and fences."""
        rows = TaskModel.objects.using(self._using).filter(pk__in=ids, status__in=WAITING)
        # Whoever has locked a row at this moment claims it, or even ends it and waits for one of
        # our gates: it has started.
        locked = rows.order_by("pk").select_for_update(skip_locked=self._database.can_skip_locked)
        found = list(locked.values_list("pk", "limit_key", "fence"))
        if len(found) == len(ids):
            return found
        # But not if it waits at a gate, which we hold.  Nobody would come back for it; whoever
        # has locked it adds a step behind it, or is a person.  Looked for without locks, as
        # those that run would be waited for as well.
        waiting = rows.filter(status=Status.BLOCKED, limit_key=None)
        missed = waiting.exclude(pk__in=[pk for pk, _, _ in found])
        if left := list(missed.values_list("pk", flat=True)):
            locked = rows.filter(pk__in=left).order_by("pk").select_for_update()
            found += locked.values_list("pk", "limit_key", "fence")
        return found

    # --- stopping and ending

    def _stop(self, end: End) -> None:
        """Cancel what has not started because a step has failed, but for what waits for that."""
        steps = WorkflowStep.objects.using(self._using).filter(pk=end.id)
        name = steps.values_list("name", flat=True).first()
        # A call that waits for the end of the workflow is no step, and stops nothing.
        if name is None or not self.lock_gates():
            return
        reason = f"step {name!r} failed"
        workflows = WorkflowModel.objects.using(self._using).filter(pk=self._workflow, error="")
        workflows.update(error=f"{reason}: {end.error}" if end.error else reason)
        self._cut_all_short(self._not_started(is_cleanup=False), f"cancelled: {reason}")

    def cancel(self) -> bool:
        """Cancel all steps that have not started; return whether the workflow had not ended."""
        workflows = WorkflowModel.objects.using(self._using).filter(pk=self._workflow)
        running = workflows.filter(status=WorkflowStatus.RUNNING)
        if workflows.values_list(Isolation(), flat=True).first() != "read-committed":
            # Steps and gates would be looked at as they were when this transaction began.
            is_running = running.update(is_cancelled=True) > 0
            if is_running:
                finish_later([self._workflow], using=self._using)
            return is_running
        if not self.lock_gates() or not running.update(is_cancelled=True):
            return False
        self._cut_all_short(self._not_started(), f"cancelled: {WORKFLOW_CANCELLED}")
        self._walk()
        return True

    def cancel_rest(self, ids: Sequence[int], *, waits: bool) -> None:
        """Cancel steps that wait, and whose rows are locked, if the workflow still stops."""
        if not ids or not self.lock_gates(waits=waits):
            return
        left = list(left_over(using=self._using).filter(pk__in=ids).values_list("pk", flat=True))
        if left:
            workflow = WorkflowModel.objects.using(self._using).get(pk=self._workflow)
            self._cut_short(left, f"cancelled: {why_stopped(workflow)}")
            self._walk()

    def cancel_steps(self, ids: Sequence[int], error: str) -> int:
        """Cancel some steps that have not started; return how many."""
        if not self.lock_gates():
            return 0
        before = len(self._cancelled)
        self._cut_short(ids, error)
        count = len(self._cancelled) - before
        self._walk()
        return count

    def _cut_all_short(self, ids: Sequence[int], error: str) -> None:
        """Cancel all steps that have not started, as the workflow stops."""
        self._cut_short(ids, error)
        finish_later([self._workflow], using=self._using)

    def _cut_short(self, ids: Sequence[int], error: str) -> None:
        """Cancel steps although those before them may not have ended.

        Then the end of what nothing waits for does not tell any more that all has ended, so
        every step that is left counts at the end of the workflow itself.
        """
        self._cancel(ids, error)
        gates = WorkflowGate.objects.using(self._using).filter(workflow=self._workflow)
        gates.filter(waiting_for__gt=0).update(is_cut_short=True)
        end = gates.get(rank=END_RANK)
        steps = WorkflowStep.objects.using(self._using).filter(workflow=self._workflow)
        left = steps.exclude(task__status__in=_ENDED).exclude(edges__gate=end)
        edges = [
            WorkflowEdge(step_id=pk, gate=end, when=When.ENDED)
            for pk in left.values_list("pk", flat=True)
        ]
        WorkflowEdge.objects.using(self._using).bulk_create(edges, batch_size=_BATCH)
        gates.filter(pk=end.pk).update(waiting_for=F("waiting_for") + len(edges))

    def lock_gates(self, *, waits: bool = True) -> bool:
        """Lock all gates that have not opened; return whether there are any.

        Args:
            waits: If not, and somebody has locked one, say that there are none.
        """
        gates = WorkflowGate.objects.using(self._using).filter(
            workflow=self._workflow, waiting_for__gt=0
        )
        skips = self._database.can_skip_locked and not waits
        locked = gates.order_by("rank", "pk").select_for_update(skip_locked=skips)
        count = len(list(locked.values_list("pk")))
        return count > 0 and (not skips or count == gates.count())

    def _not_started(self, **conditions: Any) -> list[int]:
        steps = WorkflowStep.objects.using(self._using).filter(
            workflow=self._workflow, task__status__in=WAITING, **conditions
        )
        return list(steps.order_by("pk").values_list("pk", flat=True))

    def _end(self) -> None:
        """Write that the workflow has ended, and let its last call go."""
        rows = WorkflowModel.objects.using(self._using).filter(pk=self._workflow)
        # By the row as it is once it is ours: who cancels it may have locked no gate.
        rows.update(status=ENDS_AS, ended=DatabaseNow())
        workflow = rows.get()
        status = WorkflowStatus(workflow.status)
        messenger.workflow_ended(workflow, status, using=self._using)
        tallies.count_workflow(workflow, status, using=self._using)
        if (pk := workflow.on_success) is not None:
            self._finally(pk, is_wanted=status is WorkflowStatus.COMPLETED, status=status)
        if (pk := workflow.on_failure) is not None:
            self._finally(pk, is_wanted=status is WorkflowStatus.FAILED, status=status)

    def _finally(self, pk: int, *, is_wanted: bool, status: WorkflowStatus) -> None:
        error = f"not needed: the workflow is {status}"
        if is_wanted:
            self._let_go([pk])
        elif _write_cancelled([pk], error, self._using):
            self._cancelled.append(pk)
            events.told([pk], EventKind.CANCELLED, error, using=self._using)


def _write_cancelled(ids: Sequence[int], error: str, using: str) -> int:
    rows = TaskModel.objects.using(using).filter(pk__in=ids, status__in=WAITING)
    return rows.update(**withdrawn_columns(error))


def _follow_after(ends: Sequence[End], *, using: str) -> None:
    """Do what follows from ends that are committed already, unless a sweep has."""

    def work() -> None:
        with databases.of(using).own_transaction(connections[using]):
            ours = following.take([end.id for end in ends], using=using)
            follow([end for end in ends if end.id in ours], using=using)

    tried_again(work, using=using)


# --- what is left over of a workflow that stops


def finish_later(workflows: Iterable[int | None], *, using: str) -> None:
    """Cancel what waits in workflows that stop, once the open transaction has committed.

    Called by who stops one, and by who lets a step wait that has been claimed: for a start that
    has not been, or a retry.  Neither sees what the other has not committed, and neither waits
    for the other; but who commits last sees both.
    """
    for workflow in sorted({pk for pk in workflows if pk is not None}):
        transaction.on_commit(partial(finish_stopping, workflow, using=using), using)


def finish_stopping(workflow: int, *, using: str, waits: bool = True) -> None:
    """Cancel what still waits in a workflow that stops.

    That was locked when its workflow stopped, or has been let go since.  Should it stay locked,
    a sweep comes again, and who claims it is told.

    Args:
        workflow: Its id.
        using: Database alias.
        waits: Whether to wait for what another session has locked.
    """
    database = databases.of(using)

    def work() -> None:
        late = list(left_over(using=using).filter(workflow=workflow).values_list("pk", flat=True))
        if not late:
            return
        with database.own_transaction(connections[using]):
            # InnoDB would go by the index of statuses, and meet who claims some of them there.
            rows = TaskModel.objects.using(using).alias(state=Concat("status", Value("")))
            rows = rows.filter(pk__in=late, state__in=WAITING)
            # Before the gates, as by who adds a step; that is whom they are mostly locked by.
            skips = database.can_skip_locked and not waits
            locked = rows.order_by("pk").select_for_update(skip_locked=skips)
            ids = list(locked.values_list("pk", flat=True))
            Walk(workflow, using).cancel_rest(ids, waits=waits)

    try:
        tried_again(work, using=using)
    except Error:
        # A dispatcher waits for no lock for long, and what has been committed is no failure.
        logger.warning(
            "Steps that are left over of workflow %s since it stopped could not be cancelled now, "
            "mostly as another session has locked one; they are cancelled once it lets go",
            workflow,
            exc_info=True,
        )


# --- what people do


def cancel(workflow: int, *, using: str) -> bool:
    """Cancel what has not started of a workflow; return whether it had not ended."""

    def work() -> bool:
        with databases.of(using).own_transaction(connections[using]):
            return Walk(workflow, using).cancel()

    # A call that has added a step holds the gate of the end, and asks for another one later.
    return tried_again(work, using=using)


def cancel_steps(ids: Sequence[int], error: str, *, using: str) -> int:
    """Cancel steps that have not started, in the transaction that is open; return how many."""
    steps = WorkflowStep.objects.using(using).filter(pk__in=ids)
    by_workflow: defaultdict[int, list[int]] = defaultdict(list)
    for pk, workflow in steps.order_by("pk").values_list("pk", "workflow"):
        by_workflow[workflow].append(pk)
    return sum(
        Walk(workflow, using).cancel_steps(found, error)
        for workflow, found in sorted(by_workflow.items())
    )
