"""A call that goes beyond a limit ends; with its process, if nothing else helps.

Nobody else is blamed for it.  What one process can do by itself is in
``tests/conformance/test_allowances.py``.
"""

import pytest

from firefly_jobs.models import ConsumerModel
from tests.crash import process_tasks, tasks
from tests.crash.conftest import (
    describe_rows,
    effects,
    rows_ended,
    schedule,
    stops_in_order,
    time_passes,
)
from tests.crash.processes import LONG_LEASE, nothing_is_left, started
from tests.support.waiting import eventually

# Calls that hear nothing are ended after half a second.
# Ample for what a call does before it is stuck, on a busy machine too.
LIMIT, GRACE = 1, 0.2
# Above what a process needs for itself, below that and what the task takes.
MEMORY_MB = 400


@pytest.fixture
def supervise_one(consume):
    """Return a function that starts a supervisor of one process with a long lease."""

    def start(*arguments, **settings):
        merged = LONG_LEASE | {"TIME_LIMIT_GRACE": GRACE} | settings
        return consume("--processes", "1", *arguments, jobs_settings=merged)

    return start


def limited(task, *arguments, **options):
    return schedule(task.using(**options), *arguments)


def has_status(row, status):
    def has_it():
        row.refresh_from_db()
        assert row.status == status, describe_rows()

    eventually(has_it, timeout_seconds=30.0)


def nothing_was_counted(row):
    assert (row.retry_attempts, row.rescues, row.lost_alone) == (0, 0, 0)


def test_call_stuck_in_c_code_fails_by_its_retries_and_its_neighbours_do_not_count_it(
    supervise_one, gate, calls
):
    other = schedule(tasks.await_then_write, str(calls), "neighbour", str(gate))
    supervisor = supervise_one()
    gate.wait_until_reached()

    row = limited(
        process_tasks.stick, str(calls), "key", time_limit=LIMIT, max_retries=1, retry_delay=0
    )

    has_status(row, "failed")
    assert row.error.startswith("TimeLimitExceeded: It was still running after ")
    assert (row.retry_attempts, row.rescues, row.lost_alone) == (1, 0, 0)
    attempts = list(row.attempts.all())
    assert [attempt.outcome for attempt in attempts] == ["retried", "failed"]
    assert all(LIMIT < (attempt.duration or 0) < 10 for attempt in attempts)
    eventually(lambda: _are_started(supervisor, 3), timeout_seconds=20.0)
    supervisor.wait_for_line(rf"Ended process \d+ because of task {row.pk}: It was still running")
    supervisor.wait_for_line(rf"Task .*stick #{row.pk}: retry 1/1")
    assert calls.count()["key"] == 2

    gate.open()
    has_status(other, "completed")
    nothing_was_counted(other)
    assert {attempt.outcome for attempt in other.attempts.all()} == {"lost"}
    assert f"because of task {row.pk}" in other.attempts.all()[0].error
    assert effects() == {"neighbour": 1}
    stops_in_order(supervisor)
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


@pytest.mark.parametrize("kind", ["block_the_loop", "swallow"])
def test_call_that_does_not_heed_its_limit_is_ended(supervise_one, calls, kind):
    row = limited(getattr(process_tasks, kind), str(calls), "key", time_limit=LIMIT)
    supervisor = supervise_one()

    has_status(row, "failed")

    assert row.error.startswith("TimeLimitExceeded: It was still running after ")
    assert calls.count() == {"key": 1}
    eventually(lambda: _are_started(supervisor, 2), timeout_seconds=20.0)
    stops_in_order(supervisor)


@pytest.mark.once
def test_call_that_heeds_its_limit_leaves_its_process_alone(supervise_one):
    row = limited(process_tasks.spin, time_limit=1)
    supervisor = supervise_one(TIME_LIMIT_GRACE=30)

    has_status(row, "failed")

    assert row.error == "TimeLimitExceeded: It ran for more than 1s."
    assert len(started(supervisor)) == 1
    assert "No supervisor watches" not in supervisor.output
    stops_in_order(supervisor)


def test_call_that_takes_far_too_much_memory_is_ended_and_all_others_finish(
    supervise_one, gate, calls
):
    others = [
        schedule(tasks.wait_then_write, str(calls), "sync", str(gate)),
        schedule(tasks.await_then_write, str(calls), "async", str(gate)),
    ]
    supervisor = supervise_one("--threads", "2")
    gate.wait_until_reached()

    row = limited(process_tasks.take_memory_at_once, str(calls), "key", 1024, memory_limit="200MB")

    has_status(row, "failed")
    assert row.error.startswith("MemoryLimitExceeded: Its process kept ")
    assert row.error.endswith(" bytes, and it may have 209715200.")
    assert [attempt.outcome for attempt in row.attempts.all()] == ["failed"]
    nothing_was_counted(row)
    gate.open()
    for other in others:
        has_status(other, "completed")
        nothing_was_counted(other)
    assert effects() == {"sync": 1, "async": 1}
    assert calls.count()["key"] == 1
    stops_in_order(supervisor)


@pytest.mark.once
def test_call_beyond_its_memory_that_heeds_it_disturbs_nobody_and_a_fresh_process_takes_over(
    supervise_one, gate, calls
):
    other = schedule(tasks.await_then_write, str(calls), "neighbour", str(gate))
    supervisor = supervise_one()
    gate.wait_until_reached()

    row = limited(
        process_tasks.take_memory_bit_by_bit,
        str(calls),
        "key",
        MEMORY_MB,
        memory_limit=f"{MEMORY_MB}MB",
    )

    has_status(row, "failed")
    assert row.error.startswith("MemoryLimitExceeded: Its process kept ")
    assert "in take_memory_bit_by_bit" in row.attempts.get().traceback
    supervisor.wait_for_line("retires: memory-limit")
    eventually(lambda: _are_started(supervisor, 2), timeout_seconds=20.0)
    gate.open()
    has_status(other, "completed")
    assert not other.attempts.exists()
    assert "Ended process" not in supervisor.output
    stops_in_order(supervisor)


def _are_started(supervisor, count):
    assert len(started(supervisor)) == count


@pytest.mark.once
def test_call_beyond_its_memory_that_does_not_heed_it_is_ended(supervise_one, calls):
    row = limited(
        process_tasks.swallow,
        str(calls),
        "key",
        MEMORY_MB,
        memory_limit=f"{MEMORY_MB}MB",
    )
    supervisor = supervise_one()

    rows_ended(status="failed", timeout_seconds=30.0)

    row.refresh_from_db()
    assert row.error.startswith("MemoryLimitExceeded: Its process kept")
    assert calls.count() == {"key": 1}
    supervisor.wait_for_line(rf"Ended process \d+ because of task {row.pk}: Its process kept")
    stops_in_order(supervisor)


def test_call_that_was_over_in_time_is_left_alone(supervise_one, gate, calls):
    limited(process_tasks.be_over_in_time, str(calls), "timely", time_limit=LIMIT)
    schedule(tasks.wait_then_write, str(calls), "key", str(gate))
    supervisor = supervise_one()
    gate.wait_until_reached()
    time_passes(LIMIT + GRACE)
    gate.open()

    rows_ended()
    assert calls.count() == {"timely": 1, "key": 1}
    assert len(started(supervisor)) == 1
    assert "Ended process" not in supervisor.output
    stops_in_order(supervisor)


@pytest.mark.once
def test_limit_holds_while_the_process_stops(supervise_one, calls):
    row = limited(
        process_tasks.stick, str(calls), "key", time_limit=2, max_retries=1, retry_delay=60
    )
    supervisor = supervise_one()

    def has_begun():
        assert calls.count() == {"key": 1}

    eventually(has_begun, timeout_seconds=20.0)
    supervisor.terminate()

    assert supervisor.wait() == 0, supervisor.output
    row.refresh_from_db()
    assert (row.status, row.retry_attempts, row.rescues) == ("created", 1, 0), row.error
    assert not ConsumerModel.objects.exists()


@pytest.mark.once
def test_call_beyond_its_limit_stops_all_if_failures_must_not_be_silent(supervise_one, calls):
    limited(process_tasks.stick, str(calls), "key", time_limit=LIMIT)
    supervisor = supervise_one(FAIL_SILENTLY=False)

    assert supervisor.wait() == 1, supervisor.output
    supervisor.wait_for_line("Stopping at the first failure, as FAIL_SILENTLY is off")
    nothing_is_left(supervisor)


def test_without_a_supervisor_it_is_said_at_the_start_that_nobody_ends_stuck_calls(consume):
    settings = {"IMPORTS": ["tests.crash.tasks", "tests.crash.limited_tasks"]}
    consumer = consume("--burst", jobs_settings=settings)

    assert consumer.wait() == 0
    (line,) = [line for line in consumer.lines if "No supervisor watches" in line]
    assert "Registered tasks with a limit: 2." in line
