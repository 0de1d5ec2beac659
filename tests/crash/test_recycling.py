"""Processes are renewed without losing work or keeping it waiting."""

import re

import pytest

from firefly_jobs.models import ConsumerModel
from tests.crash import process_tasks, tasks
from tests.crash.conftest import (
    describe_rows,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    statuses,
    stops_in_order,
    time_passes,
)
from tests.crash.processes import LONG_LEASE, nothing_is_left, started
from tests.support.waiting import eventually

# More than a process needs that runs small tasks, less than one that ran keep_memory.
MEMORY_MB, KEPT_MB = 300, 400


@pytest.fixture
def start(consume):
    """Return a function that starts a consumer, or a supervisor, with a long lease."""

    def start(*arguments, **options):
        options["jobs_settings"] = LONG_LEASE | options.get("jobs_settings", {})
        return consume(*arguments, **options)

    return start


def are_running(calls, count):
    def run() -> None:
        assert calls.count().total() == count, describe_rows()

    eventually(run, timeout_seconds=20.0)


def test_replacement_works_while_the_last_call_of_a_retired_process_goes_on(start, gate, calls):
    for number in range(2):
        schedule(tasks.wait_then_write, str(calls), f"slow-{number}", str(gate))
    supervisor = start("--processes", "2", "--max-tasks", "1")
    are_running(calls, 2)

    schedule(tasks.write, "quick")

    def is_done() -> None:
        assert effects() == {"quick": 1}

    eventually(is_done, timeout_seconds=20.0)
    assert sum("retires: max-tasks" in line for line in supervisor.lines) >= 2
    assert statuses() == {"running": 2, "completed": 1}
    gate.open()
    rows_ended()
    assert effects() == {"quick": 1, "slow-0": 1, "slow-1": 1}
    nothing_was_spent()
    stops_in_order(supervisor)
    assert "died" not in supervisor.output
    assert not ConsumerModel.objects.exists()


@pytest.mark.once
def test_retired_processes_with_slow_calls_do_not_add_up_without_bound(start, gate, calls):
    for number in range(8):
        schedule(tasks.wait, str(calls), f"slow-{number}", str(gate))
    supervisor = start("--processes", "2", "--max-tasks", "1")
    are_running(calls, 4)

    time_passes(1.5)

    assert len(started(supervisor)) == 4
    assert calls.count().total() == 4
    gate.open()
    rows_ended()
    nothing_was_spent()
    stops_in_order(supervisor)


@pytest.mark.once
def test_stop_bounds_the_last_call_of_a_retired_process(start, gate, calls):
    row = schedule(tasks.wait, str(calls), "key", str(gate))
    supervisor = start("--processes", "2", "--max-tasks", "1", "--shutdown-timeout", "0.3")
    gate.wait_until_reached()
    supervisor.wait_for_line("retires: max-tasks")

    supervisor.terminate()

    assert supervisor.wait(timeout_seconds=15.0) == 0, supervisor.output
    row.refresh_from_db()
    assert row.status == "created"
    nothing_was_spent()
    nothing_is_left(supervisor)


@pytest.mark.once
def test_burst_replaces_what_retired_until_nothing_is_due(start, calls):
    keys = [f"key-{number}" for number in range(20)]
    for key in keys:
        schedule(tasks.count_and_write, str(calls), key)

    supervisor = start("--processes", "2", "--max-tasks", "4", "--burst")

    assert supervisor.wait() == 0, supervisor.output
    assert statuses() == {"completed": 20}
    assert all(count == 1 for count in calls.count().values())
    assert len(started(supervisor)) >= 5
    # However soon it is done with its tasks, the next one does not wait.
    assert "A process is started in" not in supervisor.output
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


def test_process_that_grew_too_much_is_replaced_and_loses_nothing(start, gate, calls):
    schedule(process_tasks.keep_memory_and_wait, KEPT_MB, str(calls), "grown", str(gate))
    supervisor = start("--processes", "2", "--max-memory", str(MEMORY_MB))

    supervisor.wait_for_line("retires: max-memory")

    def is_replaced() -> None:
        assert len(started(supervisor)) == 3

    eventually(is_replaced)
    gate.open()
    schedule(tasks.write, "quick")
    rows_ended()
    assert effects() == {"grown": 1, "quick": 1}
    nothing_was_spent()
    assert sum(bool(re.search("retires", line)) for line in supervisor.lines) == 1
    stops_in_order(supervisor)


@pytest.mark.once
def test_single_consumer_that_grew_too_much_ends_well(start):
    schedule(process_tasks.keep_memory, KEPT_MB, "grown")

    consumer = start("--max-memory", str(MEMORY_MB))

    assert consumer.wait() == 0, consumer.output
    consumer.wait_for_line("retires: max-memory")
    assert statuses() == {"completed": 1}
    assert not ConsumerModel.objects.exists()


@pytest.mark.once
def test_processes_that_are_too_large_from_their_start_are_replaced_ever_more_slowly(start):
    supervisor = start("--processes", "2", "--max-memory", "1")

    supervisor.wait_for_line(r"A process is started in 0\.5s, as those before ended soon")
    schedule(tasks.write, "key")

    rows_ended()
    stops_in_order(supervisor)
