"""Events: what happens to a task is told with it, and nothing is paid while none are kept."""

from datetime import timedelta

import pytest
from asgiref.sync import async_to_sync
from django.core.management import call_command
from django.db import transaction
from django.utils import timezone

from firefly_jobs import (
    Cancel,
    Concurrency,
    Retry,
    Snooze,
    Workflow,
    admission,
    current_task,
    events,
    leases,
    lifecycle,
    schedule_many,
    task,
)
from firefly_jobs.attempts import Verdict
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import LeaseLost, TimeLimitExceeded
from firefly_jobs.models import TaskEvent, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    ago,
    captured_statements,
    claim,
    claim_one,
    consuming,
    dead_consumer,
    run_burst,
    run_one,
    schedule,
    take_over,
    undone,
)
from tests.conformance.test_cost import statements_of_a_consumer
from tests.conformance.test_groups import groups, members, schedule_warm_up
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

TABLE = TaskEvent._meta.db_table


@pytest.fixture(autouse=True)
def kept(jobs):
    jobs(KEEP_EVENTS=True)


def create(value=1):
    Effect.objects.create(task_key="told", value=value)


async def acreate():
    await Effect.objects.acreate(task_key="told", value=1)


def raising(error):
    def body():
        raise error

    return body


def kinds(row):
    return [event.kind for event in row.events.all()]


def told(row):
    return list(row.events.values_list("kind", "message"))


# --- what is told


@pytest.mark.parametrize("body", [create, lambda: None, acreate], ids=["sync", "batched", "async"])
def test_a_success_is_told_from_its_scheduling_to_its_end(body):
    row = run_one(body)

    found = list(row.events.all())
    assert [e.kind for e in found] == ["scheduled", "claimed", "started", "completed"]
    assert [e.consumer for e in found] == [None, row.consumer, row.consumer, row.consumer]
    assert row.consumer is not None
    assert {e.message for e in found} == {""}
    # SQLite's clock has milliseconds.
    tick = timedelta(milliseconds=1)
    assert found[0].at <= found[1].at <= found[2].at + tick
    assert found[2].at <= found[3].at


def test_a_call_that_changes_its_row_is_told_once():
    def body():
        create()
        current_task().label = "changed"

    assert kinds(run_one(body)) == ["scheduled", "claimed", "started", "completed"]


@pytest.mark.parametrize(
    ("error", "options", "kind", "message"),
    [
        (ValueError("broken"), {}, "failed", "ValueError: broken"),
        (Retry(delay=3600), {"max_retries": 1}, "retried", "Retry"),
        (Cancel("no"), {}, "cancelled", "no"),
        (Snooze(delay=3600), {}, "snoozed", ""),
    ],
)
def test_an_end_without_success_is_told_with_its_error(error, options, kind, message):
    row = run_one(raising(error), **options)

    assert kinds(row) == ["scheduled", "claimed", "started", kind]
    assert row.events.get(kind=kind).message.startswith(message)


def test_each_attempt_is_told():
    row = run_one(raising(ValueError("broken")), max_retries=1, retry_delay=0)

    attempt = ["claimed", "started"]
    assert kinds(row) == ["scheduled", *attempt, "retried", *attempt, "failed"]


def test_several_ends_in_one_statement_are_all_told():
    rows = [schedule(raising(ValueError(n))) for n in range(5)]
    rows += [schedule(lambda: None) for _ in range(5)]
    run_burst()

    assert [kinds(row)[-1] for row in rows] == ["failed"] * 5 + ["completed"] * 5


def test_members_of_a_group_are_told(monkeypatch):
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 1.0)
    schedule_warm_up()
    rows = [schedule(create) for _ in range(5)]
    with groups() as found:
        run_burst(group_commit=True)

    assert members(found) == [row.pk for row in rows]
    for row in rows:
        assert kinds(row) == ["scheduled", "claimed", "started", "completed"]


def test_what_is_scheduled_in_bulk_is_told():
    rows = schedule_many([tasks.nothing] * 300)

    assert {tuple(kinds(row)) for row in rows} == {("scheduled",)}


def test_a_person_who_cancels_and_retries_is_told():
    row, keyed = tasks.nothing.schedule(), tasks.nothing.using(unique_key="k").schedule()
    for one in (row, keyed):
        one.cancel()
        one.retry_now()

        assert told(one) == [
            ("scheduled", ""),
            ("cancelled", "cancelled while it waited"),
            ("scheduled", "to run again"),
        ]


def test_a_call_that_replaces_another_is_told():
    replaced = tasks.nothing.using(unique_key="k", on_conflict="replace")
    row = replaced.schedule()
    assert replaced.schedule().pk == row.pk

    assert told(row) == [("scheduled", ""), ("scheduled", "instead of a former call")]


def test_what_is_given_back_is_told_with_the_consumer_that_had_it():
    row = tasks.nothing.schedule()
    held = claim_one(consumer=7)
    take_over(held, consumer=8)

    found = list(row.events.values_list("kind", "consumer"))
    assert found == [("scheduled", None), ("claimed", 7), ("released", 7), ("claimed", 8)]


@task(concurrency=Concurrency(1))
def limited():
    pass


def test_what_a_limit_refuses_is_told():
    rows = [limited.schedule() for _ in range(2)]
    admitted = admission.admit(claim(consumer=7), using="default")

    assert [held.id for held in admitted] == [rows[0].pk]
    assert kinds(rows[0]) == ["scheduled", "claimed"]
    last = rows[1].events.latest("pk")
    assert (last.kind, last.consumer, last.message) == ("released", 7, "it waits for a limit")


def test_a_rescue_is_told_with_the_dead_consumer_and_without_a_start():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    claim_one(consumer=dead.pk)
    leases.bury(dead.pk, using="default")

    assert list(row.events.values_list("kind", "consumer"))[1:] == [
        ("claimed", dead.pk),
        ("rescued", dead.pk),
    ]
    assert row.events.get(kind="rescued").message.startswith("ConsumerLost: ")


def test_what_a_supervisor_ends_is_told():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    held = claim_one(consumer=dead.pk)
    error = TimeLimitExceeded("It ran for more than 1s.")
    verdict = Verdict(task_id=held.id, fence=held.fence, error=error, duration=1.0)
    leases.bury(dead.pk, using="default", verdict=verdict)

    assert kinds(row) == ["scheduled", "claimed", "started", "failed"]


def test_the_events_of_a_workflow_are_those_of_its_tasks():
    wf = Workflow("told")
    first = wf.add(tasks.nothing, name="first")
    wf.add(tasks.nothing, name="second", depends_on=[first])
    wf.add(tasks.nothing, name="sorry", depends_on=[first], when="failure")
    run = wf.schedule()
    run_burst()

    found = list(run.events.values_list("task__step__name", "kind"))
    once = ["scheduled", "claimed", "started", "completed"]
    assert [kind for name, kind in found if name == "second"] == once
    assert [kind for name, kind in found if name == "sorry"] == ["scheduled", "cancelled"]
    # Oldest first: what follows from an end comes behind it.
    assert found.index(("first", "completed")) < found.index(("sorry", "cancelled"))
    assert {event.task_id for event in run.events} == set(run.tasks.values_list("pk", flat=True))


# --- in the same transaction


def test_what_is_rolled_back_is_not_told():
    with pytest.raises(LookupError):
        undone(tasks.nothing.schedule)
    row = tasks.nothing.schedule()
    with pytest.raises(LookupError):
        undone(row.cancel)

    assert list(TaskEvent.objects.values_list("task", "kind")) == [(row.pk, "scheduled")]


def test_a_row_whose_event_cannot_be_written_is_not_scheduled(monkeypatch):
    def refuse(*_):
        raise LookupError

    monkeypatch.setattr(events, "_write", refuse)
    for call in (tasks.nothing, tasks.nothing.using(unique_key="k")):
        with pytest.raises(LookupError):
            call.schedule()

    assert not TaskModel.objects.exists()


def test_a_completion_whose_event_cannot_be_written_is_undone(monkeypatch):
    row = tasks.nothing.schedule()
    held = claim_one()

    def refuse(*_):
        raise LookupError

    monkeypatch.setattr(events, "_write", refuse)
    with pytest.raises(LookupError):
        lifecycle.complete_many([Completion.of(held, 0.1, "")], using="default")

    row.refresh_from_db()
    assert row.status == "running"


def test_who_has_lost_a_lease_tells_nothing():
    row = tasks.nothing.schedule()
    held = claim_one()
    take_over(held)
    before = kinds(row)
    late = Completion.of(held, 0.1, "")

    assert lifecycle.complete_many([late], using="default") == [late]
    with pytest.raises(LeaseLost), transaction.atomic():
        lifecycle.complete(late, using="default")
    assert kinds(row) == before


# --- what they cost


def test_a_batch_is_told_with_one_statement():
    schedule_many([tasks.nothing] * 20)
    with captured_statements() as statements:
        held = claim(limit=20)
        lifecycle.complete_many([Completion.of(c, 0.1, "") for c in held], using="default")

    assert len(held) == 20
    inserts = [sql for sql, _ in statements if TABLE in sql]
    assert len(inserts) == 2
    assert TaskEvent.objects.filter(kind="completed").count() == 20


def test_without_the_setting_nothing_is_sent_and_nothing_is_built(jobs, monkeypatch):
    jobs(KEEP_EVENTS=False)

    def refuse(*_, **__):
        raise AssertionError

    monkeypatch.setattr(events, "TaskEvent", refuse)
    monkeypatch.setattr(events, "_write", refuse)
    with statements_of_a_consumer() as statements:
        rows = [
            *(schedule(body) for body in (create, lambda: None, raising(ValueError()))),
            limited.schedule(),
        ]
        waiting = tasks.nothing.using(unique_key="k", on_conflict="replace", eta=ago(-60))
        waiting.schedule()
        waiting.schedule().cancel()
        wf = Workflow("silent")
        wf.add(tasks.nothing)
        wf.add(raising_step, depends_on=["nothing"])
        run = wf.schedule()
        run_burst()
        run.retry_failed()
        rows[2].refresh_from_db()
        assert rows[2].retry_now()

    assert not [sql for sql in statements if TABLE in sql]


@task
def raising_step():
    raise ValueError


# --- how long they stay


def test_events_go_with_their_task():
    done, failed, other = (schedule(b) for b in (create, raising(ValueError()), create))
    cancelled = tasks.nothing.using(eta=ago(-60)).schedule()
    cancelled.cancel()
    run_burst()
    lifecycle.delete([done.pk], using="default")
    call_command("delete_failed_tasks", verbosity=0)
    TaskModel.objects.filter(pk=cancelled.pk).delete()

    assert set(TaskEvent.objects.values_list("task", flat=True)) == {other.pk}
    assert not failed.events.exists()


def test_events_that_are_older_than_they_are_kept_for_are_swept(jobs, monkeypatch):
    monkeypatch.setattr(events, "SWEEP_BATCH_SIZE", 3)
    jobs(KEEP_EVENTS=timedelta(days=7))
    rows = [tasks.nothing.schedule() for _ in range(10)]
    old = TaskEvent.objects.filter(task__in=[row.pk for row in rows[:7]])
    old.update(at=timezone.now() - timedelta(days=8))

    assert events.sweep(using="default") == 7
    assert events.sweep(using="default") == 0
    left = TaskEvent.objects.values_list("task", flat=True)
    assert list(left) == [row.pk for row in rows[7:]]


def test_a_sweep_is_bounded(jobs, monkeypatch):
    monkeypatch.setattr(events, "SWEEP_BATCH_SIZE", 2)
    monkeypatch.setattr(events, "SWEEP_BATCHES", 3)
    jobs(KEEP_EVENTS=3600)
    schedule_many([tasks.nothing] * 10)
    TaskEvent.objects.update(at=timezone.now() - timedelta(days=1))

    assert events.sweep(using="default") == 6


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_kept_for_ever_or_not_any_more_is_not_swept(jobs, keep):
    tasks.nothing.schedule()
    jobs(KEEP_EVENTS=keep)
    TaskEvent.objects.update(at=timezone.now() - timedelta(days=10_000))

    assert events.sweep(using="default") == 0
    assert TaskEvent.objects.count() == 1


def test_a_consumer_sweeps(jobs):
    jobs(KEEP_EVENTS=3600, LEASE_SECONDS=0.1)
    row = tasks.nothing.using(eta=ago(-3600)).schedule()
    TaskEvent.objects.update(at=timezone.now() - timedelta(days=1))
    with consuming():

        def is_swept():
            assert not row.events.exists()

        eventually(is_swept)


def test_scheduling_from_a_coroutine_is_told():
    row = async_to_sync(tasks.anothing.schedule)()

    assert kinds(row) == ["scheduled"]
