"""A killed consumer leaves no slot taken and nobody waiting in a line for ever."""

import signal
from collections import Counter

import pytest

from firefly_jobs import Concurrency, RateLimit
from firefly_jobs.checkpoints import CHECKPOINTS
from firefly_jobs.models import ConsumerModel, TaskModel
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


@pytest.mark.parametrize("is_seen", [True, False])
def test_the_slot_of_a_killed_consumer_is_free_once_its_call_is_rescued(
    consume, calls, gate, is_seen
):
    # Its process is gone, which the other consumer sees long before the lease is over; or,
    # as if it were on another machine, nothing but its heartbeat tells.
    lease = 9.0 if is_seen else LEASE_SECONDS
    task = tasks.wait_then_write.using(concurrency=SHARED)
    held = schedule(task, str(calls), "held", str(gate))
    dying = consume("--threads", "2", jobs_settings={"LEASE_SECONDS": lease})
    gate.wait_until_reached()
    if not is_seen:
        ConsumerModel.objects.update(process=None)
    for n in range(3):
        schedule(tasks.write.using(concurrency=SHARED), f"key-{n}")
    eventually(lambda: blocked_are(3), timeout_seconds=20.0)
    survivor = consume("--threads", "2", jobs_settings={"LEASE_SECONDS": lease})

    dying.kill9()
    gate.open()

    # It was found dead by the next look, or after its lease and another one; not by the sweep.
    rows_ended(timeout_seconds=20.0)
    reason = "whose process has ended" if is_seen else "which stopped renewing its lease"
    survivor.wait_for_line(rf"Rescued 1 tasks of consumer .*, {reason}")
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
