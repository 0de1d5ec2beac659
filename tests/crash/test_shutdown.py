"""A consumer that is asked to stop loses nothing, spends nothing, and ends soon."""

import os
import signal
import time
from contextlib import suppress

import pytest
from django.db import connection

from firefly_jobs import schedule_many
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from tests.crash import tasks
from tests.crash.conftest import (
    Kinds,
    consumer_id,
    describe_rows,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    statuses,
    stops_in_order,
    time_passes,
)
from tests.support.databases import url_of_test_database
from tests.support.waiting import eventually

# What an end may cost beside the shutdown timeout; a process that hangs takes much longer.
SOON_SECONDS = 10.0

STUCK: Kinds = {
    "loop": tasks.loop,
    "sleep": tasks.sleep,
    "query": tasks.sleep_in_the_database,
    "coroutine": tasks.asleep,
    "coroutine-thread": tasks.asleep_in_a_thread,
}

ANNOUNCING_WITHOUT_END: Kinds = {
    "sync": tasks.write_and_announce_without_end,
    "async": tasks.awrite_and_announce_without_end,
}


def send(consumer, number):
    os.kill(consumer.pid, number)


def ends_soon(consumer, *, code=0, seconds=SOON_SECONDS):
    began = time.monotonic()
    assert consumer.wait(timeout_seconds=2 * SOON_SECONDS) == code, consumer.output
    assert time.monotonic() - began < seconds, consumer.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_gives_back_what_has_not_started_and_finishes_what_runs(
    consume, gate, calls, number
):
    # Quick calls first, so that the consumer claims many at a time.
    for position in range(60):
        schedule(tasks.write, f"before-{position}")
    running = schedule(tasks.wait_then_write, str(calls), "running", str(gate))
    later = [schedule(tasks.touch_nothing, f"after-{position}") for position in range(30)]
    consumer = consume()
    gate.wait_until_reached()

    send(consumer, number)
    consumer.wait_for_line("stops")
    waiting = TaskModel.objects.filter(pk__in=[row.pk for row in later])

    def is_given_back() -> None:
        assert set(waiting.values_list("status", flat=True)) == {"created"}, describe_rows()

    eventually(is_given_back)
    assert consumer.returncode is None
    gate.open()
    ends_soon(consumer)
    running.refresh_from_db()
    assert running.status == "completed"
    assert effects()["running"] == 1
    rows = set(waiting.values_list("status", "consumer", "started", "fence"))
    assert {row[:3] for row in rows} == {("created", None, None)}
    # Some had been claimed for the lane, so something was given back at all.
    assert 1 in {row[3] for row in rows}
    nothing_was_spent()
    assert not ConsumerModel.objects.exists()


@pytest.fixture(autouse=True)
def no_session_is_left(transactional_db):
    """End the sessions on PostgreSQL whose client has gone and whose query goes on."""
    yield
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'SELECT pg_sleep%'"
            )


@pytest.mark.parametrize("arguments", [[], ["--processes", "2"], ["--reload"]], ids=" ".join)
def test_a_task_may_end_processes_that_it_forked(consume, arguments):
    """Their signals are not the consumer's, though they were forked from it."""
    row = schedule(tasks.fork_and_end_children, "key")
    consumer = consume(*arguments)

    rows_ended()

    row.refresh_from_db()
    assert row.returned == [-signal.SIGTERM] * 3
    assert schedule(tasks.write, "after").pk
    rows_ended()
    assert "Received" not in consumer.output
    stops_in_order(consumer)


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("return", 0), ("raise", 1)])
def test_child_that_leaves_the_call_it_was_forked_in_ends_and_settles_nothing(consume, how, code):
    row = schedule(tasks.fork_and_leave, "key", how)
    consumer = consume()

    rows_ended()

    row.refresh_from_db()
    assert row.returned == code
    assert effects() == {"key": 1}
    stops_in_order(consumer)


def test_child_that_stays_does_not_keep_the_consumer(consume):
    row = schedule(tasks.fork_a_child_that_stays, "key")
    consumer = consume()
    rows_ended()

    stops_in_order(consumer)

    row.refresh_from_db()
    os.kill(row.returned, signal.SIGKILL)
    assert effects() == {"key": 1}


def stuck_calls():
    for kind in STUCK:
        marks = [pytest.mark.server] if kind == "query" else []
        yield pytest.param(kind, signal.SIGTERM, marks=marks, id=kind)
    yield pytest.param("loop", signal.SIGINT, id="loop-SIGINT")


@pytest.mark.parametrize("writes", [False, True], ids=["idle", "writing"])
@pytest.mark.parametrize(("kind", "number"), list(stuck_calls()))
def test_call_that_outlasts_the_shutdown_timeout_is_given_back_unspent(
    consume, gate, kind, number, writes
):
    row = schedule(STUCK[kind], str(gate), writes=writes)
    consumer = consume("--shutdown-timeout", "0.3")
    gate.wait_until_reached()

    send(consumer, number)

    ends_soon(consumer)
    row.refresh_from_db()
    assert (row.status, row.consumer, row.already_run) == ("created", None, True), describe_rows()
    assert not effects()
    nothing_was_spent()
    assert [attempt.outcome for attempt in TaskAttempt.objects.all()] == ["released"]
    assert not ConsumerModel.objects.exists()


@pytest.mark.parametrize("kind", ANNOUNCING_WITHOUT_END)
def test_callbacks_that_outlast_the_shutdown_timeout_are_dropped_and_the_log_says_so(
    consume, gate, announced, kind
):
    row = schedule(ANNOUNCING_WITHOUT_END[kind], str(gate), str(announced))
    consumer = consume("--shutdown-timeout", "0.3")
    gate.wait_until_reached()

    consumer.terminate()

    ends_soon(consumer)
    row.refresh_from_db()
    assert row.status == "completed"
    assert (effects(), announced.count()) == ({"committed": 1}, {})
    assert f"Task {row.pk} has committed, but its on_commit callbacks" in consumer.output
    # Its own sessions were ended, and nobody should take that for trouble of the server's.
    assert "Stopped listening" not in consumer.output
    assert not ConsumerModel.objects.exists()


@pytest.mark.server
def test_coroutines_that_wait_for_a_connection_are_given_back_soon_and_unspent(
    consume, gate, calls
):
    rows = schedule_many(
        [tasks.write_then_await.job.with_args(str(calls), str(n), str(gate)) for n in range(500)]
    )
    consumer = consume("--async-slots", "500", "--shutdown-timeout", "0.2")

    def all_run() -> None:
        assert calls.count().total() == len(rows)

    eventually(all_run, timeout_seconds=30.0)

    consumer.terminate()

    ends_soon(consumer)
    assert statuses() == {"created": len(rows)}
    assert not effects()
    nothing_was_spent()
    assert not ConsumerModel.objects.exists()


@pytest.mark.parametrize("kind", ["loop", "sleep", "coroutine"])
def test_second_signal_ends_the_process_at_once_and_another_does_its_work(consume, gate, kind):
    row = schedule(STUCK[kind], str(gate))
    consumer = consume("--shutdown-timeout", "60")
    gate.wait_until_reached()
    consumer.terminate()
    consumer.wait_for_line("stops")

    send(consumer, signal.SIGTERM)

    ends_soon(consumer, code=1, seconds=2.0)
    other = consume("--queue", "another")

    def is_rescued() -> None:
        row.refresh_from_db()
        assert (row.status, row.rescues, row.retry_attempts) == ("created", 1, 0), describe_rows()

    eventually(is_rescued)
    stops_in_order(other)


@pytest.mark.server
def test_consumer_ends_while_the_database_refuses_connections(consume, database_proxy, gate, calls):
    schedule(tasks.wait, str(calls), "key", str(gate))
    consumer = consume(
        "--shutdown-timeout", "1", database_url=url_of_test_database(port=database_proxy.port)
    )
    gate.wait_until_reached()
    database_proxy.refuse()
    database_proxy.cut()
    consumer.wait_for_line("interrupted, goes on|Heartbeat failed")

    consumer.terminate()

    ends_soon(consumer)
    # Nobody could be told, so its lease has to run out.
    other = consume()
    gate.open()
    rows_ended()
    stops_in_order(other)


@pytest.mark.server
def test_call_that_returns_after_the_database_has_gone_is_settled_when_it_is_back_in_time(
    consume, database_proxy, gate, calls
):
    schedule(tasks.wait, str(calls), "key", str(gate))
    consumer = consume(
        "--shutdown-timeout", "20", database_url=url_of_test_database(port=database_proxy.port)
    )
    gate.wait_until_reached()
    database_proxy.refuse()
    database_proxy.cut()
    consumer.terminate()
    consumer.wait_for_line("stops")
    gate.open()
    consumer.wait_for_line("A step of stopping failed")

    database_proxy.accept()

    ends_soon(consumer)
    rows_ended(timeout_seconds=1.0)
    assert calls.count() == {"key": 1}
    assert not ConsumerModel.objects.exists()


@pytest.mark.server
def test_second_signal_ends_a_process_that_waits_for_a_silent_database(consume, database_proxy):
    consumer = consume(
        "--shutdown-timeout", "1", database_url=url_of_test_database(port=database_proxy.port)
    )
    consumer_id(consumer)
    database_proxy.freeze()
    time_passes(2.0)
    consumer.terminate()
    time_passes(0.5)

    with suppress(ProcessLookupError):
        send(consumer, signal.SIGTERM)

    assert consumer.wait(timeout_seconds=20.0) in {0, 1}


def test_consumer_that_has_nothing_to_do_ends_at_once(consume):
    consumer = consume()
    consumer_id(consumer)

    consumer.terminate()

    ends_soon(consumer, seconds=3.0)
    assert not ConsumerModel.objects.exists()
