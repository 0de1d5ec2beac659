"""A supervisor's processes share the work; whoever is killed, it is done once, and at once."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from django.db import connections, transaction

from firefly_jobs.checkpoints import CHECKPOINTS
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.crash import process_tasks, tasks
from tests.crash.conftest import (
    describe_rows,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    statuses,
    stops_in_order,
)
from tests.crash.processes import (
    LONG_LEASE,
    consumers_are,
    group,
    holder_of,
    kill9,
    nothing_is_left,
    started,
    tcp_sockets,
)
from tests.support.databases import url_of_test_database
from tests.support.waiting import eventually

ROWS = 60


@pytest.fixture
def supervise(consume):
    """Return a function that starts a supervisor of two processes with a long lease."""

    def start(*arguments, **options):
        options["jobs_settings"] = LONG_LEASE | options.get("jobs_settings", {})
        return consume("--processes", "2", *arguments, **options)

    return start


# --- sharing


def test_two_processes_share_a_queue_and_run_each_task_once(supervise, gate, calls):
    slow, keys = ["slow-0", "slow-1"], [f"key-{number}" for number in range(ROWS)]
    with transaction.atomic():
        rows = [schedule(tasks.wait, str(calls), key, str(gate)) for key in slow]
        for key in keys:
            schedule(tasks.count_and_write, str(calls), key)

    supervisor = supervise()

    def both_run() -> None:
        assert set(slow) <= set(calls.count())

    eventually(both_run, timeout_seconds=20.0)
    gate.open()
    rows_ended()
    stops_in_order(supervisor)
    assert calls.count() == Counter([*slow, *keys])
    assert effects() == Counter(keys)
    ran = TaskModel.objects.filter(pk__in=[row.pk for row in rows])
    assert len(set(ran.values_list("consumer", flat=True))) == 2
    assert len(started(supervisor)) == 2
    assert not ConsumerModel.objects.exists()
    nothing_was_spent()
    nothing_is_left(supervisor)


@pytest.mark.parametrize("arguments", [[], ["--threads", "3", "--group-commit"]], ids=len)
def test_burst_ends_once_every_process_has_found_nothing_due(supervise, calls, arguments):
    keys = [f"key-{number}" for number in range(ROWS)]
    for key in keys:
        schedule(tasks.count_and_write, str(calls), key)

    supervisor = supervise("--burst", *arguments)

    assert supervisor.wait() == 0, supervisor.output
    assert calls.count() == Counter(keys) == effects()
    assert len(started(supervisor)) == 2
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


def test_the_supervisor_holds_no_connection_while_it_waits(supervise):
    supervisor = supervise()
    consumers_are(2)

    for pid in started(supervisor):
        # A fresh interpreter, which inherits no connection, whatever the supervisor does.
        assert b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    if connections["default"].vendor == "sqlite":
        name = Path(connections["default"].settings_dict["NAME"]).resolve()
        opened = [path.resolve() for path in Path(f"/proc/{supervisor.pid}/fd").iterdir()]
        assert name not in opened
        child = [path.resolve() for path in Path(f"/proc/{started(supervisor)[0]}/fd").iterdir()]
        assert name in child
    else:
        assert tcp_sockets(supervisor.pid) == set()
        assert tcp_sockets(started(supervisor)[0]) != set()
    stops_in_order(supervisor)


# --- death of a child


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_work_of_a_process_killed_at_a_checkpoint_is_done_once_without_waiting_for_its_lease(
    supervise, checkpoint, tmp_path
):
    keys = [f"{kind}-{number}" for kind in ("sync", "async") for number in range(5)]
    for key in keys:
        schedule(tasks.write if key.startswith("sync") else tasks.awrite, key)

    supervisor = supervise(
        checkpoint=f"{checkpoint}:kill", environment={"ARMED_ONCE": str(tmp_path / "armed")}
    )

    def has_died() -> None:
        # The other process may be quicker, so there is always one more to claim.
        keys.append(f"sync-{len(keys)}")
        schedule(tasks.write, keys[-1])
        assert "has died: SIGKILL" in supervisor.output, supervisor.output

    eventually(has_died)
    rows_ended(timeout_seconds=20.0)
    assert effects() == Counter(keys)
    assert not TaskModel.objects.exclude(retry_attempts=0).exists()

    def is_replaced() -> None:
        assert len(started(supervisor)) == 3, supervisor.output

    eventually(is_replaced)
    consumers_are(2)
    stops_in_order(supervisor)
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_call_of_a_killed_process_runs_again_at_once_in_another(supervise, gate, calls, kind):
    task = tasks.write_then_wait if kind == "sync" else tasks.write_then_await
    row = schedule(task, str(calls), "key", str(gate))
    supervisor = supervise()
    gate.wait_until_reached()
    victim = holder_of(row)

    kill9(victim)

    supervisor.wait_for_line(rf"Process {victim} has died: SIGKILL")
    supervisor.wait_for_line("Rescued 1 tasks of consumer .*, whose process has ended")

    def is_called_again() -> None:
        assert calls.count() == {"key": 2}, describe_rows()

    eventually(is_called_again, timeout_seconds=20.0)
    gate.open()
    rows_ended()
    row.refresh_from_db()
    assert (row.rescues, row.retry_attempts, row.lost_alone) == (1, 0, 0)
    assert [attempt.outcome for attempt in row.attempts.all()] == ["lost"]
    assert effects() == {"key": 1}
    consumers_are(2)
    stops_in_order(supervisor)


def test_task_that_ends_its_process_is_rescued_and_run_again(supervise, calls):
    schedule(process_tasks.end_the_process, str(calls), "key")

    supervisor = supervise("--burst")

    assert supervisor.wait() == 0, supervisor.output
    supervisor.wait_for_line("has died: exit code 0")
    assert calls.count() == {"key": 2}
    assert statuses() == {"completed": 1}
    assert effects() == {"key": 1}
    assert not ConsumerModel.objects.exists()


def test_task_that_always_ends_its_process_fails_in_the_end_and_the_others_do_not(supervise):
    row = schedule(process_tasks.always_end_the_process)
    others = [schedule(tasks.write, f"key-{number}") for number in range(20)]

    supervisor = supervise(jobs_settings={"MAX_RESCUES": 0})

    def has_failed() -> None:
        row.refresh_from_db()
        assert row.status == "failed", describe_rows()

    eventually(has_failed, timeout_seconds=60.0)
    assert row.error.startswith("ConsumerLost")
    assert (row.rescues, row.lost_alone, row.retry_attempts) == (3, 1, 0)

    def others_are_done() -> None:
        assert effects() == Counter(f"key-{number}" for number in range(20))

    eventually(others_are_done, timeout_seconds=40.0)
    assert not TaskModel.objects.filter(pk__in=[o.pk for o in others], lost_alone__gt=0).exists()
    stops_in_order(supervisor)


@pytest.mark.once
def test_processes_that_die_at_once_are_started_after_growing_pauses(supervise):
    supervisor = supervise(environment={"DIES_AT_IMPORT": "1"})

    for pause in ("0.5", "1.0", "2.0"):
        supervisor.wait_for_line(f"A process is started in {pause}s")

    # Two that died, two at once, two after 0.5, two after 1.0 seconds.
    assert len(started(supervisor)) <= 8
    supervisor.terminate()
    assert supervisor.wait(timeout_seconds=5.0) == 0
    nothing_is_left(supervisor)


@pytest.mark.once
def test_process_that_is_stopped_by_somebody_is_replaced(supervise):
    supervisor = supervise()
    consumers_are(2)

    os.kill(started(supervisor)[0], signal.SIGTERM)

    def is_replaced() -> None:
        assert len(started(supervisor)) == 3

    eventually(is_replaced)
    consumers_are(2)
    assert "has died" not in supervisor.output
    stops_in_order(supervisor)


@pytest.mark.server
def test_death_while_the_database_is_away_is_left_to_heartbeats(
    supervise, database_proxy, gate, calls
):
    row = schedule(tasks.wait, str(calls), "key", str(gate))
    supervisor = supervise(
        database_url=url_of_test_database(port=database_proxy.port),
        jobs_settings={"LEASE_SECONDS": 2.0},
    )
    gate.wait_until_reached()
    victim = holder_of(row)
    consumers_are(2)
    database_proxy.refuse()
    database_proxy.cut()

    kill9(victim)

    supervisor.wait_for_line("The tasks of consumer .* are left to other consumers")
    database_proxy.accept()
    gate.open()
    rows_ended(timeout_seconds=30.0)
    stops_in_order(supervisor)


# --- stopping


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["supervisor", "group"])
def test_one_signal_stops_all_and_lets_running_calls_finish(supervise, gate, calls, number, whom):
    for number_ in range(2):
        schedule(tasks.wait_then_write, str(calls), f"key-{number_}", str(gate))
    supervisor = supervise()

    def both_run() -> None:
        assert calls.count().total() == 2

    eventually(both_run, timeout_seconds=20.0)

    (os.kill if whom == "supervisor" else os.killpg)(supervisor.pid, number)

    def all_stop() -> None:
        assert sum("stops" in line for line in supervisor.lines) == 2, supervisor.output

    eventually(all_stop)
    assert supervisor.returncode is None
    gate.open()
    assert supervisor.wait() == 0, supervisor.output
    assert effects() == {"key-0": 1, "key-1": 1}
    assert statuses() == {"completed": 2}
    assert "died" not in supervisor.output
    nothing_was_spent()
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


def test_calls_that_outlast_the_shutdown_timeout_are_given_back_unspent(supervise, gate):
    row = schedule(tasks.loop, str(gate), writes=True)
    supervisor = supervise("--shutdown-timeout", "0.3")
    gate.wait_until_reached()

    supervisor.terminate()

    assert supervisor.wait(timeout_seconds=15.0) == 0, supervisor.output
    row.refresh_from_db()
    assert (row.status, row.consumer) == ("created", None)
    nothing_was_spent()
    assert not ConsumerModel.objects.exists()


@pytest.mark.once
@pytest.mark.parametrize("whom", ["supervisor", "group"])
def test_second_signal_ends_all_at_once(supervise, gate, whom):
    schedule(tasks.loop, str(gate))
    supervisor = supervise("--shutdown-timeout", "60")
    gate.wait_until_reached()
    consumers_are(2)
    send = os.kill if whom == "supervisor" else os.killpg
    send(supervisor.pid, signal.SIGTERM)

    def all_have_heard() -> None:
        # A second one that comes before the first is delivered is merged with it.
        heard = sum("Received SIGTERM" in line for line in supervisor.lines)
        assert heard == (3 if whom == "group" else 1), supervisor.output

    eventually(all_have_heard)
    began = time.monotonic()

    send(supervisor.pid, signal.SIGTERM)

    assert supervisor.wait(timeout_seconds=10.0) == 1
    assert time.monotonic() - began < 5.0
    nothing_is_left(supervisor)


@pytest.mark.once
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_group_while_processes_start_ends_all_quietly(supervise, number):
    supervisor = supervise()
    supervisor.wait_for_line("Started process")

    os.killpg(supervisor.pid, number)

    assert supervisor.wait(timeout_seconds=15.0) == 0, supervisor.output
    assert "Traceback" not in supervisor.output
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


def test_processes_whose_supervisor_is_killed_finish_their_calls_and_end(supervise, gate, calls):
    for number in range(2):
        schedule(tasks.wait_then_write, str(calls), f"key-{number}", str(gate))
    supervisor = supervise()

    def both_run() -> None:
        assert calls.count().total() == 2

    eventually(both_run, timeout_seconds=20.0)

    supervisor.kill9()

    supervisor.wait_for_line("The supervisor has ended, so this process stops as well")
    assert len(group(supervisor)) >= 2
    gate.open()
    rows_ended()
    nothing_is_left(supervisor)
    assert effects() == {"key-0": 1, "key-1": 1}
    nothing_was_spent()
    assert not ConsumerModel.objects.exists()


@pytest.mark.once
def test_failure_in_one_process_stops_all_if_it_must_not_be_silent(supervise):
    supervisor = supervise(jobs_settings={"FAIL_SILENTLY": False})
    consumers_are(2)

    schedule(tasks.write_and_fail, "key")

    assert supervisor.wait() == 1, supervisor.output
    supervisor.wait_for_line("A process ended with a failure, so the others are stopped")
    assert statuses() == {"failed": 1}
    assert not ConsumerModel.objects.exists()
    nothing_is_left(supervisor)


@pytest.mark.once
def test_number_of_processes_can_be_that_of_the_processors(consume):
    supervisor = consume("--processes", "auto", "--burst", jobs_settings=LONG_LEASE)

    assert supervisor.wait() == 0
    assert len(started(supervisor)) == len(os.sched_getaffinity(0))


@pytest.mark.once
def test_one_process_is_supervised_if_it_is_asked_for(consume):
    supervisor = consume("--processes", "1", "--burst", jobs_settings=LONG_LEASE)

    assert supervisor.wait() == 0
    assert len(started(supervisor)) == 1


@pytest.mark.once
def test_no_process_is_started_unless_asked_for(consume):
    consumer = consume("--burst", jobs_settings=LONG_LEASE)

    assert consumer.wait() == 0
    assert started(consumer) == []


@pytest.mark.once
@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_number_of_processes_that_is_none_is_refused(consume, count):
    consumer = consume(f"--processes={count}")

    assert consumer.wait() == 2
