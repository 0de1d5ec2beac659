"""Unique keys: at most one task with a key waits or runs, and nobody's transaction pays."""

import threading
from datetime import timedelta
from queue import SimpleQueue
from unittest import mock

import pytest
from django.db import OperationalError, connection, transaction
from django.utils import timezone

from firefly_jobs import (
    Cancel,
    TaskAlreadyScheduled,
    enqueue,
    leases,
    lifecycle,
    schedule_many,
    task,
    unique,
)
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    assert_waits_for_lock,
    captured_statements,
    claim_one,
    outside,
    query,
    run_burst,
    schedule,
    session_id,
)
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

CALLS: list[tuple[int, int]] = []


def key_of(user_id, depth):
    CALLS.append((user_id, depth))
    return f"user-{user_id}-{depth}"


@task(unique_key=key_of)
def sync(user_id, *, depth=1):
    return user_id


keyed = tasks.insert.using(unique_key="k")
raising = keyed.using(on_conflict="raise")
replacing = keyed.using(on_conflict="replace")


def count(**where):
    return TaskModel.objects.filter(**where).count()


# --- one at a time


def test_a_second_call_returns_the_row_of_the_first():
    first = keyed.schedule("a")
    second = keyed.schedule("b")

    assert second.pk == first.pk
    assert second.params["args"] == ("a",)
    assert count() == 1


def test_a_key_from_the_arguments_is_worked_out_once_with_defaults():
    CALLS.clear()

    one, same = sync.schedule(1), sync.schedule(user_id=1, depth=1)
    other = sync.schedule(1, depth=2)

    assert CALLS == [(1, 1), (1, 1), (1, 2)]
    assert one.pk == same.pk != other.pk
    assert (one.unique_key, other.unique_key) == ("user-1-1", "user-1-2")


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (lambda key: 5, TypeError, "unique_key must be text or a callable that returns text"),
        (lambda key: "x" * 256, ValueError, "unique_key must have 1 to 255 characters, got 256"),
        (lambda other: "x", TypeError, "missing 1 required positional argument"),
    ],
)
def test_a_key_that_is_none_is_refused_and_nothing_is_written(key, error, message):
    with pytest.raises(error, match=message):
        tasks.insert.using(unique_key=key).schedule("a")

    assert count() == 0


def test_a_key_that_raises_is_told_to_be_what_raised_and_nothing_is_written():
    jobs = [tasks.nothing.job, tasks.insert.job.with_args("a").with_unique_key(lambda key: key[5])]

    for schedules in (jobs[1].schedule, lambda: schedule_many(jobs)):
        with pytest.raises(IndexError) as caught:
            schedules()
        assert caught.value.__notes__ == [
            f"Raised by unique_key, so the call of {tasks.insert.name!r} was not scheduled."
        ]

    assert count() == 0


def test_a_callable_may_say_that_a_call_has_no_key():
    free = tasks.insert.using(unique_key=lambda key: None)

    assert free.schedule("a").pk != free.schedule("a").pk


def test_keys_differ_in_case_and_accents():
    keys = ["Key", "key", "kéy", "k\u0065\u0301y"]

    rows = [tasks.nothing.using(unique_key=key).schedule() for key in keys]

    assert len({row.pk for row in rows}) == 4
    for key, row in zip(keys, rows, strict=True):
        assert tasks.nothing.using(unique_key=key).schedule().pk == row.pk


def test_raise_names_the_row_and_leaves_the_transaction_alone():
    first = keyed.schedule("a")

    with transaction.atomic():
        with pytest.raises(TaskAlreadyScheduled, match=rf"Task {first.pk} .* is created") as caught:
            raising.schedule("b")
        Effect.objects.create(task_key="after", value=1)

    assert caught.value.existing.pk == first.pk
    assert Effect.objects.count() == 1


# --- when the key is free again


@pytest.mark.parametrize(
    "end",
    ["complete", "touch", "group", "fail", "cancel inside", "cancel", "expire", "rescue"],
)
def test_the_key_is_free_once_the_task_has_ended(end, jobs):
    jobs(MAX_RESCUES=0)
    bodies = {
        "complete": lambda: None,
        "touch": lambda: Effect.objects.create(task_key="x", value=1),
        "group": lambda: Effect.objects.create(task_key="x", value=1),
        "fail": lambda: 1 / 0,
        "cancel inside": lambda: (_ for _ in ()).throw(Cancel("no")),
    }
    row = schedule(bodies.get(end, lambda: None), unique_key="k")
    if end == "cancel":
        assert row.cancel()
    elif end == "rescue":
        TaskModel.objects.filter(pk=row.pk).update(rescues=2, lost_alone=1)
        claim_one(consumer=1)
        leases.bury(1, using="default")
    else:
        if end == "expire":
            TaskModel.objects.update(expires_at=timezone.now() - timedelta(minutes=1))
        run_burst(group_commit=end == "group")
    row.refresh_from_db()

    assert row.Status(row.status).is_terminal
    assert (row.unique_key, row.active_key) == ("k", None)
    assert keyed.schedule("next").pk != row.pk


def test_a_task_that_runs_or_waits_for_a_retry_has_its_key():
    def body():
        running = keyed.schedule("second")
        if Effect.objects.exists():
            return running.pk
        raise LookupError

    row = schedule(body, unique_key="k", max_retries=1, retry_delay=0)
    held = claim_one()
    assert keyed.schedule("x").pk == row.pk
    lifecycle.release([held], using="default")
    Effect.objects.create(task_key="x", value=1)

    run_burst()
    row.refresh_from_db()

    assert (row.status, row.returned) == ("completed", row.pk)


def test_a_row_that_a_consumer_without_keys_has_settled_does_not_keep_its_key():
    row = keyed.schedule("a")
    TaskModel.objects.filter(pk=row.pk).update(status="completed")

    assert keyed.schedule("b").pk != row.pk


def test_reviving_a_row_whose_key_is_taken_passes_it_over(caplog):
    old, other = keyed.schedule("a"), tasks.nothing.schedule()
    lifecycle.cancel([old.pk, other.pk], using="default")
    new = keyed.schedule("b")

    assert lifecycle.retry([old.pk, other.pk], using="default") == 1

    old.refresh_from_db()
    assert (old.status, old.active_key) == ("cancelled", None)
    assert f"Task {old.pk} stays as it is: another task has its unique key" in caplog.text
    assert not old.retry_now()
    new.cancel()
    assert old.retry_now()
    assert keyed.schedule("c").pk == old.pk


# --- replace


def test_replace_puts_the_latest_call_in_place_of_the_one_that_waits():
    eta = timezone.now() + timedelta(minutes=5)
    first = replacing.schedule("a")

    second = replacing.using(priority=9, tags=["x"]).schedule("b", eta=eta)
    third = replacing.schedule("c")

    assert first.pk == second.pk == third.pk
    assert (second.params["args"], second.not_before, second.priority) == (("b",), eta, 9)
    assert (third.params["args"], third.not_before, third.tags) == (("c",), None, [])
    run_burst()
    assert list(Effect.objects.values_list("task_key", flat=True)) == ["c"]


def test_replace_gives_a_waiting_retry_a_new_start():
    row = replacing.schedule("a")
    TaskModel.objects.update(retry_attempts=3, error="before", func_name="other")

    replaced = replacing.using(expires=60).schedule("b")

    assert replaced.pk == row.pk
    assert (replaced.retry_attempts, replaced.error) == (0, "")
    assert replaced.func_name == tasks.insert.name
    assert replaced.expires_at is not None


def test_replace_of_a_task_that_runs_is_refused():
    first = replacing.schedule("a")
    claim_one()

    with transaction.atomic():
        with pytest.raises(TaskAlreadyScheduled, match="is running, so its arguments cannot be"):
            replacing.schedule("b")
        Effect.objects.create(task_key="after", value=1)

    first.refresh_from_db()
    assert (first.params["args"], first.status) == (("a",), "running")
    assert Effect.objects.count() == 1


# --- races


@pytest.mark.parametrize("options", [{}, {"on_conflict": "replace"}])
def test_many_who_schedule_the_same_key_leave_one_row(options):
    barrier = threading.Barrier(50)

    def run(n):
        barrier.wait(30)
        return keyed.using(**options).schedule(f"key-{n}").pk

    others = [Concurrent(run, n) for n in range(50)]
    ids = {other.result(timeout_seconds=60) for other in others}

    assert len(ids) == count() == 1


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("commits", [True, False])
def test_a_key_that_somebody_is_about_to_take_is_waited_for(commits):
    has_written, may_end = threading.Event(), threading.Event()

    def first():
        with transaction.atomic():
            pk = keyed.schedule("first").pk
            has_written.set()
            assert may_end.wait(20)
            transaction.set_rollback(not commits)
            return pk

    ahead = Concurrent(first)
    assert has_written.wait(20)
    others = [Concurrent(lambda: keyed.schedule("other").pk) for _ in range(50)]
    threading.Event().wait(0.2)  # they wait for a lock, or come later: both must be right
    may_end.set()
    pk = ahead.result()

    ids = {other.result(timeout_seconds=30) for other in others}
    assert len(ids) == count() == 1
    assert (ids == {pk}) == commits


def test_a_conflict_inside_a_transaction_costs_the_transaction_nothing():
    first = keyed.schedule("a")

    with transaction.atomic():
        Effect.objects.create(task_key="before", value=1)
        assert keyed.schedule("b").pk == first.pk
        with transaction.atomic():
            assert schedule_many([keyed.job.with_args("c")])[0].pk == first.pk
        Effect.objects.create(task_key="after", value=1)

    assert Effect.objects.count() == 2


@pytest.mark.mysql
@pytest.mark.parametrize("options", [{}, {"on_conflict": "replace"}])
def test_a_row_that_the_snapshot_does_not_show_is_found(options):
    query(connection, "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    try:
        with transaction.atomic():
            assert count() == 0
            pk = outside(lambda: keyed.schedule("outside").pk)
            assert count() == 0

            found = keyed.using(**options).schedule("inside")

            assert found.pk == pk
            Effect.objects.create(task_key="after", value=1)
    finally:
        connection.close()
    assert (count(), Effect.objects.count()) == (1, 1)


@pytest.mark.mysql
def test_a_row_that_has_ended_since_the_snapshot_was_taken_has_no_key():
    query(connection, "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    old = keyed.schedule("old")
    try:
        with transaction.atomic():
            assert count(active_key="k") == 1
            outside(old.cancel)

            new = keyed.schedule("new")

            assert new.pk != old.pk
    finally:
        connection.close()
    assert count() == 2


def test_a_holder_that_ends_between_the_conflict_and_the_look_makes_room():
    old = keyed.schedule("old")
    conflict = unique._conflict

    def late(row, on):
        lifecycle.cancel([old.pk], using="default")
        return conflict(row, on)

    with mock.patch.object(unique, "_conflict", late):
        new = keyed.schedule("new")

    assert new.pk != old.pk
    assert new.params["args"] == ("new",)


def test_a_key_that_never_rests_is_given_up():
    keyed.schedule("old")

    with (
        mock.patch.object(unique, "_conflict", return_value=None),
        pytest.raises(TaskAlreadyScheduled, match="changed hands 20 times"),
    ):
        keyed.schedule("new")


@pytest.mark.mysql
def test_the_failed_insert_alone_keeps_the_key_locked_so_reading_its_holder_costs_nothing_more():
    first = keyed.schedule("a")
    lock = "SELECT id FROM firefly_jobs_taskmodel WHERE active_key = 'k' FOR UPDATE NOWAIT"

    with transaction.atomic():
        assert enqueue._write_unless_taken(connection, [keyed.row(("b",), {})]) == [False]
        with pytest.raises(OperationalError):
            outside(lambda: query(connection, lock))

    assert query(connection, lock) == [(first.pk,)]


# --- many at once


def test_a_bulk_has_one_row_per_key_in_the_order_of_the_jobs():
    there = tasks.insert.using(unique_key="k5").schedule("there")
    jobs = [
        tasks.insert.job.with_args(f"{n}").with_unique_key(f"k{n % 7}" if n % 2 else None)
        for n in range(40)
    ]

    rows = schedule_many(jobs)

    for n, row in enumerate(rows):
        assert row.unique_key == (f"k{n % 7}" if n % 2 else None)
        assert (row.pk == there.pk) == (row.unique_key == "k5")
    assert count(active_key__isnull=False) == 7
    assert count() == 20 + 7
    assert all(row.params["args"] == (f"{n}",) for n, row in enumerate(rows) if not n % 2)


def test_a_bulk_replaces_with_its_last_and_raises_with_none():
    replaced = schedule_many(replacing.job.with_args(f"{n}") for n in range(5))
    assert {row.pk for row in replaced} == {replaced[0].pk}
    assert TaskModel.objects.get().params["args"] == ("4",)

    with pytest.raises(TaskAlreadyScheduled):
        schedule_many([tasks.nothing, raising.job.with_args("x")])
    assert count() == 1


@pytest.mark.server
def test_bulks_with_the_same_keys_do_not_meet_in_a_deadlock():
    names = [f"k{n}" for n in range(1_500)]
    barrier = threading.Barrier(4)

    def run(keys):
        barrier.wait(30)
        jobs = (tasks.nothing.job.with_unique_key(key) for key in keys)
        return [row.pk for row in schedule_many(jobs)]

    orders = [names, names[::-1], names[700:] + names[:700], names[::2] + names[1::2]]
    others = [Concurrent(run, keys) for keys in orders]
    ids = [other.result(timeout_seconds=90) for other in others]
    found = [dict(zip(*pair, strict=True)) for pair in zip(orders, ids, strict=True)]

    assert count() == 1_500
    assert all(one == found[0] for one in found)


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_bulk_takes_its_keys_in_their_own_order_and_not_in_that_of_its_jobs():
    sessions: SimpleQueue[int] = SimpleQueue()

    def bulk():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        return [
            row.pk for row in schedule_many(tasks.nothing.job.with_unique_key(key) for key in "cba")
        ]

    with transaction.atomic():
        middle = tasks.nothing.using(unique_key="b").schedule()
        other = Concurrent(bulk)
        session = sessions.get(timeout=20)
        eventually(lambda: assert_waits_for_lock(session))
        # The bulk waits for "b", and has not come to "c", although that is its first job's.
        last = tasks.nothing.using(unique_key="c").schedule()

    assert other.result(timeout_seconds=30)[:2] == [last.pk, middle.pk]
    assert count() == 3


def test_keys_of_a_bulk_take_few_statements():
    with captured_statements() as statements:
        schedule_many(tasks.nothing.job.with_unique_key(f"k{n}") for n in range(1_000))

    assert len([sql for sql, _ in statements if "INSERT" in sql]) == 1
