"""Waking up: an idle consumer that would sleep for 30 seconds does not, when there is work."""

import threading
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
from django.db import connection, connections, transaction
from django.utils import timezone

from firefly_jobs import Snooze, databases, leases, lifecycle, wakeup
from firefly_jobs.attempts import Ended, Settlement
from firefly_jobs.databases import ANY_QUEUE, Channel, Notice, postgresql
from firefly_jobs.listening import Listener
from firefly_jobs.models import ConsumerModel, TaskModel
from firefly_jobs.states import Status
from firefly_jobs.transactions import CallTransaction
from tests.conformance import tasks
from tests.conformance.support import (
    claim_one,
    consuming,
    dead_consumer,
    effects,
    outside,
    query,
    run_burst,
    schedule,
    second_connection,
    undone,
)
from tests.conftest import VENDOR
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)

# Far more than a wake-up takes on a loaded machine, far less than the nap.
AT_ONCE_SECONDS = 8.0
NAP_SECONDS = 30.0


def assert_completed(row):
    row.refresh_from_db()
    assert row.status == "completed", (row.status, row.error)


def runs_at_once(row):
    eventually(lambda: assert_completed(row), timeout_seconds=AT_ONCE_SECONDS)


@contextmanager
def napping(*queues):
    """Run a consumer during the block, which begins when it has gone to sleep for long."""
    with consuming(*queues) as consumer:
        falls_asleep(consumer)
        yield consumer


def falls_asleep(consumer):
    def sleeps():
        assert ConsumerModel.objects.filter(pk=consumer.owner()).exists()
        nap = consumer._nap
        assert nap._listener is None or nap._listener.is_connected
        assert nap._next_look_at > 0
        if VENDOR != "mysql":
            assert nap.seconds_left > NAP_SECONDS / 2

    eventually(sleeps)


@contextmanager
def listening():
    """Return a function that asserts which queues were announced since it was last called."""
    # What a former test has announced may still be on its way.
    wakeup.flush()
    with second_connection() as other:
        other.ensure_connection()
        subscription = databases.of("default").listen(other, [Channel.DUE])
        assert subscription is not None
        heard: set[str] = set()

        def hears(*queues):
            def did():
                heard.update(notice.text for notice in subscription.receive())
                assert heard == set(queues)

            eventually(did)
            heard.clear()

        yield hears
        subscription.close()


# --- work that appears


def test_a_task_that_another_thread_schedules_runs_at_once():
    with napping():
        runs_at_once(outside(tasks.insert.schedule, "woken", 1))

    assert effects() == [1]


@pytest.mark.parametrize("queues", [["mail"], ["default", "mail"], ["*"]])
def test_a_task_of_any_queue_that_is_served_runs_at_once(queues):
    with napping(*queues):
        runs_at_once(outside(tasks.nothing.using(queue="mail").schedule))


def test_a_task_that_a_process_schedules_just_before_it_ends_runs_at_once(start_manage):
    code = "from tests.conformance import tasks; print('id', tasks.nothing.schedule().pk)"
    with napping():
        process = start_manage("shell", "--no-imports", "-c", code)
        row = TaskModel.objects.get(pk=process.wait_for_line(r"id (\d+)").group(1))
        runs_at_once(row)
        assert process.wait() == 0


def test_a_task_whose_transaction_commits_late_runs_at_once():
    def schedule_and_commit():
        with transaction.atomic():
            row = tasks.nothing.schedule()
            tasks.nothing.using(queue="unserved").schedule()
        return row

    with napping():
        runs_at_once(outside(schedule_and_commit))


def test_a_task_that_a_task_schedules_runs_at_once():
    children = []

    def parent():
        children.append(tasks.nothing.schedule())

    with napping() as consumer:
        runs_at_once(outside(schedule, parent))
        runs_at_once(children[0])
        falls_asleep(consumer)


def test_a_task_with_a_unique_key_runs_at_once():
    with napping():
        runs_at_once(outside(tasks.nothing.using(unique_key="k").schedule))


@pytest.mark.parametrize("concurrency", [None, 1])
def test_a_call_that_replaces_one_due_later_runs_at_once(concurrency):
    limited = tasks.nothing.using(unique_key="k", concurrency=concurrency)
    row = limited.using(eta=timezone.now() + timedelta(hours=1)).schedule()
    if concurrency is not None:
        # It has stood in a line, and was let go.
        TaskModel.objects.update(limit_key=f"c:{row.concurrency_key}")

    with napping():
        outside(limited.using(on_conflict="replace").schedule)
        runs_at_once(row)


def another_consumer():
    """Write the row of a consumer that is alive, so that nobody rescues what it holds."""
    return ConsumerModel.objects.create(name="other", queues="default", lease_seconds=600).pk


def released(held):
    lifecycle.release([held], using="default")


def settled_as_due(held):
    lifecycle.settle(
        Settlement(claim=held, ended=Ended.SNOOZED, status=Status.CREATED, duration=0.0),
        using="default",
        consumer=held.id,
    )


@pytest.mark.parametrize("give_back", [released, settled_as_due])
def test_what_another_consumer_gives_back_runs_at_once(give_back):
    row = tasks.nothing.schedule()
    held = claim_one(consumer=another_consumer())
    with napping():
        outside(give_back, held)
        runs_at_once(row)


def test_what_is_rescued_from_another_consumer_runs_at_once():
    row = tasks.nothing.schedule()
    dead = dead_consumer(lease_seconds=7200)
    claim_one(consumer=dead.pk)
    with napping():
        ConsumerModel.objects.filter(pk=dead.pk).update(suspected_at=timezone.now())
        dead.refresh_from_db()
        outside(lambda: leases.rescue(dead, using="default"))
        runs_at_once(row)


def test_what_a_person_retries_runs_at_once():
    row = tasks.nothing.schedule()
    assert row.cancel()
    with napping():
        assert outside(row.retry_now)
        runs_at_once(row)


# --- work that becomes due


def test_etas_that_others_schedule_during_a_nap_fire_in_time():
    def schedule_later():
        now = timezone.now()
        delays = [0.6, 0.4, 0.9]
        return [tasks.nothing.schedule(eta=now + timedelta(seconds=delay)) for delay in delays]

    with napping():
        rows = outside(schedule_later)
        for row in rows:
            runs_at_once(row)

    delays = [row.started - row.run_at for row in rows]
    # On a busy machine one or the other is later.
    assert timedelta(0) <= min(delays) < timedelta(seconds=0.05)
    assert max(delays) < timedelta(seconds=0.5)


def test_an_eta_of_a_lower_priority_is_not_forgotten_over_a_later_one():
    tasks.nothing.using(priority=5).schedule(eta=timezone.now() + timedelta(hours=1))
    row = tasks.nothing.schedule(eta=timezone.now() + timedelta(seconds=0.5))
    with consuming():
        runs_at_once(row)

    assert row.started - row.run_at < timedelta(seconds=0.5)


def test_a_task_that_snoozes_runs_again_when_it_is_due():
    calls = []

    def body():
        calls.append(1)
        if len(calls) == 1:
            raise Snooze(delay=0.5)

    with napping():
        row = outside(schedule, body)
        runs_at_once(row)

    assert row.started - row.run_at < timedelta(seconds=0.5)


def test_the_time_until_a_row_is_due_is_the_databases():
    database = databases.of("default")
    assert database.seconds_until_due(connection, "default", 0) is None

    tasks.nothing.schedule(eta=timezone.now() + timedelta(hours=1))
    later = database.seconds_until_due(connection, "default", 0)
    tasks.nothing.schedule()
    now = database.seconds_until_due(connection, "default", 0)

    assert later is not None
    assert now is not None
    assert 3590 < later <= 3600.1
    assert -10 < now <= 0.001


# --- the announcer


@pytest.mark.postgresql
def test_what_was_rolled_back_is_not_announced():
    with listening() as hears:
        with transaction.atomic():
            tasks.nothing.using(queue="kept").schedule()
            with pytest.raises(LookupError):
                undone(tasks.nothing.using(queue="undone").schedule)
        with pytest.raises(LookupError):
            undone(tasks.nothing.using(queue="undone").schedule)
        tasks.nothing.using(queue="last").schedule()

        hears("kept", "last")


@pytest.mark.postgresql
def test_a_row_is_announced_although_an_earlier_one_was_rolled_back_to_a_savepoint():
    with listening() as hears:
        with transaction.atomic():
            with pytest.raises(LookupError):
                undone(tasks.nothing.using(queue="undone").schedule)
            tasks.nothing.using(queue="kept").schedule()

        hears("kept")


@pytest.mark.postgresql
def test_a_transaction_registers_one_callback_however_much_it_schedules():
    with listening() as hears:
        with transaction.atomic():
            for number in range(20):
                tasks.nothing.using(queue=f"queue-{number % 3}").schedule()
            with transaction.atomic():
                tasks.nothing.using(queue="queue-1").schedule()
            assert len(connection.run_on_commit) == 1

        hears("queue-0", "queue-1", "queue-2")


@pytest.mark.postgresql
def test_announcements_are_merged():
    sent = []
    notify = postgresql.PostgreSQL.notify

    def count(database, on, queues):
        sent.append(queues)
        notify(database, on, queues)

    with listening() as hears, mock.patch.object(postgresql.PostgreSQL, "notify", count):
        for number in range(60):
            wakeup.announce("default", {f"queue-{number % 5}"})
        hears(*(f"queue-{number}" for number in range(5)))

    assert len(sent) < 20


@pytest.mark.postgresql
def test_more_queues_than_a_statement_should_name_are_announced_as_any():
    with listening() as hears:
        with transaction.atomic():
            for number in range(wakeup.QUEUES_MAX + 1):
                wakeup.announce("default", {f"queue-{number}"})

        hears(ANY_QUEUE)


@pytest.mark.postgresql
def test_an_announcer_that_has_ended_starts_again():
    with listening() as hears:
        for name in ("first", "second"):
            wakeup.announce("default", {name})
            hears(name)
            wakeup.flush()
            assert wakeup._announcer("default")._thread is None


@pytest.mark.postgresql
def test_an_announcer_whose_connection_was_closed_connects_again():
    with (
        listening() as hears,
        mock.patch.object(wakeup, "IDLE_SECONDS_IN_TESTS", 60.0),
    ):
        wakeup.announce("default", {"first"})
        hears("first")
        ended = query(
            connection,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND query LIKE 'SELECT pg_notify%%'",
        )
        assert ended == [(True,)]
        wakeup.announce("default", {"second"})
        hears("second")
        wakeup.flush()


@pytest.mark.postgresql
def test_scheduling_succeeds_although_nothing_can_be_announced(caplog):
    has_failed = threading.Event()

    def fail(*_):
        has_failed.set()
        raise RuntimeError("no connection left")

    with mock.patch.object(postgresql.PostgreSQL, "notify", fail):
        row = tasks.nothing.schedule()
        assert has_failed.wait(10)
        wakeup.flush()
    run_burst()

    assert_completed(row)
    assert "Could not tell others about due or ended tasks" in caplog.text


FORK = """
import os, sys
from django.db import connections
from firefly_jobs import wakeup
from tests.conformance import tasks

wakeup.IDLE_SECONDS_IN_TESTS = 60.0
tasks.nothing.using(queue="before").schedule()
parents = wakeup._announcer("default")
while parents._pending or parents._thread is None:
    pass
connections.close_all()
child = os.fork()
tasks.nothing.using(queue="parent" if child else "child").schedule()
assert (wakeup._announcer("default") is parents) == bool(child)
if not child:
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
tasks.nothing.using(queue="after").schedule()
"""


@pytest.mark.postgresql
def test_a_forked_process_announces_by_itself_and_leaves_its_parents_connection_alone(start_manage):
    with listening() as hears:
        process = start_manage("shell", "--no-imports", "-v0", "-c", FORK)

        assert process.wait() == 0, process.output
        hears("before", "parent", "child", "after")
        assert process.output == ""


@pytest.mark.postgresql
def test_nothing_is_announced_with_notify_off(jobs):
    jobs(NOTIFY=False)
    with listening() as hears:
        tasks.nothing.schedule()
        with transaction.atomic():
            tasks.nothing.schedule()
            assert connection.run_on_commit == []
        jobs(NOTIFY=True)
        tasks.nothing.using(queue="last").schedule()

        hears("last")


def test_manual_transaction_management_does_not_disturb_scheduling():
    connection.set_autocommit(False)
    try:
        row = tasks.nothing.schedule()
        connection.commit()
    finally:
        connection.set_autocommit(True)
    run_burst()

    assert_completed(row)


@pytest.mark.django_db
def test_a_test_case_sees_no_callback_of_ours(django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks() as callbacks:
        tasks.nothing.schedule()
        transaction.on_commit(int)

    assert callbacks == [int]


def test_a_call_that_schedules_keeps_the_lanes_transaction_block():
    left = []
    leave = CallTransaction.leave

    def count(block):
        left.append(block)
        leave(block)

    def body():
        tasks.insert.schedule("child", 1)

    for _ in range(3):
        schedule(body)
    with mock.patch.object(CallTransaction, "leave", count):
        run_burst()

    assert effects() == [1, 1, 1]
    # At its end only.
    assert len(left) == 1


# --- the listener


@pytest.mark.postgresql
def test_what_arrives_with_the_answer_to_a_statement_of_the_listener_is_heard():
    heard = threading.Event()

    class Echo(Listener):
        def connect(self):
            self.connection = connections["default"].copy()
            self.connection.inc_thread_sharing()
            self.connection.ensure_connection()
            return self.connection

        def disconnect(self):
            self.connection.close()

        def on_connected(self):
            # One's own notifications come with the answer.
            databases.of("default").notify(self.connection, [Notice(Channel.ENDED, "7")])

        def on_heard(self, notices):
            assert {notice.text for notice in notices} == {"7"}
            heard.set()

    listener = Echo(using="default", channels=(Channel.ENDED,), name="echo")
    listener.start()
    try:
        assert heard.wait(10)
    finally:
        listener.stop()
        listener.join(10)


@pytest.mark.postgresql
def test_a_listener_whose_session_was_ended_listens_again():
    with napping() as consumer:
        ended = query(
            connection,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            # The last that the listener has sent asks who waits for results.
            "WHERE datname = current_database() AND query LIKE 'SELECT pg_notify%%'",
        )
        assert (True,) in ended
        # In between it polls.
        runs_at_once(outside(tasks.nothing.schedule))
        falls_asleep(consumer)
        runs_at_once(outside(tasks.nothing.schedule))


@pytest.mark.postgresql
def test_an_announcement_of_another_queue_wakes_nobody():
    with napping("served") as consumer, listening() as hears:
        moment = consumer._nap._next_look_at
        outside(tasks.nothing.using(queue="unserved").schedule)
        hears("unserved")
        outside(tasks.nothing.using(queue="served").schedule)
        hears("served")
        eventually(lambda: assert_status_is("completed", queue="served"))
        falls_asleep(consumer)
        assert consumer._nap._next_look_at > moment


def assert_status_is(status, *, queue):
    assert TaskModel.objects.get(queue=queue).status == status


def test_a_consumer_polls_with_notify_off(jobs):
    jobs(NOTIFY=False)
    with consuming() as consumer:
        eventually(lambda: ConsumerModel.objects.get(pk=consumer.owner()))
        assert consumer._nap._listener is None
        runs_at_once(outside(tasks.nothing.schedule))


@pytest.mark.postgresql
def test_a_consumer_polls_behind_a_pooler(caplog):
    # The server's process id is not the one that a pooler told the driver.
    with mock.patch.object(postgresql, "_told_pid", return_value=-1), consuming() as consumer:
        eventually(lambda: assert_given_up(consumer))
        runs_at_once(outside(tasks.nothing.schedule))

    assert caplog.text.count("since its sessions are a pooler's; polling instead") == 1


def assert_given_up(consumer):
    assert not consumer._nap._listener.is_alive()
    assert not consumer._nap._listener.is_connected


def test_a_number_is_the_ceiling_of_a_nap_everywhere(jobs):
    jobs(CONSUMER_NAP_TIME=0.2)
    with consuming() as consumer:
        eventually(lambda: ConsumerModel.objects.get(pk=consumer.owner()))

        def looks_again():
            assert consumer._nap._next_look_at > first

        first = eventually(lambda: assert_positive(consumer._nap._next_look_at))
        assert consumer._nap.seconds_left <= 0.2
        eventually(looks_again)


def assert_positive(number):
    assert number > 0
    return number
