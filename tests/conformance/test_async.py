"""Coroutine tasks: thousands wait in one process, each with its transaction once it queries."""

import asyncio
import logging
import sys
import threading

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction
from django.db.backends.signals import connection_created

from firefly_jobs import current_task
from firefly_jobs.exceptions import LaneTimeoutError
from firefly_jobs.executors.coroutines import CoroutineLoop
from firefly_jobs.models import TaskAttempt, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    Gate,
    Watch,
    consuming,
    effects,
    outcomes,
    outside,
    run_burst,
    run_one,
    run_until_ended,
    schedule,
    status_seen_outside,
    undone,
)
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


async def acreate(value=1):
    return await Effect.objects.acreate(task_key="async", value=value)


def create(value=1):
    return Effect.objects.create(task_key="async", value=value)


class AllHere:
    """A gate that opens when so many coroutines have come to it."""

    def __init__(self, count):
        self._missing = count
        self._gate = Gate()
        self.on_open = lambda: None

    async def wait(self):
        self._missing -= 1
        if self._missing == 0:
            self.on_open()
            self._gate.open()
        await self._gate.wait()


# --- lanes


def test_200_sleeping_coroutines_use_no_connection(jobs):
    jobs(ASYNC_SLOTS=300)
    opened = []
    all_here = AllHere(200)

    async def body():
        await all_here.wait()

    def note(sender, connection, **kwargs):
        opened.append(connection)

    seen = []
    all_here.on_open = lambda: seen.append(len(opened))
    rows = [schedule(body) for _ in range(200)]
    connection.close()
    connection_created.connect(note)
    try:
        run_burst()
    finally:
        connection_created.disconnect(note)

    # The dispatcher's, perhaps that of the heartbeat, and of a look at the schedules.
    assert seen[0] <= 3
    assert TaskModel.objects.filter(status="completed").count() == len(rows)


def test_more_coroutines_than_lanes_that_query_all_finish(jobs):
    jobs(ASYNC_CONNECTIONS=3)

    async def body(number):
        await acreate(number)
        await asyncio.sleep(0)
        await Effect.objects.acount()

    rows = [schedule(body, number) for number in range(40)]
    run_burst()

    assert sorted(effects()) == list(range(40))
    assert {TaskModel.objects.get(pk=row.pk).status for row in rows} == {"completed"}


def test_a_coroutine_keeps_one_connection_from_its_first_query_on():
    seen = []

    @sync_to_async
    def which():
        Effect.objects.count()
        return id(connection.connection), connection.in_atomic_block

    async def body():
        seen.append([await which() for _ in range(3)])

    for _ in range(5):
        schedule(body)
    run_burst()

    assert len(seen) == 5
    for answers in seen:
        assert len(set(answers)) == 1
        assert answers[0][1] is True


def test_without_atomic_a_connection_is_borrowed_for_each_call(jobs):
    jobs(ASYNC_CONNECTIONS=1, LANE_TIMEOUT=5)
    both, again = AllHere(2), AllHere(2)

    async def body(number):
        await acreate(number)
        await both.wait()
        await acreate(number + 10)
        await again.wait()

    rows = [schedule(body, number, atomic=False) for number in range(2)]
    run_burst()

    for row in rows:
        row.refresh_from_db()
        assert (row.status, outcomes(row)) == ("completed", []), row.error
    assert sorted(effects()) == [0, 1, 10, 11]


def test_without_atomic_effects_stay_when_the_coroutine_fails():
    async def body():
        await acreate(1)
        raise ValueError("no")

    assert run_one(body, atomic=False).status == "failed"
    assert effects() == [1]


def test_waiting_too_long_for_a_lane_ends_the_attempt_as_lost_naming_the_holders(jobs):
    jobs(ASYNC_CONNECTIONS=1, LANE_TIMEOUT=0.3)
    begun, held, timed_out = Gate(), Gate(), Gate()

    async def hold():
        # Not before both are claimed: on SQLite nobody can be while it has queried.
        await begun.wait()
        await Effect.objects.acount()
        held.open()
        await timed_out.wait()

    async def wait():
        begun.open()
        await held.wait()
        try:
            await acreate()
        except LaneTimeoutError:
            timed_out.open()
            raise

    holder, waiter = schedule(hold), schedule(wait)
    run_until_ended(holder, waiter)

    assert (holder.status, outcomes(holder)) == ("completed", [])
    assert waiter.status == "completed"
    assert outcomes(waiter) == ["lost"]
    assert (waiter.rescues, waiter.retry_attempts) == (1, 0)
    assert f"task {holder.pk} " in TaskAttempt.objects.get().error
    assert effects() == [1]


def test_a_swallowed_lane_timeout_is_no_success(jobs):
    jobs(ASYNC_CONNECTIONS=1, LANE_TIMEOUT=0.3)
    begun, held, timed_out = Gate(), Gate(), Gate()

    async def hold():
        # Not before both are claimed: on SQLite nobody can be while it has queried.
        await begun.wait()
        await Effect.objects.acount()
        held.open()
        await timed_out.wait()

    async def wait():
        begun.open()
        await held.wait()
        try:
            await acreate()
        except LaneTimeoutError:
            timed_out.open()

    holder, waiter = schedule(hold), schedule(wait)
    run_until_ended(holder, waiter)

    assert outcomes(waiter) == ["lost"]
    assert effects() == [1]


# --- the transaction


def test_the_block_is_visible_inside_sync_to_async_before_the_first_query():
    async def body():
        return await sync_to_async(lambda: connection.in_atomic_block)()

    assert run_one(body).returned is True


def test_atomic_inside_sync_to_async_is_a_savepoint_of_the_tasks_transaction():
    @sync_to_async
    def nested():
        create(1)
        with transaction.atomic():
            create(2)
        with pytest.raises(LookupError):
            undone(lambda: create(3))

    async def body(fails):
        await nested()
        await acreate(4)
        if fails:
            raise ValueError("no")

    schedule(body, True)
    schedule(body, False)
    run_burst()

    assert effects() == [1, 2, 4]


def test_a_coroutine_that_fails_after_acreate_leaves_nothing():
    async def body():
        await acreate()
        await asyncio.sleep(0)
        raise ValueError("no")

    row = run_one(body)

    assert (row.status, outcomes(row)) == ("failed", ["failed"])
    assert effects() == []


def test_effects_of_coroutines_are_never_seen_without_their_completion():
    async def body():
        await acreate(current_task().id)
        await asyncio.sleep(0)
        await acreate(current_task().id)

    rows = [schedule(body) for _ in range(60)]
    with Watch(expected=2) as watch:
        run_burst()

    assert watch.violations == []
    assert Effect.objects.count() == 2 * len(rows)


def test_select_for_update_and_on_commit_work_in_a_coroutine():
    create(1)
    seen = []

    @sync_to_async
    def lock(row):
        Effect.objects.select_for_update().update(value=2)
        transaction.on_commit(
            lambda: seen.append((status_seen_outside(row), connection.in_atomic_block))
        )

    async def body():
        await lock(TaskModel(pk=current_task().id))
        assert seen == []

    assert run_one(body).status == "completed"
    assert seen == [("completed", False)]
    assert effects() == [2]


def test_on_commit_of_a_failed_coroutine_does_not_run():
    seen = []

    async def body():
        await sync_to_async(transaction.on_commit)(lambda: seen.append("callback"))
        raise ValueError("no")

    assert run_one(body).status == "failed"
    assert seen == []


def test_set_rollback_fails_a_coroutine():
    async def body():
        await acreate()
        await sync_to_async(transaction.set_rollback)(True)

    assert run_one(body).status == "failed"
    assert effects() == []


def test_a_coroutine_that_wrote_to_another_alias_is_settled_before_the_next_uses_its_lane(jobs):
    jobs(ASYNC_CONNECTIONS=1)
    seen = []

    async def write():
        await Effect.objects.using("other").acreate(task_key="elsewhere", value=1)

    @sync_to_async
    def see(row):
        seen.append(status_seen_outside(row))

    async def look(previous):
        await see(TaskModel(pk=previous))

    row = schedule(write)
    run_burst(max_tasks=1)
    assert status_seen_outside(row) == "completed"
    assert Effect.objects.using("other").count() == 1

    schedule(look, row.pk)
    run_burst()
    assert seen == ["completed"]


def test_concurrent_coroutines_do_not_share_a_transaction():
    both = AllHere(2)

    async def body(fails):
        await Effect.objects.acount() if not connection_is_sqlite() else None
        await both.wait()
        await acreate(int(fails))
        if fails:
            raise ValueError("no")

    schedule(body, True)
    schedule(body, False)
    run_burst()

    assert effects() == [0]


def connection_is_sqlite():
    # One writer at a time: a second coroutine that queries waits for the first to end.
    return connection.vendor == "sqlite"


# --- arguments, context, ends


def test_model_instances_are_arguments_and_results_of_coroutines():
    effect = create(7)

    async def body(item):
        assert isinstance(item, Effect)
        return item

    row = schedule(body, effect)
    run_burst()

    row.refresh_from_db()
    assert row.status == "completed", row.error
    assert row.returned == effect
    assert row.returned.value == 7


def test_a_vanished_model_instance_fails_the_coroutine_clearly():
    async def body(item):
        return item

    effect = create()
    row = schedule(body, effect)
    effect.delete()
    run_burst()

    row.refresh_from_db()
    assert row.status == "failed"
    assert "testapp.effect" in row.error.lower()


def test_current_task_answers_in_coroutines_their_children_and_their_threads():
    async def body():
        async def child():
            return current_task().id

        here = current_task().id
        in_thread = await sync_to_async(lambda: current_task().id)()
        in_pool = await sync_to_async(lambda: current_task().id, thread_sensitive=False)()
        (in_child,) = await asyncio.gather(child())
        return [here, in_thread, in_pool, in_child]

    row = schedule(body)
    other = schedule(body)
    run_burst()

    for item in (row, other):
        item.refresh_from_db()
        assert item.returned == [item.pk] * 4


def test_a_coroutine_that_cancels_itself_fails():
    async def body():
        await acreate()
        running = asyncio.current_task()
        assert running is not None
        running.cancel()
        await asyncio.sleep(0)

    row, after = schedule(body), schedule(acreate, 2)
    run_burst()

    for item in (row, after):
        item.refresh_from_db()
    assert (row.status, outcomes(row)) == ("failed", ["failed"])
    assert "CancelledError" in row.error
    assert after.status == "completed"
    assert effects() == [2]


def test_a_coroutine_that_cancels_itself_without_a_query_fails():
    async def body():
        running = asyncio.current_task()
        assert running is not None
        running.cancel()
        await asyncio.sleep(0)

    row = run_one(body)

    assert (row.status, outcomes(row)) == ("failed", ["failed"])


def test_a_coroutine_that_is_interrupted_while_it_commits_has_completed(monkeypatch, caplog):
    committed, interrupted = threading.Event(), threading.Event()
    cancel_all = CoroutineLoop._cancel_all

    def cancel_all_and_tell(loop):
        cancel_all(loop)
        interrupted.set()

    def callback():
        committed.set()
        assert interrupted.wait(20)

    @sync_to_async
    def work():
        create()
        transaction.on_commit(callback)

    async def body():
        await work()

    monkeypatch.setattr(CoroutineLoop, "_cancel_all", cancel_all_and_tell)
    caplog.set_level(logging.INFO, logger="firefly_jobs")
    row = schedule(body)
    with consuming(shutdown_timeout=0.0) as consumer:
        assert committed.wait(20)
        consumer.stop()

    row.refresh_from_db()
    assert (row.status, outcomes(row), effects()) == ("completed", [], [1])
    said = [record.getMessage() for record in caplog.records]
    assert sum("completed in" in text for text in said) == 1, said
    assert not any("LeaseLost" in text for text in said), said


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_an_exception_that_would_end_a_process_fails_only_the_coroutine(error):
    async def body():
        await acreate(9)
        raise error("bye")

    row, after = schedule(body), schedule(acreate, 1)
    run_burst()

    for item in (row, after):
        item.refresh_from_db()
    assert (row.status, after.status) == ("failed", "completed")
    assert effects() == [1]


def test_sync_and_async_tasks_run_side_by_side():
    for number in range(20):
        schedule(acreate if number % 2 else create, number)
    run_burst()

    assert sorted(effects()) == list(range(20))


# --- scheduling from inside


def sync_in_sync():
    return tasks.nothing.schedule().pk


def async_in_sync():
    return async_to_sync(tasks.anothing.schedule)().pk


def aschedule_in_sync():
    return async_to_sync(tasks.nothing.aschedule)().pk


async def async_in_async():
    return (await tasks.anothing.schedule()).pk


async def sync_in_async():
    return (await sync_to_async(tasks.nothing.schedule)()).pk


async def aschedule_in_async():
    return (await tasks.nothing.aschedule()).pk


async def async_in_sync_in_async():
    return await sync_to_async(async_in_sync)()


def sync_in_async_in_sync():
    return async_to_sync(sync_in_async)()


WAYS = [
    sync_in_sync,
    async_in_sync,
    aschedule_in_sync,
    async_in_async,
    sync_in_async,
    aschedule_in_async,
    async_in_sync_in_async,
    sync_in_async_in_sync,
]


def followed_by(way, last):
    """Return a function that does ``last`` after ``way``, a coroutine function if that is one."""

    def body():
        way()
        last()

    async def abody():
        await way()
        await sync_to_async(last)()

    return abody if asyncio.iscoroutinefunction(way) else body


def fail():
    raise ValueError("no")


@pytest.mark.parametrize("way", WAYS)
def test_what_a_task_schedules_runs_once_the_task_has_completed(way):
    row = run_one(way)

    assert row.status == "completed", row.error
    child = TaskModel.objects.get(pk=row.returned)
    assert child.status == "completed"
    assert child.fence == 1


@pytest.mark.parametrize("way", WAYS)
def test_what_a_task_schedules_is_rolled_back_when_it_fails(way):
    row = run_one(followed_by(way, fail))

    assert row.status == "failed"
    assert "ValueError" in row.error
    assert list(TaskModel.objects.values_list("pk", flat=True)) == [row.pk]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_task_schedules_is_not_visible_before_the_task_has_completed(way):
    counts = []

    def count():
        counts.append(outside(TaskModel.objects.count))

    assert run_one(followed_by(way, count)).status == "completed"
    assert counts == [1]


def test_a_child_task_that_exits_fails_its_task_and_leaves_the_others_alone():
    started, may_end = Gate(), Gate()

    async def neighbour():
        started.open()
        await may_end.wait()
        await acreate(7)

    async def exits():
        await started.wait()

        async def child():
            sys.exit(4)

        try:
            await asyncio.gather(child())
        finally:
            may_end.open()

    beside, culprit = schedule(neighbour), schedule(exits)
    run_until_ended(beside, culprit)

    assert (culprit.status, culprit.error) == ("failed", "SystemExit: 4")
    assert (beside.status, outcomes(beside)) == ("completed", [])
    assert effects() == [7]


def test_a_query_after_a_swallowed_lane_timeout_fails_instead_of_waiting_for_ever(jobs):
    jobs(ASYNC_CONNECTIONS=1, LANE_TIMEOUT=0.3)
    has_started, held, timed_out = Gate(), Gate(), Gate()

    async def hold():
        # While its transaction is open nothing can be claimed on SQLite.
        await has_started.wait()
        await Effect.objects.acount()
        held.open()
        await timed_out.wait()

    async def insist():
        has_started.open()
        await held.wait()
        for _ in range(2):
            try:
                await acreate()
            except LaneTimeoutError:
                continue
        timed_out.open()

    holder, waiter = schedule(hold), schedule(insist)
    run_until_ended(holder, waiter)

    assert outcomes(waiter) == ["lost"]
    assert effects() == [1, 1]
