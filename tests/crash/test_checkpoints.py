"""Consumers are killed at each named checkpoint; another ends their work, effects once."""

import signal
from collections import Counter

import pytest

from firefly_jobs.checkpoints import CHECKPOINTS
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from tests.crash import tasks
from tests.crash.conftest import (
    Kinds,
    consumer_id,
    describe_rows,
    effects,
    schedule,
    stops_in_order,
)
from tests.support.waiting import eventually

# Each kind has a queue of its own, on which its own consumer dies.
KINDS: Kinds = {
    "sync": tasks.write,
    "async": tasks.awrite,
    "idle": tasks.touch_nothing,
    "failing": tasks.write_and_fail,
}
NEVER_REACHED = {
    # One statement settles many of these, so there is no moment between outcome and commit.
    ("idle", "settling"),
    # It raises instead of returning.
    ("failing", "called"),
}
ROWS = 5


def keys_of(kind: str) -> list[str]:
    return [f"{kind}-{number}" for number in range(ROWS)]


@pytest.mark.parametrize("arguments", [(), ("--threads", "3")], ids=["one lane", "threads"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_work_of_consumers_killed_at_a_checkpoint_is_done_once_by_another(
    consume, checkpoint, arguments
):
    kinds = [kind for kind in KINDS if (kind, checkpoint) not in NEVER_REACHED]
    for kind in kinds:
        for key in keys_of(kind):
            schedule(KINDS[kind].using(queue=kind), key)
    dying = [
        consume("--queue", kind, *arguments, checkpoint=f"{checkpoint}:kill") for kind in kinds
    ]
    assert [consumer.wait() for consumer in dying] == [-signal.SIGKILL] * len(kinds)
    assert not work_is_done(kinds)

    survivor = consume("--queue", ",".join(kinds), *arguments)

    def is_done() -> None:
        assert work_is_done(kinds), describe_rows()
        # Those that died holding nothing are forgotten as well.
        assert list(ConsumerModel.objects.values_list("pk", flat=True)) == [consumer_id(survivor)]

    eventually(is_done, timeout_seconds=20.0)
    writing = [kind for kind in kinds if kind in {"sync", "async"}]
    assert effects() == Counter(key for kind in writing for key in keys_of(kind))
    assert not TaskModel.objects.exclude(retry_attempts=0).exists()
    failures = TaskAttempt.objects.filter(outcome="failed").values_list("task_id", flat=True)
    failed = TaskModel.objects.filter(queue="failing").values_list("pk", flat=True)
    assert Counter(failures) == Counter(failed)
    stops_in_order(survivor)


# With groups a claim, an outcome and a COMMIT stand for many calls; the first few calls of a
# task join none.
TIMES = {"executing": 25, "called": 25}
GROUPED_ROWS = 60


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_work_of_a_consumer_killed_amid_a_group_is_done_once_by_another(consume, checkpoint):
    keys = [f"key-{number}" for number in range(GROUPED_ROWS)]
    for number, key in enumerate(keys):
        schedule(tasks.write_and_fail if number % 10 == 7 else tasks.write, key)
    times = TIMES.get(checkpoint, 5)
    dying = consume("--group-commit", checkpoint=f"{checkpoint}:kill:{times}")
    assert dying.wait() == -signal.SIGKILL
    assert TaskModel.objects.filter(status__in=["created", "running"]).exists()

    survivor = consume("--group-commit")

    def is_done() -> None:
        ended = Counter(TaskModel.objects.values_list("status", flat=True))
        failed = len(keys[7::10])
        assert ended == {"completed": len(keys) - failed, "failed": failed}, describe_rows()

    eventually(is_done, timeout_seconds=20.0)
    assert effects() == Counter(key for n, key in enumerate(keys) if n % 10 != 7)
    assert not TaskModel.objects.exclude(retry_attempts=0).exists()
    stops_in_order(survivor)


def work_is_done(kinds: list[str]) -> bool:
    rows = TaskModel.objects.values_list("queue", "status")
    return set(rows) == {(kind, "failed" if kind == "failing" else "completed") for kind in kinds}
