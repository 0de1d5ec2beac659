"""Two consumers share a queue: nothing runs twice, nothing is left, whoever is killed."""

import random
from collections import Counter
from typing import Any

import pytest
from django.db import transaction

from firefly_jobs.decorators import BaseTask
from firefly_jobs.models import TaskModel
from tests.crash import tasks
from tests.crash.conftest import (
    consumer_id,
    describe_rows,
    effects,
    rows_ended,
    schedule,
    stops_in_order,
    time_passes,
)
from tests.support.waiting import eventually

MIXED: dict[str, tuple[BaseTask[Any, Any], str]] = {
    "sync": (tasks.count_and_write, "completed"),
    "async": (tasks.acount_and_write, "completed"),
    "idle": (tasks.count, "completed"),
    "async-idle": (tasks.acount, "completed"),
    "failing": (tasks.count_and_fail, "failed"),
}
ROUNDS = 100
KILLED_TASKS, KILLS, TASK_SECONDS = 200, 5, 0.05
SEED = 20_261_122


def test_five_hundred_mixed_tasks_run_once_each_on_two_consumers(consume, calls):
    consumers = [consume(), consume()]
    ids = {consumer_id(consumer) for consumer in consumers}
    with transaction.atomic():
        for position in range(ROUNDS):
            for kind, (task, _) in MIXED.items():
                schedule(task, str(calls), f"{kind}-{position}")
        schedule(tasks.count_and_fail_once, str(calls), "retried")

    def all_have_ended() -> None:
        ended = TaskModel.objects.filter(status__in=["completed", "failed"])
        assert ended.count() == ROUNDS * len(MIXED) + 1, describe_rows()

    eventually(all_have_ended, timeout_seconds=60.0)
    keys = [f"{kind}-{position}" for kind in MIXED for position in range(ROUNDS)]
    assert calls.count() == Counter(keys) + Counter(retried=2)
    written = [key for key in keys if key.startswith(("sync", "async-")) and "idle" not in key]
    assert effects() == Counter([*written, "retried"])
    failed = TaskModel.objects.filter(status="failed").values_list("func_name", flat=True)
    assert Counter(failed) == {tasks.count_and_fail.name: ROUNDS}
    assert not TaskModel.objects.exclude(rescues=0).exists()
    assert set(TaskModel.objects.values_list("consumer", flat=True)) == ids
    for consumer in consumers:
        assert "LeaseLost" not in consumer.output
        stops_in_order(consumer)


@pytest.mark.timeout(180)
def test_five_kills_under_two_hundred_tasks_lose_none_and_double_none(consume):
    chance = random.Random(SEED)
    keys = [f"key-{position}" for position in range(KILLED_TASKS)]
    with transaction.atomic():
        for key in keys:
            schedule(tasks.write_slowly, key, TASK_SECONDS)
    consumers = [consume(), consume()]

    for kill in range(1, KILLS + 1):
        threshold = kill * KILLED_TASKS // (KILLS + 2)

        def is_under_way(threshold: int = threshold) -> None:
            assert effects().total() >= threshold, describe_rows()

        eventually(is_under_way, timeout_seconds=30.0)
        time_passes(chance.uniform(0.0, 2 * TASK_SECONDS))
        consumers.pop(chance.randrange(2)).kill9()
        consumers.append(consume())

    rows_ended(timeout_seconds=60.0)
    committed = effects()
    not_run = [key for key in keys if key not in committed]
    run_twice = [key for key, count in committed.items() if count > 1]
    assert (not_run, run_twice) == ([], []), f"seed {SEED}"
    assert not TaskModel.objects.exclude(retry_attempts=0).exists()
    for consumer in consumers:
        stops_in_order(consumer)
