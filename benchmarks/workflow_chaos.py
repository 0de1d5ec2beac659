"""``workflow-chaos``: workflows of every shape while a consumer is killed each second.

Then eight consumers that end siblings at the same time, with nobody killed: no deadlock may
cost a call.  In both it is counted what the database says: every step's effect exactly once,
none before those of the steps it waits for, every workflow ended.  The exit code is 1 if
anything is wrong.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from django.db.models import Q, QuerySet

from firefly_jobs import Workflow, WorkflowModel
from firefly_jobs.models import TaskAttempt, WorkflowStep
from firefly_jobs.runs import edges_of
from firefly_jobs.states import WorkflowStatus

from . import chaos_tasks, tables
from .chaos import END_SECONDS, LOOK_SECONDS, MARKS, Fleet
from .figures import Figure
from .models import ChaosEffect
from .run import Run

KILL_SECONDS = 1.0
SIBLINGS, SIBLING_CONSUMERS = 64, 8
FAN, CHAIN, LEVEL, LEVELS = 1_000, 200, 50, 3


def measure(run: Run) -> Iterator[Figure]:
    """Let workflows run while consumers are killed; then let siblings end together."""
    yield _rage(run, "every shape, a kill each second", _every_shape, run.size("consumers"), True)
    yield _rage(run, "siblings", _siblings, SIBLING_CONSUMERS, False)


def _rage(
    run: Run, case: str, schedule: Callable[[], object], size: int, is_deadly: bool
) -> Figure:
    tables.empty(tables.TASKS, tables.CHAOS_EFFECTS)
    fleet = Fleet(run.place.url, size)
    rounds = 0
    begin = time.monotonic()
    next_kill = KILL_SECONDS
    try:
        while (passed := time.monotonic() - begin) < run.sizes["seconds"]:
            if not _running().exists():
                schedule()
                rounds += 1
            if is_deadly and passed > next_kill:
                fleet.kill_one()
                next_kill = passed + KILL_SECONDS
            fleet.look()
            time.sleep(LOOK_SECONDS)
        end = time.monotonic() + END_SECONDS
        while _running().exists() and time.monotonic() < end:
            fleet.look()
            time.sleep(LOOK_SECONDS)
        fleet.stop()
    finally:
        fleet.close()
    wrong = _wrong()
    if any(wrong.values()):
        print(wrong, file=sys.stderr)
    return run.figure(
        case=f"{case}, {run.size('seconds')} s, {size} consumers",
        unit="wrong",
        value=sum(wrong.values()) + len(fleet.complaints),
        marks=MARKS,
        details={
            "workflows": WorkflowModel.objects.count(),
            "steps": WorkflowStep.objects.count(),
            "sets": rounds,
            "kills": fleet.kills,
            "wrong": wrong,
            "consumers": fleet.complaints,
        },
    )


def _running() -> QuerySet[WorkflowModel]:
    return WorkflowModel.objects.filter(status=WorkflowStatus.RUNNING)


def _wrong() -> dict[str, int]:
    """Return what is not as it should be, and how often."""
    effects = ChaosEffect.objects.order_by("-pk").values_list("task", "pk")
    counts = Counter(task for task, _ in effects)
    place = dict(effects)
    steps = set(WorkflowStep.objects.filter(task__status="completed").values_list("pk", flat=True))
    runs = WorkflowModel.objects.exclude(name="fails")
    deadlocks = Q(error__icontains="deadlock") | Q(traceback__icontains="deadlock")
    return {
        "effects missing": len(steps - counts.keys()),
        "effects doubled": sum(count > 1 for count in counts.values()),
        "effects of steps that have not completed": len(counts.keys() - steps),
        "out of order": sum(_out_of_order(run, place) for run in runs),
        "workflows not completed": runs.exclude(status=WorkflowStatus.COMPLETED).count(),
        "workflows not failed": WorkflowModel.objects.filter(name="fails")
        .exclude(status=WorkflowStatus.FAILED)
        .count(),
        "deadlocks": TaskAttempt.objects.filter(deadlocks).count(),
    }


def _out_of_order(run: WorkflowModel, place: dict[int, int]) -> int:
    found = sum(place.get(parent, 0) > place.get(child, 0) for parent, child, _ in edges_of(run))
    levels: defaultdict[int, list[int]] = defaultdict(list)
    for pk, priority in run.steps.values_list("pk", "priority"):
        levels[priority].append(place.get(pk, 0))
    above = 0
    for priority in sorted(levels, reverse=True):
        found += min(levels[priority]) < above
        above = max(levels[priority])
    return found


def _every_shape() -> None:
    fan = Workflow("fan")
    first = fan.add(chaos_tasks.write_at_once.job, name="first")
    middle = [
        fan.add(chaos_tasks.write_at_once.job, name=str(n), depends_on=first) for n in range(FAN)
    ]
    fan.add(chaos_tasks.write_at_once.job, name="last", depends_on=middle)
    diamond = Workflow("diamond")
    top = diamond.add(chaos_tasks.write.job, name="top")
    sides = [diamond.add(chaos_tasks.write.job, name=side, depends_on=top) for side in "lr"]
    diamond.add(chaos_tasks.write.job, name="bottom", depends_on=sides)
    links = Workflow("chain")
    for n in range(CHAIN):
        links.add(chaos_tasks.write_at_once.job, name=str(n), depends_on=[str(n - 1)] if n else ())
    levels = Workflow("levels")
    for n in range(LEVELS * LEVEL):
        levels.add(chaos_tasks.write.job, name=str(n), priority=-(n // LEVEL))
    for plan in (fan, diamond, links, levels):
        plan.schedule()


def _siblings() -> None:
    together = Workflow("together")
    middle = [together.add(chaos_tasks.write_at_once.job) for _ in range(SIBLINGS)]
    # Ends and retries that are settled together.
    again = chaos_tasks.succeed_later.job.with_options(retry_delay=0)
    middle += [together.add(again) for _ in range(SIBLINGS // 4)]
    middle += [together.add(chaos_tasks.fail.job, ignore_result=True) for _ in range(SIBLINGS // 4)]
    together.add(chaos_tasks.write_at_once.job, depends_on=middle)
    fails = Workflow("fails")
    middle = [fails.add(chaos_tasks.write_at_once.job) for _ in range(SIBLINGS // 2)]
    middle += [fails.add(chaos_tasks.fail.job) for _ in range(3)]
    fails.add(chaos_tasks.write_at_once.job, depends_on=middle)
    for plan in (together, fails):
        plan.schedule()
