"""Waiting for results: whoever waits learns of every end, soon, and costs others nothing."""

import asyncio
import threading
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import OperationalError, connection, connections, transaction
from django.utils import timezone

from firefly_jobs import (
    Cancel,
    TaskCancelled,
    TaskFailed,
    TaskReference,
    WaitInsideTransactionError,
    current_task,
    databases,
    fencing,
    leases,
    lifecycle,
    serializers,
    waiting,
    wakeup,
)
from firefly_jobs.databases import ROLL_CALL, Channel, Notice, postgresql
from firefly_jobs.exceptions import CommitUncertain
from firefly_jobs.executors.uncertain import UncertainCommit
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    captured_statements,
    claim_one,
    consuming,
    dead_consumer,
    outside,
    plant,
    query,
    run_burst,
    run_one,
    schedule,
    second_connection,
    session_id,
    undone,
)
from tests.conftest import VENDOR
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp import tasks as testapp_tasks
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

# Far more than being woken takes on a loaded machine, far less than ``unpolled`` pauses.
AT_ONCE_SECONDS = 8.0
FOR_EVER_SECONDS = 60.0


@pytest.fixture
def unpolled():
    """Let waiters that something wakes look by themselves only after this test is over."""
    long: Any = dict.fromkeys(("WOKEN_SECONDS_MIN", "PAUSE_SECONDS_MAX", "ALONE_SECONDS"), 600.0)
    with mock.patch.multiple(waiting, **long):
        yield


@pytest.fixture
def no_neighbours():
    """Keep what this process ends from its own waiters, as if another one had ended it."""
    with mock.patch.object(wakeup, "_neighbours", {}):
        yield


@pytest.fixture
def no_memory():
    """Forget what former tests made this process know about who waits."""
    with mock.patch.object(wakeup, "_audiences", {}):
        yield


def lookout():
    return waiting.lookout("default")


def assert_waited_for(*rows):
    with lookout()._lock:
        assert set(lookout()._waits) >= {row.pk for row in rows}
        listener = lookout()._listener
    assert listener is None or listener.is_connected or listener.is_pooled


@contextmanager
def waited_for(row, wait=None):
    """Wait for ``row`` in a thread of its own; the block begins when that is the case."""
    waiter = Concurrent(wait or (lambda: row.wait(FOR_EVER_SECONDS)))
    eventually(lambda: assert_waited_for(row))
    yield waiter


def ended_elsewhere(row):
    """End ``row`` as a consumer in another process would."""
    held = claim_one(consumer=ConsumerModel.objects.create(name="other", lease_seconds=600).pk)
    assert held.id == row.pk
    lifecycle.complete_many(
        [databases.Completion(held.id, held.fence, 0.0, stored(41))], using="default"
    )


def stored(value):
    return serializers.dumps_returned(value, task_name=tasks.nothing.name, serializer="pickle")


def returns(value):
    return value


# --- what comes back


@pytest.mark.parametrize("value", [42, 0, None, "", [1, (2, 3)]])
def test_waiting_returns_what_the_call_returned(value):
    row = schedule(returns, value)
    with consuming():
        assert row.wait(AT_ONCE_SECONDS) == value

    assert row.status == "completed"
    assert row.completed is not None


def test_a_row_that_has_ended_is_not_waited_for():
    row = schedule(returns, 5)
    run_burst()

    assert row.wait(0) == 5
    assert row.wait_finished(timeout=0) is row
    assert async_to_sync(row.await_result)(0) == 5
    assert TaskReference(row.pk).wait(timeout=0) == 5


def test_a_model_instance_that_was_returned_is_loaded_for_whoever_waits():
    def create():
        return Effect.objects.create(task_key="returned", value=3)

    row = schedule(create)

    async def main():
        return await row.await_result(AT_ONCE_SECONDS)

    with consuming():
        assert async_to_sync(main)() == Effect.objects.get()


def raising(error):
    raise error


def test_a_failure_is_raised_to_whoever_waits_for_the_result():
    row = schedule(raising, LookupError("no such order"))
    with consuming(), pytest.raises(TaskFailed) as raised:
        row.wait(AT_ONCE_SECONDS)

    assert raised.value.task_id == row.pk
    assert raised.value.error == "LookupError: no such order"
    assert "tests.conformance.tasks.call) failed: LookupError: no such order" in str(raised.value)
    assert row.wait_finished(0).status == "failed"


def test_a_cancellation_is_raised_to_whoever_waits_for_the_result():
    row = schedule(raising, Cancel("sold out"))
    with consuming(), pytest.raises(TaskCancelled, match="was cancelled: sold out"):
        row.wait(AT_ONCE_SECONDS)

    assert async_to_sync(row.await_finished)(0).status == "cancelled"


def test_a_retry_is_no_end():
    calls = []

    def body():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError
        return len(calls)

    row = schedule(body, max_retries=5, retry_delay=0)
    with consuming():
        assert row.wait(AT_ONCE_SECONDS) == 3


def test_a_row_that_was_revived_is_waited_for_again(unpolled):
    errors = [ValueError("first")]

    def body():
        if errors:
            raise errors.pop()
        return "second"

    row = run_one(body)
    with pytest.raises(TaskFailed):
        row.wait(0)
    assert row.retry_now()
    with consuming():
        assert row.wait(AT_ONCE_SECONDS) == "second"


def test_a_hint_about_a_row_that_was_revived_since_is_no_end():
    row = tasks.nothing.schedule()
    with waited_for(row) as waiter:
        lookout().heard([row.pk])
        eventually(lambda: assert_looked(row))
        assert waiter.is_running
        run_burst()
        assert waiter.result() is None


def assert_looked(row):
    assert not any(wait.is_told for wait in lookout()._waits[row.pk])


@pytest.mark.parametrize("status", ["created", "blocked"])
def test_what_a_person_cancels_while_it_is_waited_for_ends_the_wait(status, unpolled):
    plant(1, status=status)
    row = TaskModel.objects.get()
    with waited_for(row) as waiter:
        assert outside(TaskModel.objects.get(pk=row.pk).cancel)
        with pytest.raises(TaskCancelled, match="cancelled while it waited"):
            waiter.result(timeout_seconds=AT_ONCE_SECONDS)


def test_a_row_that_is_deleted_while_it_is_waited_for_ends_the_wait():
    row = tasks.nothing.schedule()
    with waited_for(row) as waiter:
        TaskModel.objects.filter(pk=row.pk).delete()
        with pytest.raises(TaskModel.DoesNotExist, match=f"no task {row.pk} on database 'default'"):
            waiter.result(timeout_seconds=AT_ONCE_SECONDS)


def test_a_row_that_was_rolled_back_is_not_there():
    rows = []
    with pytest.raises(LookupError):
        undone(lambda: rows.append(tasks.nothing.schedule()))

    with pytest.raises(TaskModel.DoesNotExist, match="was rolled back or has not committed yet"):
        TaskReference(rows[0].pk).wait(1)


@pytest.mark.parametrize("timeout", [0, 0.05, timedelta(milliseconds=20)])
def test_a_wait_ends_when_its_time_is_over(timeout):
    row = tasks.nothing.schedule()
    message = f"Task {row.pk} has not ended within 0.* s, it is created. It goes on"

    with pytest.raises(TimeoutError, match=message):
        row.wait(timeout)
    with pytest.raises(TimeoutError, match=message):
        row.wait_finished(timeout)
    with pytest.raises(TimeoutError, match=message):
        async_to_sync(row.await_result)(timeout)
    with pytest.raises(TimeoutError, match=message):
        async_to_sync(TaskReference(row.pk).await_finished)(timeout)

    assert row.status == "created"
    assert lookout().is_empty


def test_a_reference_reads_the_row_on_its_own_alias():
    row = tasks.nothing.schedule()

    assert TaskReference(row.pk, using="default").get() == row
    assert async_to_sync(TaskReference(row.pk).aget)() == row
    with pytest.raises(TaskModel.DoesNotExist):
        TaskReference(row.pk + 1).get()


# --- transactions


def test_waiting_inside_a_transaction_is_refused_and_the_error_names_the_ways():
    with transaction.atomic():
        row = tasks.nothing.schedule()
        for wait in (row.wait, row.wait_finished, TaskReference(row.pk).wait):
            with pytest.raises(WaitInsideTransactionError, match=r"transaction.on_commit\(\)"):
                wait(1)
        with pytest.raises(WaitInsideTransactionError, match=f"Task {row.pk} .*nothing"):
            async_to_sync(row.await_result)(1)


def test_a_row_that_has_ended_may_be_asked_inside_a_transaction():
    row = schedule(returns, 7)
    run_burst()
    with transaction.atomic():
        assert row.wait() == 7


def test_waiting_is_refused_where_transactions_are_managed_by_hand():
    row = tasks.nothing.schedule()
    connection.set_autocommit(False)
    try:
        with pytest.raises(WaitInsideTransactionError):
            row.wait(1)
    finally:
        connection.rollback()
        connection.set_autocommit(True)


def test_waiting_in_an_on_commit_callback_is_fine():
    results = []
    with consuming(), transaction.atomic():
        row = schedule(returns, 3)
        transaction.on_commit(lambda: results.append(row.wait(AT_ONCE_SECONDS)))

    assert results == [3]


@pytest.mark.django_db
def test_a_test_case_is_told_to_be_a_transaction_test_case():
    row = tasks.nothing.schedule()

    with pytest.raises(WaitInsideTransactionError, match="use TransactionTestCase"):
        row.wait(1)


def test_a_task_that_waits_in_its_transaction_fails_and_is_told_what_to_do():
    def parent():
        return tasks.nothing.schedule().wait(1)

    async def aparent():
        return await (await tasks.nothing.aschedule()).await_result(1)

    for body in (parent, aparent):
        row = run_one(body)
        assert row.status == "failed"
        assert row.error.startswith("WaitInsideTransactionError")
        assert "declare this one with atomic=False" in row.error


def test_a_task_without_a_transaction_may_wait_for_another_one():
    def parent():
        return [current_task().func_name, schedule(returns, 8).wait(AT_ONCE_SECONDS)]

    async def aparent():
        row = await tasks.nothing.aschedule()
        return await row.await_result(AT_ONCE_SECONDS)

    rows = [schedule(parent, atomic=False), schedule(aparent, atomic=False)]
    with consuming(threads=2):
        assert rows[0].wait(20) == [tasks.call_in_autocommit.name, 8]
        assert rows[1].wait(20) is None


# --- being woken


def test_whoever_waits_is_woken_by_a_consumer_of_another_process(start_consumer, unpolled):
    consumer = start_consumer()
    consumer.wait_for_line(r"Consumer (\d+) consumes")
    for _ in range(3):
        assert testapp_tasks.echo.schedule("woken").wait(AT_ONCE_SECONDS) == "woken"


def test_whoever_waits_is_woken_by_what_another_thread_ends(unpolled):
    row = tasks.nothing.schedule()
    with waited_for(row) as waiter:
        outside(ended_elsewhere, row)
        assert waiter.result(timeout_seconds=AT_ONCE_SECONDS) == 41


def test_a_call_that_is_settled_in_its_own_transaction_wakes_as_well(unpolled, no_neighbours):
    with consuming():
        row = tasks.insert.schedule("effect", 1)
        assert row.wait(AT_ONCE_SECONDS) > 0


def test_a_group_wakes_everybody_who_waits_for_one_of_it(unpolled, no_neighbours):
    rows = [tasks.insert_in_groups.schedule() for _ in range(5)]
    waiters = [Concurrent(row.wait_finished, AT_ONCE_SECONDS) for row in rows]
    eventually(lambda: assert_waited_for(*rows))
    with consuming():
        assert {waiter.result().status for waiter in waiters} == {"completed"}


def test_a_failure_in_another_process_wakes(unpolled, no_neighbours):
    row = schedule(raising, ValueError("broken"))
    with waited_for(row) as waiter, consuming(), pytest.raises(TaskFailed, match="broken"):
        waiter.result(timeout_seconds=AT_ONCE_SECONDS)


def test_whoever_waits_polls_with_notify_off(jobs, no_neighbours):
    jobs(NOTIFY=False)
    row = tasks.nothing.schedule()
    with mock.patch.dict(waiting._lookouts, clear=True), waited_for(row) as waiter:
        assert lookout()._listener is None
        outside(ended_elsewhere, row)
        assert waiter.result(timeout_seconds=AT_ONCE_SECONDS) == 41


# --- many who wait


def test_many_threads_and_coroutines_wait_with_few_queries(unpolled):
    rows = [schedule(returns, number) for number in range(30)]
    looks = []
    look = waiting.Lookout._is_look_due

    def count(self, on):
        is_due = look(self, on)
        looks.append(is_due)
        return is_due

    async def gather():
        return await asyncio.gather(*(row.await_result(FOR_EVER_SECONDS) for row in rows[15:]))

    threads = [Concurrent(row.wait, FOR_EVER_SECONDS) for row in rows[:15]]
    coroutines = Concurrent(async_to_sync(gather))
    eventually(lambda: assert_waited_for(*rows))
    with mock.patch.object(waiting.Lookout, "_is_look_due", count), consuming():
        results = [thread.result(timeout_seconds=20) for thread in threads]
        results += coroutines.result(timeout_seconds=20)

    assert results == list(range(30))
    assert lookout().is_empty
    if VENDOR != "mysql":
        assert sum(looks) < 150


def test_two_may_wait_for_the_same_row():
    row = schedule(returns, 9)
    waiters = [Concurrent(TaskReference(row.pk).wait, FOR_EVER_SECONDS) for _ in range(2)]
    eventually(lambda: assert_number_waiting(row, 2))
    run_burst()

    assert [waiter.result() for waiter in waiters] == [9, 9]


def assert_number_waiting(row, number):
    assert len(lookout()._waits.get(row.pk, ())) == number


def test_another_one_looks_for_all_when_the_first_has_left(no_neighbours):
    first, second = (tasks.nothing.schedule() for _ in range(2))
    leader = Concurrent(first.wait, 1.0)
    eventually(lambda: assert_waited_for(first))
    with waited_for(second) as follower:
        with pytest.raises(TimeoutError):
            leader.result()
        TaskModel.objects.filter(pk=first.pk).delete()
        outside(ended_elsewhere, second)
        assert follower.result(timeout_seconds=AT_ONCE_SECONDS) == 41


def test_a_short_wait_beside_a_long_one_is_polled_for_as_if_it_were_alone(jobs, no_neighbours):
    jobs(NOTIFY=False)
    long: Any = dict.fromkeys(("PAUSE_SECONDS_MAX", "SLEEP_SECONDS_MAX", "ALONE_SECONDS"), 600.0)
    patient, hasty = (tasks.nothing.schedule() for _ in range(2))
    with (
        mock.patch.dict(waiting._lookouts, clear=True),
        mock.patch.multiple(waiting, **long),
        waited_for(patient) as waiter,
    ):
        lookout()._last_joined_at -= 1_000_000
        eventually(assert_sleeps_long)
        with waited_for(hasty) as other:
            TaskModel.objects.filter(pk=hasty.pk).delete()
            with pytest.raises(TaskModel.DoesNotExist):
                other.result(timeout_seconds=AT_ONCE_SECONDS)
        lookout().heard(None)
        outside(patient.cancel)
        lookout().heard(None)
        with pytest.raises(TaskCancelled):
            waiter.result()


def assert_sleeps_long():
    if VENDOR != "sqlite":
        assert lookout()._next_look_at > monotonic() + 500


# --- coroutines


def test_waiting_blocks_no_event_loop_and_can_be_cancelled():
    row = tasks.nothing.schedule()

    async def main():
        ticks = 0
        waiter = asyncio.create_task(row.await_result())
        while row.pk not in lookout()._waits or ticks < 50:
            await asyncio.sleep(0)
            ticks += 1
        waiter.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiter
        return lookout().is_empty

    assert async_to_sync(main)()


def test_a_cancelled_coroutine_hands_over_to_the_next_one(no_neighbours):
    rows = [tasks.nothing.schedule() for _ in range(2)]

    async def main():
        waiters = [asyncio.create_task(row.await_result(FOR_EVER_SECONDS)) for row in rows]
        await sync_to_async(eventually, thread_sensitive=False)(lambda: assert_waited_for(*rows))
        (leader,) = (n for n, row in enumerate(rows) if is_led_by(row))
        waiters[leader].cancel()
        await asyncio.sleep(0)
        cancelled = rows[leader].pk
        await sync_to_async(TaskModel.objects.filter(pk=cancelled).delete)()
        other = rows[1 - leader]
        await sync_to_async(outside, thread_sensitive=False)(ended_elsewhere, other)
        return await waiters[1 - leader]

    def is_led_by(row):
        return any(lookout().is_led_by(wait) for wait in lookout()._waits[row.pk])

    assert async_to_sync(main)() == 41


# --- connections


def test_waiting_keeps_no_transaction_open_and_the_connection_usable():
    row = tasks.nothing.schedule()
    with pytest.raises(TimeoutError):
        row.wait(0.1)

    assert connection.get_autocommit()
    assert not connection.in_atomic_block
    assert TaskModel.objects.count() == 1


def test_waiting_sends_only_selects_on_the_callers_connection():
    row = tasks.nothing.schedule()
    with captured_statements() as statements, pytest.raises(TimeoutError):
        row.wait(0.3)

    assert {sql.split()[0] for sql, _ in statements} == {"SELECT"}
    if VENDOR != "mysql":
        assert len(statements) < 15


@pytest.mark.server
def test_a_wait_survives_the_end_of_its_session(no_neighbours):
    row = tasks.nothing.schedule()
    sessions = []

    def wait():
        connections["default"].ensure_connection()
        sessions.append(session_id(connections["default"]))
        return row.wait(FOR_EVER_SECONDS)

    with waited_for(row, wait) as waiter:
        kill = {
            "postgresql": "SELECT pg_terminate_backend(%s)",
            "mysql": "KILL CONNECTION %s",
        }
        query(connection, kill[VENDOR], sessions[0])
        outside(ended_elsewhere, row)
        assert waiter.result(timeout_seconds=AT_ONCE_SECONDS) == 41


# --- notifications of ends


@contextmanager
def hearing(channel):
    """Return a function that waits until all given texts were heard on a channel."""
    with second_connection() as other:
        other.ensure_connection()
        subscription = databases.of("default").listen(other, [channel])
        assert subscription is not None
        heard: list[str] = []

        def hears(*texts):
            def did():
                heard.extend(notice.text for notice in subscription.receive())
                words = {word for text in heard for word in text.split(",")} - {ROLL_CALL}
                assert words == set(texts)

            eventually(did)
            heard.clear()

        yield hears
        subscription.close()


@pytest.mark.postgresql
def test_a_consumer_sends_no_ends_while_nobody_waits(no_memory):
    with hearing(Channel.ENDED) as hears, consuming() as consumer:
        eventually(lambda: assert_listens(consumer))
        rows = [tasks.nothing.schedule(), tasks.insert.schedule("nobody"), tasks.nothing.schedule()]
        eventually(lambda: assert_all_completed(rows))
        # Another process says that somebody waits.
        databases.of("default").notify(connection, [Notice(Channel.WAITING, "")])
        eventually(lambda: assert_awaited(may_be_there=True))
        # Once for what was kept back, and from now on each.
        last = tasks.nothing.schedule()
        eventually(lambda: assert_all_completed([last]))
        hears("", str(last.pk))


def assert_listens(consumer):
    assert consumer._nap._listener.is_connected
    assert_awaited(may_be_there=False)


def assert_awaited(*, may_be_there):
    assert wakeup.audience("default").may_be_there is may_be_there


def assert_all_completed(rows):
    for row in rows:
        row.refresh_from_db()
        assert row.status == "completed"


@pytest.mark.postgresql
def test_a_consumer_that_starts_later_asks_who_waits(unpolled, no_neighbours, no_memory):
    # Somebody who is still there when the question comes, however late the consumer listens.
    patient = tasks.nothing.schedule(eta=timezone.now() + timedelta(days=1))
    with waited_for(patient) as waiter, consuming() as consumer:
        eventually(lambda: assert_hears_waiters(consumer))
        row = tasks.nothing.schedule()
        assert row.wait(AT_ONCE_SECONDS) is None
        assert patient.cancel()
        with pytest.raises(TaskCancelled):
            waiter.result(timeout_seconds=AT_ONCE_SECONDS)


def assert_hears_waiters(consumer):
    assert consumer._nap._listener.is_connected
    assert wakeup.audience("default")._until > 0


@pytest.mark.postgresql
def test_a_question_that_nobody_answered_is_answered_by_the_next_one_who_waits():
    own = waiting.Lookout("default")
    listener = own._listener = waiting.EndListener(own, using="default")
    listener.is_connected = True
    listener._said_at = monotonic()
    with mock.patch.dict(waiting._lookouts, {"default": own}):
        wait = waiting.Wait(1, using="default", timeout_seconds=None)

    with mock.patch.object(listener, "nudge") as nudge:
        with own.joined(wait):
            nudge.assert_not_called()
        listener.on_heard({Notice(Channel.ENDED, ROLL_CALL)})
        nudge.reset_mock()
        with own.joined(wait):
            nudge.assert_called_once_with()
            assert listener.seconds_until_pause() <= 0


@pytest.mark.postgresql
def test_processes_without_a_consumer_always_say_what_they_end(no_neighbours):
    rows = [tasks.nothing.schedule() for _ in range(3)]
    with hearing(Channel.ENDED) as hears:
        assert rows[0].cancel()
        hears(str(rows[0].pk))
        with transaction.atomic():
            assert rows[1].cancel()
            with pytest.raises(LookupError):
                undone(rows[2].cancel)
        hears(str(rows[1].pk))


@pytest.mark.postgresql
def test_a_row_that_fails_because_it_was_lost_too_often_is_announced(no_neighbours, jobs):
    jobs(MAX_RESCUES=0)
    row = tasks.nothing.schedule()
    TaskModel.objects.update(rescues=5)
    dead = dead_consumer()
    assert claim_one(consumer=dead.pk).id == row.pk
    with hearing(Channel.ENDED) as hears:
        leases.bury(dead.pk, using="default")
        hears(str(row.pk))
    assert TaskReference(row.pk).get().status == "failed"


@pytest.mark.postgresql
def test_more_ends_than_a_notification_should_name_are_announced_as_any(no_neighbours):
    with hearing(Channel.ENDED) as hears:
        wakeup.announce_ended("default", range(1, wakeup.ENDED_MAX + 2))
        hears("")
        wakeup.announce_ended("default", range(1, wakeup.ENDED_MAX + 1))
        hears(*(str(pk) for pk in range(1, wakeup.ENDED_MAX + 1)))


@pytest.mark.postgresql
def test_ends_are_merged_into_few_statements(no_neighbours):
    sent = []
    notify = postgresql.PostgreSQL.notify

    def count(database, on, notices):
        sent.append(notices)
        notify(database, on, notices)

    with (
        hearing(Channel.ENDED) as hears,
        mock.patch.object(postgresql.PostgreSQL, "notify", count),
    ):
        for pk in range(1, 200):
            wakeup.announce_ended("default", [pk])
        hears(*(str(pk) for pk in range(1, 200)))

    assert len(sent) < 50
    assert {len(notices) for notices in sent} == {1}


LISTENERS = (
    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    "pg_backend_pid() AND (query = 'LISTEN firefly_jobs_ended' OR query LIKE 'SELECT pg_notify%%')"
)


@pytest.mark.postgresql
def test_all_who_wait_share_one_listening_connection_that_is_closed_after_idling():
    rows = [tasks.nothing.schedule() for _ in range(3)]
    waiters = [Concurrent(row.wait, FOR_EVER_SECONDS) for row in rows]
    eventually(lambda: assert_waited_for(*rows))
    wakeup.flush()
    listener = lookout()._listener
    assert listener is not None
    # The server may take a moment to forget the announcer's.
    eventually(lambda: assert_listening(1))
    # Waiting, it is in no transaction.
    assert query(connection, LISTENERS + " AND state <> 'idle'") == []

    run_burst()
    for waiter in waiters:
        waiter.result()
    wakeup.flush()
    listener.join(10)
    assert not listener.is_alive()
    assert lookout()._listener is None
    eventually(lambda: assert_listening(0))


def assert_listening(count):
    assert len(query(connection, LISTENERS)) == count


@pytest.mark.postgresql
def test_a_listener_whose_session_was_ended_misses_nothing(unpolled, no_neighbours):
    row = tasks.nothing.schedule()
    with waited_for(row) as waiter:
        wakeup.flush()
        for (pid,) in query(connection, LISTENERS):
            query(connection, "SELECT pg_terminate_backend(%s)", pid)
        outside(ended_elsewhere, row)
        assert waiter.result(timeout_seconds=AT_ONCE_SECONDS) == 41


@pytest.mark.postgresql
def test_whoever_waits_behind_a_pooler_polls(no_neighbours):
    row = tasks.nothing.schedule()
    with (
        mock.patch.object(postgresql, "_told_pid", return_value=-1),
        mock.patch.dict(waiting._lookouts, clear=True),
        waited_for(row) as waiter,
    ):
        eventually(assert_gave_up)
        outside(ended_elsewhere, row)
        assert waiter.result(timeout_seconds=AT_ONCE_SECONDS) == 41


def assert_gave_up():
    listener = lookout()._listener
    assert listener.is_pooled
    assert not listener.is_alive()


def test_a_commit_without_an_answer_is_not_asked_about_for_long_only_to_announce_it():
    tasks.nothing.schedule()
    ours = wakeup.Announcement("default", (), (1,))
    began_at = monotonic()
    with mock.patch.object(fencing, "was_completed", side_effect=OperationalError):
        asking = UncertainCommit(using="default")
        assert not asking.has_arrived(claim_one(), CommitUncertain([(set(), ours, False)]))

    assert monotonic() - began_at < AT_ONCE_SECONDS


FORK = """
import os, sys, threading
from django.db import connections
from firefly_jobs import waiting, wakeup
from tests.conformance import tasks

wakeup.IDLE_SECONDS_IN_TESTS = 60.0
row = tasks.nothing.schedule()
try:
    row.wait(1)
except TimeoutError:
    pass
parents = waiting.lookout("default")
assert parents._listener.is_connected
connections.close_all()
child = os.fork()
if not child:
    assert waiting.lookout("default") is not parents
    try:
        row.wait(0.5)
    except TimeoutError:
        pass
    connections.close_all()
    waiting._end_listeners()
    wakeup.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert waiting.lookout("default") is parents
assert parents._listener.is_connected
print("row", row.pk, flush=True)
assert row.wait_finished(20).status == "cancelled"
"""


@pytest.mark.postgresql
def test_a_forked_process_waits_by_itself_and_leaves_its_parents_connection_alone(start_manage):
    process = start_manage("shell", "--no-imports", "-v0", "-c", FORK)
    pk = int(process.wait_for_line(r"row (\d+)").group(1))
    assert TaskModel.objects.get(pk=pk).cancel()

    assert process.wait() == 0, process.output


def test_the_thread_of_a_listener_is_a_daemon():
    listener = waiting.EndListener(lookout(), using="default")
    assert listener.daemon
    assert isinstance(listener, threading.Thread)
