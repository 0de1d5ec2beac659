"""Consumers: their leases, the rescue of those that are gone, and how they stop."""

import datetime
import threading
import time
from unittest import mock

import pytest
from django.db import connection, transaction
from django.utils import timezone

from firefly_jobs import Consumer, admission, current_task, leases, tallies
from firefly_jobs.heartbeat import Heartbeat
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    ago,
    claim,
    claim_one,
    consuming,
    dead_consumer,
    deadlock,
    effects,
    outcomes,
    outside,
    plant,
    prepare_deadlock,
    query,
    run_burst,
    schedule,
    second_connection,
)
from tests.conftest import VENDOR
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def count(status):
    return TaskModel.objects.filter(status=status).count()


def assert_status(row, status):
    row.refresh_from_db()
    assert row.status == status, (row.status, row.error)


def the_consumer():
    """Return the row of the only consumer; raise if it has not registered yet."""
    return ConsumerModel.objects.get()


# --- registering and renewing


def test_a_running_consumer_has_a_row_that_goes_when_it_stops(jobs):
    jobs(LEASE_SECONDS=20)

    with consuming("one", "two"):
        row = eventually(the_consumer)
        assert (row.queues, row.lease_seconds, row.suspected_at) == ("one,two", 20, None)

    assert not ConsumerModel.objects.exists()


def test_a_consumer_that_stops_leaves_no_row_running():
    started, may_end = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert may_end.wait(20)

    row = schedule(slow)
    with consuming() as consumer:
        assert started.wait(20)
        others = [tasks.nothing.schedule() for _ in range(3)]
        consumer.stop()
        may_end.set()

    assert_status(row, "completed")
    for other in others:
        other.refresh_from_db()
        # Given back, unless it was claimed and called before the stop was heard.
        assert other.status in {"created", "completed"}
    assert not ConsumerModel.objects.exists()


def test_the_heartbeat_renews_the_lease_while_a_task_runs(jobs):
    jobs(LEASE_SECONDS=0.6)
    first = []

    def slow():
        def renewed():
            row = ConsumerModel.objects.get()
            first.append(row.renewed_at)
            assert (row.renewed_at - first[0]).total_seconds() > 1.2
            assert row.suspected_at is None

        outside(lambda: eventually(renewed))

    row = schedule(slow)
    run_burst()

    assert_status(row, "completed")
    assert (row.fence, row.rescues) == (1, 0)


# --- two looks


def test_the_first_look_only_marks():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    claim_one(consumer=dead.pk)

    (suspect,) = leases.suspects(using="default", besides=0)

    assert suspect.pk == dead.pk
    assert suspect.suspected_at is not None
    assert_status(row, "running")
    assert ConsumerModel.objects.filter(pk=dead.pk).exists()


def test_the_second_look_gives_the_rows_back():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    claim_one(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)

    (settlement,) = leases.rescue(suspect, using="default") or []

    assert settlement.claim.id == row.pk
    assert_status(row, "created")
    assert (row.rescues, row.retry_attempts, row.consumer, row.lost_alone) == (1, 0, None, 0)
    assert outcomes(row) == ["lost"]
    assert not ConsumerModel.objects.filter(pk=dead.pk).exists()


def test_a_consumer_that_renewed_in_time_is_not_suspected():
    ConsumerModel.objects.create(name="alive", queues="default", lease_seconds=30)

    assert leases.suspects(using="default", besides=0) == []


def test_a_consumer_does_not_suspect_itself():
    dead = dead_consumer()

    assert leases.suspects(using="default", besides=dead.pk) == []


def test_each_lease_is_judged_by_its_own_length():
    ConsumerModel.objects.filter(pk=dead_consumer(lease_seconds=7200).pk)
    short = dead_consumer(lease_seconds=60)

    assert [row.pk for row in leases.suspects(using="default", besides=0)] == [short.pk]


def test_a_renewal_clears_the_suspicion_and_stops_the_rescue():
    row = tasks.nothing.schedule()
    late = dead_consumer()
    claim_one(consumer=late.pk)
    (suspect,) = leases.suspects(using="default", besides=0)

    assert leases.renew(late.pk, using="default")

    late.refresh_from_db()
    assert late.suspected_at is None
    assert leases.suspects(using="default", besides=0) == []
    assert leases.rescue(suspect, using="default") is None
    assert_status(row, "running")


def test_a_rescue_takes_only_running_rows_of_that_consumer():
    rows = [tasks.nothing.schedule() for _ in range(3)]
    dead = dead_consumer()
    first, _, _ = claim(consumer=dead.pk)
    TaskModel.objects.filter(pk=rows[1].pk).update(consumer=dead.pk + 1)
    TaskModel.objects.filter(pk=rows[2].pk).update(status="completed")
    (suspect,) = leases.suspects(using="default", besides=0)

    (settlement,) = leases.rescue(suspect, using="default") or []

    assert settlement.claim.id == first.id
    for row, status in zip(rows, ["created", "running", "completed"], strict=True):
        assert_status(row, status)


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_row_that_its_dying_consumer_still_locks_is_left_for_the_next_round():
    locked, free = (tasks.nothing.schedule() for _ in range(2))
    dead = dead_consumer()
    claim(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    table = TaskModel._meta.db_table

    with second_connection() as other:
        other.set_autocommit(False)
        query(other, f"UPDATE {table} SET duration = 1 WHERE id = %s", locked.pk)
        rescued = leases.rescue(suspect, using="default") or []
        assert [item.claim.id for item in rescued] == [free.pk]
        assert ConsumerModel.objects.filter(pk=dead.pk).exists()
        other.rollback()
        other.set_autocommit(True)

    rescued = leases.rescue(suspect, using="default") or []
    assert [item.claim.id for item in rescued] == [locked.pk]
    assert not ConsumerModel.objects.filter(pk=dead.pk).exists()


# --- rescue by others


def test_the_heartbeat_of_another_consumer_rescues_and_its_loop_runs_the_task(jobs):
    jobs(LEASE_SECONDS=1, CONSUMER_NAP_TIME=0.1)
    row = tasks.insert.schedule("rescued", 1)
    dead = dead_consumer()
    claim_one(consumer=dead.pk)

    with consuming():
        eventually(lambda: assert_status(row, "completed"))

    assert (row.fence, row.rescues, row.retry_attempts) == (2, 1, 0)
    assert effects() == [1]
    assert not ConsumerModel.objects.exists()


def test_a_consumer_that_was_rescued_goes_on_under_a_new_id(jobs):
    jobs(LEASE_SECONDS=0.6, CONSUMER_NAP_TIME=0.1)

    with consuming():
        former = eventually(the_consumer).pk
        ConsumerModel.objects.filter(pk=former).delete()
        renewed = eventually(the_consumer)
        assert renewed.pk != former
        row = tasks.insert.schedule("after", 1)
        eventually(lambda: assert_status(row, "completed"))
        assert row.consumer == renewed.pk

    assert not ConsumerModel.objects.exists()


def test_a_rescue_that_is_noticed_late_does_not_cost_the_new_id(jobs):
    jobs(LEASE_SECONDS=0.6, CONSUMER_NAP_TIME=0.1)
    has_told_late = threading.Event()

    with consuming() as consumer:
        former = eventually(the_consumer).pk
        tell = consumer._heartbeat._on_rescued

        def tell_again_late(*args):
            tell(*args)
            eventually(the_consumer)
            tell(*args)
            has_told_late.set()

        consumer._heartbeat._on_rescued = tell_again_late
        ConsumerModel.objects.filter(pk=former).delete()
        assert has_told_late.wait(20)
        renewed = the_consumer()
        row = tasks.insert.schedule("after", 1)
        eventually(lambda: assert_status(row, "completed"))

        assert row.consumer == renewed.pk
        assert the_consumer().pk == renewed.pk


def test_a_consumer_releases_rows_that_carry_its_id_and_that_it_does_not_hold(jobs):
    jobs(LEASE_SECONDS=0.6, CONSUMER_NAP_TIME=0.1)

    with consuming("served"):
        consumer = eventually(the_consumer).pk
        row = tasks.insert.using(queue="unserved").schedule("lost answer", 1)
        (held,) = claim("unserved", consumer=consumer)
        eventually(lambda: assert_status(row, "created"))

    assert (row.fence, row.consumer, row.rescues, row.started) == (held.fence, None, 0, None)
    run_burst("unserved")
    assert_status(row, "completed")
    assert effects() == [1]


def test_a_consumer_does_not_release_what_it_runs(jobs):
    jobs(LEASE_SECONDS=0.3, CONSUMER_NAP_TIME=0.1)

    def slow():
        def renewed_often():
            renewed = ConsumerModel.objects.get().renewed_at
            assert (renewed - started).total_seconds() > 1.5

        started = outside(the_consumer).renewed_at
        outside(lambda: eventually(renewed_often))

    row = schedule(slow)
    run_burst()

    assert_status(row, "completed")
    assert row.fence == 1


# --- tasks that end their process


def lose(row):
    """Let a consumer die that holds ``row`` and nothing else."""
    TaskModel.objects.filter(pk=row.pk).update(not_before=ago(1))
    dead = dead_consumer()
    claim_one(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    leases.rescue(suspect, using="default")
    row.refresh_from_db()


def test_a_task_fails_with_consumer_lost_after_max_rescues_losses_while_alone(jobs):
    jobs(MAX_RESCUES=3)
    row = tasks.nothing.schedule()

    lose(row)
    lose(row)
    assert (row.status, row.rescues, row.lost_alone) == ("created", 2, 0)
    for times in (1, 2):
        lose(row)
        assert (row.status, row.lost_alone) == ("created", times)
    for _ in range(2):
        if row.status == "created":
            lose(row)

    assert row.status == "failed"
    assert "ConsumerLost" in row.error
    assert outcomes(row)[-1] == "failed"
    assert set(outcomes(row)[:-1]) == {"lost"}


def test_neighbours_of_a_task_that_ends_its_process_are_not_blamed():
    rows = [tasks.nothing.schedule() for _ in range(2)]
    for _ in range(6):
        dead = dead_consumer()
        assert len(claim(consumer=dead.pk)) == 2
        (suspect,) = leases.suspects(using="default", besides=0)
        leases.rescue(suspect, using="default")

    for row in rows:
        assert_status(row, "created")
        assert (row.rescues, row.lost_alone) == (6, 0)


def test_a_task_that_was_lost_twice_runs_alone():
    running = []

    def alone():
        running.append(outside(lambda: count("running")))

    for _ in range(30):
        tasks.nothing.schedule()
    row = schedule(alone)
    TaskModel.objects.filter(pk=row.pk).update(rescues=2)
    for _ in range(30):
        tasks.nothing.schedule()

    run_burst()

    assert running == [1]
    assert count("completed") == 61


def test_a_coroutine_that_was_lost_twice_runs_alone():
    running = []

    async def alone():
        from asgiref.sync import sync_to_async

        running.append(await sync_to_async(look, thread_sensitive=False)())

    def look():
        return outside(lambda: count("running"))

    for _ in range(30):
        schedule(anothing)
    row = schedule(alone)
    TaskModel.objects.filter(pk=row.pk).update(rescues=2)
    for _ in range(30):
        schedule(anothing)

    run_burst()

    assert running == [1]
    assert count("completed") == 61


async def anothing():
    pass


# --- how it stops


def test_a_burst_ends_with_code_0_when_nothing_is_due():
    later = tasks.nothing.schedule(eta=ago(-3600))
    due = tasks.nothing.schedule()

    assert run_burst() == 0

    assert_status(due, "completed")
    assert_status(later, "created")


def test_a_burst_runs_what_a_call_scheduled_while_the_consumer_looked(jobs):
    # It has to look while the call runs, although nothing wakes it.
    jobs(CONSUMER_NAP_TIME=0.1)
    has_run, in_body, may_end = threading.Event(), threading.Event(), threading.Event()

    def body():
        in_body.set()
        assert may_end.wait(20)
        schedule(has_run.set)

    schedule(body)
    consumer = Consumer(burst=True)
    look = consumer._claimer.claim

    def look_before_the_call_ends(*args, **options):
        found = look(*args, **options)
        if in_body.is_set() and not may_end.is_set():
            may_end.set()

            def has_ended():
                assert consumer._holdings.is_empty

            eventually(has_ended)
        return found

    with mock.patch.object(consumer._claimer, "claim", look_before_the_call_ends):
        assert consumer.run() == 0

    assert has_run.is_set()


def test_a_burst_of_nothing_ends_with_code_0():
    assert run_burst() == 0


@pytest.mark.parametrize("number", [1, 7])
def test_a_consumer_ends_after_max_tasks(number):
    plant(20)

    assert run_burst(max_tasks=number) == 0

    assert count("completed") == number
    assert count("created") == 20 - number


def test_max_tasks_counts_failures_too():
    for _ in range(5):
        schedule(fail)

    run_burst(max_tasks=3)

    assert (count("failed"), count("created")) == (3, 2)


def fail():
    raise ValueError("no")


def test_a_consumer_stops_at_the_first_failure_if_it_must_not_fail_silently(jobs):
    jobs(FAIL_SILENTLY=False)
    before = tasks.nothing.schedule()
    failing = schedule(fail)
    plant(50)

    assert run_burst() == 1

    assert_status(before, "completed")
    assert_status(failing, "failed")
    assert count("running") == 0
    assert count("created") > 0


def test_a_retry_is_a_failure_that_stops_a_consumer_too(jobs):
    jobs(FAIL_SILENTLY=False)
    failing = schedule(fail, max_retries=3, retry_delay=600)

    assert run_burst() == 1

    assert_status(failing, "created")
    assert failing.retry_attempts == 1


def test_a_consumer_goes_on_after_a_failure_by_default():
    schedule(fail)
    plant(5)

    assert run_burst() == 0

    assert (count("failed"), count("completed")) == (1, 5)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_outlasts_the_shutdown_timeout_is_released_without_spending_anything(is_async):
    started = threading.Event()

    def endless():
        Effect.objects.create(task_key="undone", value=1)
        started.set()
        while True:
            waiting.wait(0.01)

    async def aendless():
        import asyncio

        await Effect.objects.acreate(task_key="undone", value=1)
        started.set()
        await asyncio.Event().wait()

    waiting = threading.Event()
    row = schedule(aendless if is_async else endless)
    with consuming(shutdown_timeout=0.1) as consumer:
        assert started.wait(20)
        consumer.stop()

    assert_status(row, "created")
    assert (row.retry_attempts, row.rescues, row.fence) == (0, 0, 1)
    assert outcomes(row) == ["released"]
    assert effects() == []
    assert not ConsumerModel.objects.exists()


def test_a_running_call_may_finish_within_the_shutdown_timeout():
    started, may_end = threading.Event(), threading.Event()

    def slow():
        Effect.objects.create(task_key="done", value=1)
        started.set()
        assert may_end.wait(20)

    row = schedule(slow)
    with consuming(shutdown_timeout=20) as consumer:
        assert started.wait(20)
        consumer.stop()
        may_end.set()

    assert_status(row, "completed")
    assert effects() == [1]


def test_what_waits_behind_a_slow_task_is_released_and_run_by_another_consumer():
    started, may_end = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert may_end.wait(30)

    def is_all_that_runs():
        assert count("running") == 1

    plant(300)
    # So much that it is surely claimed together with the slow one.
    row = schedule(slow)
    plant(300)
    with consuming():
        try:
            assert started.wait(20)
            # Within a second; a loaded machine gets some more.
            eventually(is_all_that_runs, timeout_seconds=5.0)
            with consuming():
                eventually(lambda: assert_completed(600))
            assert_status(row, "running")
        finally:
            may_end.set()
        eventually(lambda: assert_status(row, "completed"))

    assert row.fence == 1
    assert TaskModel.objects.filter(fence=2).exists()


def assert_completed(number):
    assert count("completed") == number, list(
        TaskModel.objects.exclude(status="completed").values_list(
            "id", "func_name", "status", "fence", "consumer", "error"
        )[:10]
    )


def test_two_consumers_share_a_queue_and_run_no_task_twice():
    def body():
        Effect.objects.create(task_key="shared", value=current_task().id)

    rows = [schedule(body) for _ in range(150)]
    with consuming(), consuming():
        eventually(lambda: assert_completed(150), timeout_seconds=40)

    assert sorted(effects()) == [row.pk for row in rows]
    assert not TaskAttempt.objects.exists()


# --- clocks and zones


@pytest.mark.parametrize("days", [-2, 2])
def test_rows_are_judged_by_the_databases_clock_although_that_of_the_process_is_wrong(days):
    due = tasks.nothing.schedule(eta=ago(1))
    later = tasks.nothing.schedule(eta=ago(-3600))
    retried = schedule(fail, max_retries=1, retry_delay=300)
    healthy = ConsumerModel.objects.create(name="healthy", queues="default", lease_seconds=600)
    wrong = datetime.timedelta(days=days)
    # What the process believes is wrong, wherever it may ask.
    now, seconds = timezone.now, time.time  # noqa: TID251

    with (
        mock.patch.object(timezone, "now", side_effect=lambda: now() + wrong),
        mock.patch.object(time, "time", side_effect=lambda: seconds() + wrong.total_seconds()),
    ):
        fresh = tasks.nothing.schedule()
        run_burst()
        suspects = leases.suspects(using="default", besides=0)

    assert_status(due, "completed")
    assert_status(fresh, "completed")
    assert_status(later, "created")
    assert_status(retried, "created")
    assert retried.attempts.count() == 1
    for moment in (due.completed, due.started, fresh.created, retried.attempts.get().ended):
        assert moment is not None
        assert abs(moment - now()) < datetime.timedelta(minutes=1)
    assert retried.not_before is not None
    assert abs(retried.not_before - now()) < datetime.timedelta(seconds=330)
    assert suspects == []
    assert ConsumerModel.objects.get().pk == healthy.pk


@pytest.mark.postgresql
@pytest.mark.mysql
def test_sessions_of_the_test_database_speak_a_zone_other_than_utc():
    if VENDOR == "postgresql":
        import psycopg

        parameters = connection.get_connection_params()
        with psycopg.connect(
            dbname=parameters["dbname"],
            user=parameters["user"],
            host=parameters["host"],
            port=parameters["port"],
        ) as session:
            ((zone,),) = session.execute("SHOW timezone").fetchall()
    else:
        ((zone,),) = query(connection, "SELECT @@session.time_zone")

    assert zone in {"America/New_York", "-05:00"}


def test_moments_are_right_whatever_zone_the_server_speaks():
    due = tasks.nothing.schedule(eta=ago(60))
    later = tasks.nothing.schedule(eta=ago(-60))
    run_burst()

    assert_status(due, "completed")
    assert_status(later, "created")
    assert due.started is not None
    assert due.completed is not None
    for moment in (due.created, due.started, due.completed, later.created):
        assert abs(moment - timezone.now()) < datetime.timedelta(minutes=1)
    assert due.created <= due.started <= due.completed
    assert due.run_at == due.not_before
    assert later.run_at == later.not_before


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_consumer_whose_executor_breaks_stops_with_an_error(monkeypatch, kind):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a mistake of ours")

    async def acall():
        raise ValueError("failed")

    def call():
        raise ValueError("failed")

    monkeypatch.setattr("firefly_jobs.executors.calls.failed_outcome", broken)
    schedule(call if kind == "sync" else acall)

    assert Consumer(shutdown_timeout=0.1).run() == 1


@pytest.mark.server
def test_a_sweep_that_meets_a_lock_keeps_no_other_from_looking(monkeypatch):
    mine, theirs = prepare_deadlock()
    swept = []

    def meet_others(after, *, using):
        with transaction.atomic():
            deadlock(mine, theirs)

    monkeypatch.setattr(admission, "sweep", meet_others)
    monkeypatch.setattr(tallies, "sweep", lambda *, using: swept.append(using))
    beating = Heartbeat(using="default", lease_seconds=0.5, on_rescued=swept.append)
    beating._next_sweep_at = 0.0

    for _ in range(4):
        beating._sweep()

    assert swept == ["default"]
