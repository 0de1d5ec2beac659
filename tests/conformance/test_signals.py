"""Signals: sent after what they tell was committed, and to nobody's harm."""

import logging
import threading
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, connections, transaction

from firefly_jobs import Cancel, Retry, Snooze, Workflow, messenger, schedule_many, signals
from firefly_jobs.attempts import Verdict
from firefly_jobs.burials import Burials, Death
from firefly_jobs.exceptions import TimeLimitExceeded
from firefly_jobs.models import TaskModel, WorkflowModel
from tests.conformance import tasks
from tests.conformance.support import (
    claim_one,
    consuming,
    dead_consumer,
    effects,
    outside,
    run_burst,
    schedule,
    status_seen_outside,
    undone,
)
from tests.conformance.test_groups import groups, members, schedule_warm_up
from tests.factories import unique_name
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

ALL = ["scheduled", "started", "completed", "retried", "failed", "cancelled", "rescued"]


def create(value=1):
    Effect.objects.create(task_key="signalled", value=value)


async def acreate():
    await Effect.objects.acreate(task_key="signalled", value=1)


def raising(error):
    def body():
        raise error

    return body


@contextmanager
def receiving(*names, receiver=None):
    """Collect what the signals say; or let ``receiver`` hear them."""
    heard: list[tuple[str, dict[str, Any]]] = []
    connected = []
    for name in names or ALL:
        signal = getattr(signals, f"task_{name}")

        def receive(sender, signal, name=name, **words):
            assert sender is TaskModel
            heard.append((name, words))

        connected.append((signal, receiver or receive))
        signal.connect(connected[-1][1], weak=False)
    try:
        yield heard
    finally:
        for signal, connected_receiver in connected:
            assert signal.disconnect(connected_receiver)


def names(heard):
    return [name for name, _ in heard]


def told(heard, name):
    (words,) = [words for found, words in heard if found == name]
    return words


def follow_up():
    tasks.nothing.schedule()


def follow_up_and_fail():
    follow_up()
    raise ValueError


# --- scheduled


def test_scheduling_is_told_once_the_transaction_has_committed():
    with receiving("scheduled") as heard, transaction.atomic():
        row = tasks.nothing.using(queue="slow").schedule()
        assert heard == []

    words = {"func_name": tasks.nothing.name, "queue": "slow", "using": "default"}
    assert heard == [("scheduled", {"task_id": row.pk, **words})]


def test_scheduling_without_a_transaction_is_told_at_once():
    with receiving("scheduled") as heard:
        row = tasks.nothing.schedule()

    assert told(heard, "scheduled")["task_id"] == row.pk


def test_what_is_rolled_back_is_not_told():
    with receiving() as heard:
        with transaction.atomic():
            tasks.nothing.schedule()
            transaction.set_rollback(True)
        with transaction.atomic():
            tasks.nothing.schedule()
            with pytest.raises(LookupError):
                undone(tasks.nothing.schedule)

    assert names(heard) == ["scheduled"]


def test_a_bulk_tells_each_row():
    with receiving("scheduled") as heard:
        rows = schedule_many([tasks.nothing] * 5)

    assert [words["task_id"] for _, words in heard] == [row.pk for row in rows]


def test_a_call_whose_key_is_taken_is_not_told_again():
    task = tasks.nothing.using(unique_key="one")
    with receiving("scheduled") as heard:
        first = task.schedule()
        assert task.schedule().pk == first.pk
        schedule_many([task, task, tasks.nothing.using(unique_key="two")])

    assert len(heard) == 2


def test_a_receiver_that_raises_harms_neither_the_caller_nor_the_next_receiver(caplog):
    def bad(**_):
        raise ValueError("mine")

    with receiving("scheduled", receiver=bad), receiving("scheduled") as heard:
        row = tasks.nothing.schedule()

    assert told(heard, "scheduled")["task_id"] == row.pk
    (line,) = [record for record in caplog.records if record.name == "firefly_jobs"]
    assert line.getMessage().startswith("test_a_receiver_that_raises")
    assert line.task_id == row.pk


# --- what becomes of a call


@pytest.mark.parametrize("body", [create, lambda: None, acreate], ids=["sync", "batched", "async"])
def test_a_completion_is_told_with_what_the_consumer_knows(body):
    with receiving("started", "completed") as heard:
        row = schedule(body)
        run_burst()

    assert names(heard) == ["started", "completed"]
    words = told(heard, "completed")
    assert words.pop("duration") >= 0
    assert words == told(heard, "started")
    row.refresh_from_db()
    assert words == {
        "task_id": row.pk,
        "func_name": row.func_name,
        "queue": "default",
        "using": "default",
        "attempt": 1,
        "consumer": row.consumer,
    }


@pytest.mark.parametrize(
    ("error", "name", "more"),
    [
        (ValueError("broken"), "failed", {"error": "ValueError: broken"}),
        (Retry(delay=3600), "retried", {"delay": 3600.0}),
        (Cancel("no"), "cancelled", {"error": "no"}),
        (Snooze(delay=3600), None, {}),
    ],
)
def test_an_end_without_success_is_told(error, name, more):
    with receiving("completed", "retried", "failed", "cancelled", "rescued") as heard:
        schedule(raising(error), max_retries=1 if name == "retried" else 0)
        run_burst()

    assert names(heard) == ([name] if name else [])
    if name:
        assert more.items() <= told(heard, name).items()


def test_a_call_that_expired_is_told_as_cancelled():
    with receiving("started", "cancelled") as heard:
        row = tasks.nothing.using(expires=3600).schedule()
        TaskModel.objects.filter(pk=row.pk).update(expires_at="2020-01-01T00:00:00Z")
        run_burst()

    assert names(heard) == ["cancelled"]
    assert told(heard, "cancelled")["error"] == "expired"


def test_what_a_receiver_is_told_is_committed():
    seen = []

    def look(task_id, **_):
        seen.append(TaskModel.objects.get(pk=task_id).status)

    with receiving("completed", "failed", receiver=look):
        for body in (create, lambda: None, raising(ValueError())):
            schedule(body)
        run_burst()

    assert sorted(seen) == ["completed", "completed", "failed"]


def test_members_of_a_group_are_told_after_its_commit(monkeypatch):
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 1.0)
    schedule_warm_up()
    rows = [schedule(create) for _ in range(5)]
    seen = []

    def look(task_id, **_):
        seen.append((task_id, TaskModel.objects.get(pk=task_id).status))

    with groups() as found, receiving("completed", receiver=look):
        run_burst(group_commit=True)

    assert members(found) == [row.pk for row in rows]
    assert {(row.pk, "completed") for row in rows} <= set(seen)


def test_what_a_call_schedules_is_told_once_it_has_committed():
    with receiving("scheduled") as heard:
        schedule(follow_up)
        schedule(follow_up_and_fail)
        run_burst()

    told_names = [words["func_name"] for _, words in heard]
    assert told_names == [tasks.call.name, tasks.call.name, tasks.nothing.name]


def test_without_receivers_nothing_is_built(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(messenger, "_words", refuse)
    monkeypatch.setattr(messenger, "_on_commit", refuse)
    rows = [schedule(create), schedule(lambda: None), schedule(raising(ValueError()))]
    waiting = schedule(create)
    assert waiting.cancel()
    run_burst()

    for row in rows:
        row.refresh_from_db()
    assert [row.status for row in rows] == ["completed", "completed", "failed"]


# --- what others do


def test_what_a_person_cancels_is_told_once_it_is_committed():
    with receiving("cancelled") as heard:
        row, running = tasks.nothing.schedule(), tasks.nothing.schedule()
        TaskModel.objects.filter(pk=running.pk).update(status="running")
        with transaction.atomic():
            row.cancel()
            running.cancel()
            assert heard == []
        row.cancel()

    assert names(heard) == ["cancelled"]
    words = told(heard, "cancelled")
    assert (words["task_id"], words["consumer"], words["attempt"]) == (row.pk, None, 1)


def test_a_rescue_is_told_with_the_dead_consumer(jobs):
    jobs(LEASE_SECONDS=1, CONSUMER_NAP_TIME=0.1)
    row = tasks.insert.schedule("rescued", 1)
    dead = dead_consumer()
    claim_one(consumer=dead.pk)

    with receiving("rescued", "completed") as heard, consuming():

        def is_completed():
            assert names(heard) == ["rescued", "completed"]

        eventually(is_completed)

    words = told(heard, "rescued")
    assert (words["task_id"], words["consumer"]) == (row.pk, dead.pk)
    assert effects() == [1]


def test_what_a_supervisor_ends_is_told():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    held = claim_one(consumer=dead.pk)
    error = TimeLimitExceeded("It ran for more than 1s.")
    verdict = Verdict(task_id=held.id, fence=held.fence, error=error, duration=1.0)

    with receiving("failed", "rescued") as heard:
        burials = Burials(using="default", on_buried=lambda _: None)
        burials.start()
        burials.add(Death(consumers=(dead.pk,), verdict=verdict))
        burials.stop(timeout_seconds=20)

    assert names(heard) == ["failed"]
    assert told(heard, "failed")["task_id"] == row.pk


# --- the messenger


def test_a_slow_receiver_holds_up_no_call():
    may_go_on, threads = threading.Event(), set()

    def slow(**_):
        threads.add(threading.current_thread().name)
        assert may_go_on.wait(20)

    with receiving("started", "completed", receiver=slow), consuming():
        rows = [schedule(create) for _ in range(5)]

        def all_completed():
            assert {status_seen_outside(row) for row in rows} == {"completed"}

        eventually(all_completed)
        may_go_on.set()

    assert threads == {"firefly-messenger"}


def test_a_consumer_that_stops_sends_what_is_queued():
    may_go_on, heard = threading.Event(), []

    def slow(task_id, **_):
        assert may_go_on.wait(20)
        heard.append(task_id)

    with receiving("completed", receiver=slow):
        rows = [schedule(lambda: None) for _ in range(20)]
        with consuming() as consumer:
            eventually(lambda: all_have_ended(rows))
            consumer.stop()
            may_go_on.set()

    assert sorted(heard) == [row.pk for row in rows]


def all_have_ended(rows):
    assert {status_seen_outside(row) for row in rows} == {"completed"}


def test_a_consumer_that_stops_does_not_wait_for_ever(monkeypatch, caplog):
    monkeypatch.setattr("firefly_jobs.consumer.INTERRUPT_SECONDS", 0.1)
    may_end = threading.Event()

    def stuck(**_):
        may_end.wait(60)

    with receiving("started", receiver=stuck):
        row = schedule(create)
        run_burst(shutdown_timeout=0)
        assert status_seen_outside(row) == "completed"
        assert "1 signals were not sent" in caplog.text
        may_end.set()
        eventually(has_no_messenger)


def has_no_messenger():
    alive = [thread.name for thread in threading.enumerate()]
    assert "firefly-messenger" not in alive


def test_signals_beyond_the_bound_are_dropped_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(messenger, "QUEUE_MAX", 2)
    caplog.set_level(logging.WARNING, "firefly_jobs")
    may_go_on, heard = threading.Event(), []

    def slow(task_id, **_):
        assert may_go_on.wait(20)
        heard.append(task_id)

    with receiving("completed", receiver=slow):
        rows = [schedule(create) for _ in range(10)]
        with consuming():
            eventually(lambda: all_have_ended(rows))
            may_go_on.set()

    assert 0 < len(heard) <= 3
    assert caplog.text.count("Signals are dropped") == 1
    assert f"{10 - len(heard)} signals were dropped" in caplog.text


def test_the_messenger_keeps_no_connection_once_it_is_idle(monkeypatch):
    closed = threading.Event()
    close_all = connections.close_all

    def watch():
        close_all()
        if threading.current_thread().name == "firefly-messenger":
            closed.set()

    monkeypatch.setattr(type(connections), "close_all", lambda _: watch())

    def query(task_id, **_):
        TaskModel.objects.get(pk=task_id)

    with receiving("completed", receiver=query), consuming():
        schedule(create)
        assert closed.wait(20)


def test_a_receiver_may_schedule():
    with receiving("completed", receiver=lambda func_name, **_: follow(func_name)):
        schedule(create)
        with consuming():

            def has_followed():
                assert outside(effects) == [1, 2]

            eventually(has_followed)


def follow(func_name):
    if func_name == tasks.call.name:
        tasks.insert.schedule("followed", 2)


def test_an_async_receiver_is_awaited():
    heard = []

    async def receive(task_id, **_):
        heard.append(task_id)

    with receiving("completed", receiver=receive):
        row = async_to_sync(tasks.anothing.schedule)()
        run_burst()

    assert heard == [row.pk]


def test_scheduling_where_transactions_are_managed_by_hand_is_not_told():
    with receiving("scheduled") as heard:
        connection.set_autocommit(False)
        try:
            tasks.nothing.schedule()
            connection.rollback()
        finally:
            connection.set_autocommit(True)

    assert heard == []


# --- workflows

WORKFLOWS = ["started", "completed", "failed", "cancelled"]


@contextmanager
def receiving_of_workflows():
    """Collect what the signals about workflows say."""
    heard: list[tuple[str, dict[str, Any]]] = []
    connected = []
    for event in WORKFLOWS:
        signal = getattr(signals, f"workflow_{event}")

        def receive(sender, signal, event=event, **words):
            assert sender is WorkflowModel
            status = WorkflowModel.objects.get(pk=words["workflow_id"]).status
            # What is told is committed; when it starts, the end may be, too.
            assert event in {"started", status}
            heard.append((event, words))

        connected.append((signal, receive))
        signal.connect(receive, weak=False)
    try:
        yield heard
    finally:
        for signal, receive in connected:
            assert signal.disconnect(receive)


def workflow(*jobs):
    wf = Workflow("signalled")
    for job in jobs:
        wf.add(job)
    return wf


def job_of(body):
    key = unique_name("step")
    tasks.BODIES[key] = body
    return tasks.call.job.with_args(key)


@pytest.mark.parametrize(
    ("body", "end", "error"),
    [
        (lambda: None, "completed", ""),
        (create, "completed", ""),
        (raising(ValueError("broken")), "failed", "step 'call' failed: ValueError: broken"),
    ],
    ids=["batched", "sync", "failed"],
)
def test_a_workflow_is_told_from_its_scheduling_to_its_end(body, end, error):
    with receiving_of_workflows() as heard:
        run = workflow(job_of(body)).schedule()
        assert names(heard) == ["started"]
        run_burst()

    words = {"workflow_id": run.pk, "name": "signalled", "using": "default"}
    assert heard == [("started", words | {"error": ""}), (end, words | {"error": error})]


def test_a_workflow_that_is_cancelled_is_told_once():
    with receiving_of_workflows() as heard:
        run = workflow(tasks.nothing, tasks.nothing).schedule()
        with transaction.atomic():
            run.cancel()
            assert names(heard) == ["started"]
        run.cancel()

    assert names(heard) == ["started", "cancelled"]


def test_a_workflow_that_is_rolled_back_is_not_told():
    with receiving_of_workflows() as heard, pytest.raises(LookupError):
        undone(workflow(tasks.nothing).schedule)

    assert heard == []


def test_a_workflow_that_runs_again_is_told_of_its_second_end_only():
    with receiving_of_workflows() as heard:
        run = workflow(job_of(raising(ValueError()))).schedule()
        run_burst()
        run.retry_failed()
        run_burst()

    assert names(heard) == ["started", "failed", "failed"]


def test_a_receiver_of_a_workflow_that_raises_is_logged_with_its_id(caplog):
    def bad(**_):
        raise ValueError("mine")

    signals.workflow_completed.connect(bad)
    try:
        run = workflow(tasks.nothing).schedule()
        run_burst()
    finally:
        signals.workflow_completed.disconnect(bad)

    (line,) = [r for r in caplog.records if "receiver of a signal" in r.getMessage()]
    assert line.workflow_id == run.pk


def test_without_receivers_nothing_about_workflows_is_built(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(messenger, "_on_commit", refuse)
    run = workflow(tasks.nothing).schedule()
    run_burst()

    run.refresh_from_db()
    assert run.status == "completed"
