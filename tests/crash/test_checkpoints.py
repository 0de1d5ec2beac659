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


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_work_of_consumers_killed_at_a_checkpoint_is_done_once_by_another(consume, checkpoint):
    kinds = [kind for kind in KINDS if (kind, checkpoint) not in NEVER_REACHED]
    for kind in kinds:
        for key in keys_of(kind):
            schedule(KINDS[kind].using(queue=kind), key)
    dying = [consume("--queue", kind, checkpoint=f"{checkpoint}:kill") for kind in kinds]
    assert [consumer.wait() for consumer in dying] == [-signal.SIGKILL] * len(kinds)
    assert not work_is_done(kinds)

    survivor = consume("--queue", ",".join(kinds))

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


def work_is_done(kinds: list[str]) -> bool:
    rows = TaskModel.objects.values_list("queue", "status")
    return set(rows) == {(kind, "failed" if kind == "failing" else "completed") for kind in kinds}
