"""Outcomes that cannot be written at once: a locked row keeps no other one waiting."""

import threading
from contextlib import suppress
from typing import Any

import pytest
from django.db import OperationalError, connection, connections

from firefly_jobs import (
    Consumer,
    columns,
    consequences,
    current_task,
    databases,
    fencing,
    lifecycle,
    settling,
)
from firefly_jobs.attempts import Outcome
from firefly_jobs.executors import calls
from firefly_jobs.models import TaskAttempt, TaskModel
from firefly_jobs.serializers import dumps_returned
from firefly_jobs.settling import Settler
from tests.conformance import tasks
from tests.conformance.support import (
    captured_statements,
    claim,
    claim_one,
    consuming,
    impatient_connections,
    schedule,
    second_connection,
)
from tests.support.threads import Concurrent
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)

TABLE = TaskModel._meta.db_table


@pytest.fixture
def told():
    return []


@pytest.fixture
def settler(told):
    databases.of("default").prepare_dispatcher(connection, 1)
    return Settler(using="default", on_settled=lambda claim, settlement: told.append(claim.id))


def succeeded(held):
    returned = dumps_returned(None, task_name=held.func_name, serializer="pickle")
    return Outcome(claim=held, duration=0.1, returned=returned)


def lock(other, pk):
    """Lock a row, on SQLite the whole database, until the transaction of ``other`` ends."""
    with other.cursor() as cursor:
        cursor.execute(f"UPDATE {TABLE} SET error = 'locked' WHERE id = %s", [pk])


def test_outcomes_are_due_after_50_ms_and_at_once_when_nothing_else_runs(settler, monkeypatch):
    moment = 1000.0
    monkeypatch.setattr(settling, "monotonic", lambda: moment)
    for _ in range(2):
        tasks.nothing.schedule()
    assert settler.seconds_until_due(is_quiet=True) is None

    for held in claim():
        settler.add(succeeded(held), is_urgent=False)
        assert settler.seconds_until_due(is_quiet=False) == pytest.approx(1000.05 - moment)
        assert not settler.is_due(is_quiet=False)
        assert settler.is_due(is_quiet=True)
        moment += 0.04

    assert settler.is_due(is_quiet=False)


def test_outcomes_are_due_at_once_when_they_fill_a_statement_or_somebody_waits(settler):
    tasks.nothing.schedule()
    outcome = succeeded(claim_one())
    settler.add(outcome, is_urgent=True)
    assert settler.is_due(is_quiet=False)
    settler.flush(consumer=1)

    for _ in range(settling.BATCH_SIZE):
        assert not settler.is_urgent
        settler.add(outcome, is_urgent=False)
    assert settler.is_due(is_quiet=False)


def test_outcomes_that_wait_are_written_when_the_consumer_stops(monkeypatch):
    monkeypatch.setattr(settling, "FLUSH_SECONDS", 60.0)
    is_slow, was_quick, may_end = threading.Event(), threading.Event(), threading.Event()

    def slow():
        is_slow.set()
        assert may_end.wait(20)

    with consuming(threads=2) as consumer:
        schedule(slow)
        assert is_slow.wait(20)
        row = schedule(was_quick.set)
        assert was_quick.wait(20)
        consumer.stop()
        may_end.set()

    row.refresh_from_db()
    assert (row.status, row.fence) == ("completed", 1)


@pytest.mark.server
def test_outcome_whose_row_is_locked_lets_the_others_pass(settler, told):
    for _ in range(30):
        tasks.nothing.schedule()
    first, *others = claim()
    with second_connection() as other:
        other.set_autocommit(False)
        lock(other, first.id)
        for held in (first, *others):
            settler.add(succeeded(held), is_urgent=False)

        settler.flush(consumer=1)

        assert told == [held.id for held in others]
        assert len(settler) == 1
        assert 0 < settler.seconds_until_due(is_quiet=True) <= 1
        other.rollback()
    settler.flush(consumer=1, is_last=True)
    assert told[-1] == first.id
    assert set(TaskModel.objects.values_list("status", flat=True)) == {"completed"}


@pytest.mark.server
def test_many_locked_rows_cost_a_few_waits_and_not_one_each(settler, told):
    for _ in range(20):
        tasks.nothing.schedule()
    held = claim()
    with second_connection() as other:
        other.set_autocommit(False)
        for item in held:
            lock(other, item.id)
        for item in held:
            settler.add(succeeded(item), is_urgent=False)

        settler.flush(consumer=1)

        assert (len(settler), told) == (20, [])
        other.rollback()
    settler.flush(consumer=1, is_last=True)
    assert sorted(told) == [item.id for item in held]


def test_lock_that_lasts_never_makes_a_failure_of_a_call_that_returned(settler, told):
    row = tasks.nothing.schedule()
    settler.add(succeeded(claim_one()), is_urgent=False)
    with impatient_connections():
        databases.of("default").prepare_dispatcher(connections["default"], 1)
        with second_connection() as other:
            other.set_autocommit(False)
            lock(other, row.pk)
            for _ in range(7):
                # SQLite cannot tell which row is locked, so the dispatcher tries again later.
                with suppress(OperationalError):
                    settler.flush(consumer=1, is_last=True)
            assert (len(settler), told) == (1, [])
            other.rollback()
        settler.flush(consumer=1, is_last=True)
    row.refresh_from_db()
    assert (row.status, row.error) == ("completed", "")


def test_failures_that_are_at_hand_together_share_a_transaction(settler, told):
    for _ in range(20):
        tasks.nothing.schedule()
    stale, *held = claim()
    lifecycle.release([stale], using="default")
    for item in (stale, *held):
        settler.add(Outcome(claim=item, duration=0.1, error=ValueError()), is_urgent=False)

    with captured_statements() as statements:
        settler.flush(consumer=1)

    assert sum(sql.startswith("INSERT") for sql, _ in statements) == 1
    assert sorted(told) == sorted([stale.id, *(item.id for item in held)])
    failed = TaskModel.objects.filter(status="failed", error="ValueError")
    assert set(failed.values_list("pk", flat=True)) == {item.id for item in held}
    attempts = TaskAttempt.objects.filter(outcome="failed", consumer=1)
    assert sorted(attempts.values_list("task_id", flat=True)) == [item.id for item in held]
    assert TaskModel.objects.get(pk=stale.id).status == "created"


def test_a_failure_that_cannot_be_stored_keeps_none_of_its_neighbours(settler, told, monkeypatch):
    rows = [tasks.nothing.schedule() for _ in range(3)]
    unstorable = rows[1].pk
    write = columns.history_of

    def spoil(settlement, consumer):
        attempt: Any = write(settlement, consumer)
        if settlement.claim.id == unstorable and settlement.traceback:
            attempt.outcome = None
        return attempt

    monkeypatch.setattr(lifecycle, "history_of", spoil)
    for item in claim():
        settler.add(Outcome(claim=item, duration=0.1, error=ValueError()), is_urgent=False)

    settler.flush(consumer=1)

    assert sorted(told) == [row.pk for row in rows]
    errors = dict(TaskModel.objects.filter(status="failed").values_list("pk", "error"))
    assert errors.pop(unstorable) == "IntegrityError while its outcome was stored"
    assert set(errors.values()) == {"ValueError"}
    assert len(errors) == 2


def test_an_outcome_that_can_never_be_stored_lets_the_others_pass(
    settler, told, monkeypatch, caplog
):
    rows = [tasks.nothing.schedule() for _ in range(3)]

    def stumble(settlements, *, using):
        if any(item.claim.id == rows[1].pk for item in settlements):
            raise LookupError("a defect")
        consequences.follow(settlements, using=using)

    for item in claim():
        settler.add(Outcome(claim=item, duration=0.1, error=ValueError()), is_urgent=False)
    with monkeypatch.context() as patch:
        patch.setattr(lifecycle, "follow", stumble)
        settler.flush(consumer=1)

    assert told == [rows[0].pk, rows[2].pk]
    assert f"Outcomes wait because that of task {rows[1].pk} raised LookupError" in caplog.text
    assert "a defect" in caplog.text

    settler.flush(consumer=1, is_last=True)

    assert told == [rows[0].pk, rows[2].pk, rows[1].pk]
    assert set(TaskModel.objects.values_list("status", flat=True)) == {"failed"}


@pytest.mark.parametrize("options", [{"burst": True}, {"max_tasks": 3}], ids=str)
def test_an_outcome_that_can_never_be_stored_keeps_no_consumer_from_ending(
    options, monkeypatch, caplog
):
    rows = [tasks.nothing.schedule() for _ in range(3)]
    complete = lifecycle.complete_many

    def stumble(completions, **words):
        if any(item.id == rows[1].pk for item in completions):
            raise LookupError("a defect")
        return complete(completions, **words)

    def never(settlement, **_):
        raise LookupError(f"a defect of {settlement.claim.id}")

    monkeypatch.setattr(lifecycle, "complete_many", stumble)
    monkeypatch.setattr(lifecycle, "settle", never)
    monkeypatch.setattr(settling, "_ASIDE_SECONDS_MIN", 0.01)

    Concurrent(Consumer(**options).run).result(timeout_seconds=20)

    assert f"Gave up what follows from the end of task {rows[1].pk}" in caplog.text
    found = list(TaskModel.objects.order_by("pk").values_list("status", "error"))
    text = "LookupError while its outcome was stored"
    assert found == [("completed", ""), ("failed", text), ("completed", "")]


def test_claim_is_held_until_it_is_known_who_settled_it(settler, told, monkeypatch):
    tasks.nothing.schedule()
    held = claim_one()
    lifecycle.release([held], using="default")
    settler.add(succeeded(held), is_urgent=False)

    def is_away(*_args, **_options):
        raise OperationalError("the server is away")

    with monkeypatch.context() as patch:
        patch.setattr(fencing, "was_settled", is_away)
        with pytest.raises(OperationalError):
            settler.flush(consumer=1)
    assert (len(settler), told) == (1, [])

    settler.flush(consumer=1)

    assert (len(settler), told) == (0, [held.id])


@pytest.mark.server
def test_consumer_runs_and_stops_while_somebody_locks_a_row_of_its(caplog):
    with second_connection() as other:
        other.set_autocommit(False)

        def body():
            lock(other, current_task().id)

        def has_said_so():
            assert "locked their rows" in caplog.text

        schedule(body)
        with consuming(shutdown_timeout=0.0):
            eventually(has_said_so)
            later = [tasks.nothing.schedule() for _ in range(5)]

            def are_completed():
                rows = TaskModel.objects.filter(pk__in=[item.pk for item in later])
                assert {item.status for item in rows} == {"completed"}

            eventually(are_completed)
        other.rollback()


def test_calls_that_never_started_do_not_count_as_short():
    tasks.nothing.schedule()
    held = claim_one()
    consumer = Consumer()

    for _ in range(5):
        consumer.ended(calls.not_started(held, OperationalError("no room")), is_urgent=False)

    assert not consumer._durations.are_short(held.func_name)
