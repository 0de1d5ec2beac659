"""What ``chaos`` counts at its end, from the database alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from firefly_jobs.exceptions import ConsumerLost
from firefly_jobs.models import TaskAttempt, TaskModel
from firefly_jobs.states import Status

from . import chaos_tasks
from .models import ChaosEffect

FAILING = {chaos_tasks.fail.name}
WITHOUT_EFFECT = {chaos_tasks.idle.name, chaos_tasks.aidle.name}
RETRYING = {chaos_tasks.succeed_later.name, chaos_tasks.asucceed_later.name}
EXAMPLES_MAX = 5


def tally(acknowledged: set[int]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Return what happened, and the ids of the tasks with which something is wrong.

    Args:
        acknowledged: Ids of the rows whose ``schedule`` came back.
    """
    rows = {row.pk: row for row in TaskModel.objects.all().iterator()}
    effects = Counter(ChaosEffect.objects.values_list("task", flat=True))
    attempts = Counter(TaskAttempt.objects.values_list("task_id", "outcome"))
    wrong: dict[str, list[int]] = {
        "scheduled and not there": sorted(acknowledged - set(rows)),
        "effects without a task": sorted(set(effects) - set(rows)),
    }
    for pk, row in rows.items():
        for complaint in _complaints(row, effects[pk], attempts):
            wrong.setdefault(complaint, []).append(pk)
    outcomes: Counter[str] = Counter()
    for (_, outcome), count in attempts.items():
        outcomes[outcome] += count
    counts = {
        "tasks": len(rows),
        "by status": dict(Counter(row.status for row in rows.values())),
        "by function": dict(Counter(row.func_name.rpartition(".")[2] for row in rows.values())),
        "attempts": dict(outcomes),
        "effects": sum(effects.values()),
        "effects that shared a commit": _in_groups(rows.values()),
        "rows that were lost and ran again": sum(row.rescues > 0 for row in rows.values()),
    }
    return counts, {complaint: ids for complaint, ids in wrong.items() if ids}


def _in_groups(rows: Iterable[TaskModel]) -> int:
    """Return how many effects were committed with those of other tasks, by one statement.

    Its moment tells; on SQLite, which counts milliseconds, two commits may have the same.
    """
    moments = Counter(
        (row.consumer, row.completed)
        for row in rows
        if row.completed is not None and row.func_name not in WITHOUT_EFFECT
    )
    return sum(count for count in moments.values() if count > 1)


def _complaints(row: TaskModel, effects: int, attempts: Counter[tuple[int, str]]) -> list[str]:
    """Return what is wrong with one row."""
    found = []
    is_failing = row.func_name in FAILING
    status = Status.FAILED if is_failing else Status.COMPLETED
    if not Status(row.status).is_terminal:
        return ["not ended"]
    if row.status != status:
        lost = ConsumerLost.__name__ in row.error
        found.append(f"ended as {row.status}{' because it was lost too often' if lost else ''}")
    wanted = int(row.status == Status.COMPLETED and row.func_name not in WITHOUT_EFFECT)
    if effects < wanted:
        found.append("effects missing")
    if effects > wanted:
        found.append("effects too many")
    if row.status == Status.COMPLETED and row.returned != row.pk:
        found.append("result of another")
    if (row.completed is None) == (row.status == Status.COMPLETED) or (row.failed is None) == (
        row.status == Status.FAILED
    ):
        found.append("ended twice")
    retries = chaos_tasks.SUCCEEDS_AT - 1 if row.func_name in RETRYING else 0
    if not row.retry_attempts == attempts[row.pk, "retried"] == retries:
        found.append("retries miscounted")
    if attempts[row.pk, "failed"] != int(is_failing):
        found.append("failures miscounted")
    return found
