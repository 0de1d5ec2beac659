"""A killed consumer leaves no slot taken and nobody waiting in a line for ever."""

import signal
from collections import Counter

import pytest

from firefly_jobs import Concurrency, RateLimit
from firefly_jobs.checkpoints import CHECKPOINTS
from firefly_jobs.models import TaskModel
from tests.crash import tasks
from tests.crash.conftest import (
    LEASE_SECONDS,
    describe_rows,
    effects,
    rows_ended,
    schedule,
    stops_in_order,
)
from tests.support.waiting import eventually

ROWS = 8
SHARED = Concurrency(1, key=lambda: "shared")


def blocked_are(count: int) -> None:
    """Assert that so many wait for the slot."""
    blocked = TaskModel.objects.filter(status="blocked", limit_key="c:shared")
    assert blocked.count() == count, describe_rows()


def assert_nobody_stands() -> None:
    assert not TaskModel.objects.filter(limit_key__isnull=False).exists()


def test_the_slot_of_a_killed_consumer_is_free_once_its_call_is_rescued(consume, calls, gate):
    task = tasks.wait_then_write.using(concurrency=SHARED)
    held = schedule(task, str(calls), "held", str(gate))
    dying = consume("--threads", "2")
    gate.wait_until_reached()
    for n in range(3):
        schedule(tasks.write.using(concurrency=SHARED), f"key-{n}")
    eventually(lambda: blocked_are(3), timeout_seconds=20.0)
    survivor = consume("--threads", "2")

    dying.kill9()
    gate.open()

    # It was found dead after its lease and another look, not by the sweep minutes later.
    rows_ended(timeout_seconds=20 * LEASE_SECONDS)
    held.refresh_from_db()
    assert (held.rescues, held.retry_attempts) == (1, 0)
    assert effects() == Counter(["held", "key-0", "key-1", "key-2"])
    assert_nobody_stands()
    stops_in_order(survivor)


@pytest.mark.parametrize("limited", ["concurrency", "rate", "both"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_limited_work_of_a_consumer_killed_at_a_checkpoint_is_done_once_by_another(
    consume, checkpoint, limited
):
    task = tasks.write
    if limited != "rate":
        task = task.using(concurrency=SHARED)
    if limited != "concurrency":
        task = task.using(rate_limit=RateLimit("20/s", key=lambda: "shared"))
    keys = [f"key-{n}" for n in range(ROWS)]
    for key in keys:
        schedule(task, key)
    dying = consume("--threads", "2", checkpoint=f"{checkpoint}:kill:3")
    assert dying.wait() == -signal.SIGKILL

    survivor = consume("--threads", "2")

    rows_ended(timeout_seconds=20 * LEASE_SECONDS)
    assert effects() == Counter(keys)
    assert not TaskModel.objects.exclude(retry_attempts=0).exists()
    assert_nobody_stands()
    stops_in_order(survivor)
