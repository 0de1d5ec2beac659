"""What one schedule cannot do keeps the others from nothing, and nothing is counted wrongly."""

import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError, connection, connections, transaction

from firefly_jobs import (
    consequences,
    databases,
    declarations,
    firing,
    lifecycle,
    registry,
    syncing,
    tallies,
)
from firefly_jobs.attempts import Outcome, decide
from firefly_jobs.declarations import Occurrence
from firefly_jobs.exceptions import ScheduleError
from firefly_jobs.jobs import Job
from firefly_jobs.models import ConsumerModel, ScheduleModel, TaskModel
from firefly_jobs.recurring_jobs import recurring_job
from firefly_jobs.ticker import Ticker
from tests.conformance import tasks
from tests.conformance.schedule_support import agenda, call_of, every, fire, late, occurrences, read
from tests.conformance.support import claim, consuming, repeatable_reads, run_burst
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp.models import Effect

NOW = datetime.now(UTC)

pytestmark = pytest.mark.django_db(transaction=True)


def fire_as_a_ticker():
    """Fire on a connection that waits for no lock for long, as consumers do."""
    databases.of("default").prepare_dispatcher(connections["default"], 1)
    return firing.fire_due(using="default")


def failed(held):
    return decide(Outcome(claim=held, duration=0.1, error=ValueError("no")), max_rescues=3)


def started(schedule, job):
    (row,) = firing._insert([firing._row(job, Occurrence(schedule.pk, None))], "default")
    ScheduleModel.objects.filter(pk=schedule.pk).update(**firing._started(1))
    return row


# --- one and the others


def test_an_error_of_the_database_while_a_call_is_made_is_that_schedule_s_own(caplog):
    broken, other = every(60, name="a"), every(60, name="b")
    late(broken, 5), late(other, 5)
    made, make = [], Job.row

    def row(job):
        made.append(job)
        if len(made) == 1:
            with connection.cursor() as cursor:
                cursor.execute("SELECT no_such_column FROM firefly_jobs_taskmodel")
        return make(job)

    with mock.patch.object(Job, "row", row):
        assert fire() == 1

    assert read(broken, "failure_count", "run_count", "last_status") == (1, 1, "failed")
    assert read(other, "failure_count", "run_count") == (0, 1)
    assert "Schedule a could not start its call" in caplog.text


@pytest.mark.server
def test_a_unique_key_in_an_open_transaction_is_not_waited_for():
    # InnoDB may close the gap in front of a key: that behind another one, and not where rows
    # without a key go.
    tasks.nothing.job.with_unique_key("a").schedule()
    job = tasks.nothing.job.with_unique_key("k")
    keyed, plain = every(60, job, name="keyed"), every(60, name="plain")
    moment = late(keyed, 10)
    late(plain, 5)

    with transaction.atomic():
        job.schedule()
        fired = Concurrent(fire_as_a_ticker).result()

    assert (fired.calls, fired.unknown, fired.held) == (1, frozenset(), {keyed.pk})
    assert read(keyed, "next_run", "run_count") == (moment, 0)
    assert agenda(besides=fired.held)[0] > 0
    TaskModel.objects.filter(unique_key="k").delete()
    assert fire_as_a_ticker().calls == 1


@pytest.mark.server
def test_a_consumer_starts_while_a_key_that_is_due_is_held():
    job = tasks.nothing.job.with_unique_key("k")
    late(every(60, job), 5)
    other = tasks.insert.schedule("other")

    with transaction.atomic():
        job.schedule()
        with consuming() as consumer:
            eventually(lambda: Concurrent(other.refresh_from_db).result(), timeout_seconds=1)
            Concurrent(other.wait, 20).result(timeout_seconds=25)
            consumer.stop()


def test_a_look_at_what_is_deleted_meanwhile_finds_nothing():
    schedule = every(60)
    late(schedule, 5)
    pk = schedule.pk
    ScheduleModel.objects.all().delete()
    with transaction.atomic():
        assert firing._fire(pk, "default") == 0
    assert agenda() == (None, frozenset())


def test_all_that_was_missed_cannot_be_left_out_while_the_first_of_it_runs():
    with pytest.raises(ValueError, match='Choose overlap="queue"'):
        every(60, misfire="all")
    schedule = every(60)
    with pytest.raises(ValidationError, match="Choose overlap"):
        schedule.change(misfire="all")


# --- people


def test_an_object_that_was_read_before_a_firing_moves_nothing_back():
    schedule = every(60, overlap="allow")
    late(schedule, 5)
    mine = ScheduleModel.objects.get(pk=schedule.pk)
    assert fire() == 1

    mine.jitter = 1.0
    mine.save()

    assert fire() == 0
    assert read(schedule, "jitter", "run_count", "active_count") == (1.0, 1, 1)
    mine.every = 0.5
    with pytest.raises(ValidationError):
        mine.save()
    mine.every = 30
    mine.save(update_fields=["every"])
    assert read(schedule, "next_run") <= datetime.now(UTC) + timedelta(seconds=31)


@pytest.mark.parametrize("changes", [{"jitter": 3.0}, {"max_runs": 100}, {"misfire": "once"}, {}])
def test_a_change_that_is_not_about_when_leaves_due_what_is_due(changes):
    schedule = every(60, misfire="all", overlap="allow")
    late(schedule, 5 * 60 + 5)
    schedule.change(**changes)
    assert fire() == (1 if "misfire" in changes else 6)


def test_an_end_that_comes_earlier_ends_it_and_a_later_one_lets_it_go_on():
    schedule = every(60)
    schedule.change(ends_at=schedule.next_run - timedelta(seconds=1))
    assert schedule.next_run is None
    schedule.change(ends_at=None)
    assert schedule.upcoming(1) > [datetime.now(UTC)]


def test_what_is_broken_can_be_paused():
    schedule = ScheduleModel.objects.create(name="s", func_name=tasks.nothing.name, every=60)
    ScheduleModel.objects.filter(pk=schedule.pk).update(arguments={"args": [1, 2, 3]})
    schedule.refresh_from_db()

    schedule.pause()

    assert read(schedule, "is_paused", "next_run") == (True, None)
    schedule.save()
    with pytest.raises(ValidationError, match="arguments"):
        schedule.resume()


def test_a_result_can_be_read_after_another_function_was_chosen():
    schedule = ScheduleModel.objects.create(
        name="s", func_name=tasks.insert.name, arguments={"args": ["k"]}, every=60
    )
    schedule.run_now()
    run_burst()
    result = Effect.objects.get().pk
    assert (read(schedule, "last_func_name"), schedule.last_result) == (tasks.insert.name, result)
    schedule.change(func_name=tasks.nothing.name, arguments={})
    assert schedule.last_result == result


def test_a_task_of_another_database_is_refused():
    task = registry.find(tasks.nothing.name)
    elsewhere = task.options.using(database="other")
    schedule = ScheduleModel(name="s", func_name=task.name, every=60)
    with (
        mock.patch.object(task, "options", elsewhere),
        pytest.raises(ValidationError, match="database 'other'"),
    ):
        schedule.save()
    schedule = every(60)
    late(schedule, 5)
    with mock.patch.object(task, "options", elsewhere):
        ScheduleModel.objects.update(raw_call="", func_name=task.name)
        assert fire() == 0
    assert "database 'other'" in read(schedule, "last_error")
    assert not TaskModel.objects.exists()


# --- counts


@pytest.mark.server
@pytest.mark.parametrize("group", [False, True])
def test_a_call_that_repeats_reads_completes_although_its_schedule_moves_on(group):
    began = []

    def body():
        Effect.objects.create(task_key="x", value=1)
        began.append(1)
        Concurrent(move_on).result()

    def move_on():
        late(schedule, 5)
        fire()

    with repeatable_reads():
        schedule = every(60, call_of(body))
        schedule.run_now()
        run_burst(group_commit=group)

        assert (len(began), Effect.objects.count()) == (1, 1)
        assert TaskModel.objects.get().status == "completed"
        assert read(schedule, "success_count", "active_count", "run_count") == (1, 0, 1)
        assert TaskModel.objects.get().next_gate is None


@pytest.mark.server
def test_a_count_that_a_dead_process_owes_is_made_up_for():
    schedule = every(60, tasks.insert.job.with_args("a"))
    with repeatable_reads(), mock.patch.object(tallies, "_count_later"):
        schedule.run_now()
        run_burst()
    assert read(schedule, "success_count", "active_count") == (0, 1)

    tallies.sweep(using="default")

    assert read(schedule, "success_count", "active_count", "operation") == (1, 0, "idle")
    assert schedule.last_result == Effect.objects.get().pk
    tallies.sweep(using="default")
    assert read(schedule, "success_count") == 1


@pytest.mark.server
def test_ends_and_retries_of_several_schedules_lock_them_in_one_order():
    a, b = (every(60, name=name, overlap="allow") for name in "ab")
    retried, fails = tasks.nothing.job.with_max_retries(3), tasks.nothing.job
    rows = [started(s, job) for s, job in ((a, fails), (b, retried), (b, fails), (a, retried))]
    held = {item.id: item for item in claim()}
    first, second, third, fourth = (failed(held[row.pk]) for row in rows)
    barrier, count = threading.Barrier(2, timeout=2), tallies.count

    def counting(found, **words):
        count(list(found), **words)
        # Both have all their locks by now, or one of them waits for the other.
        with suppress(threading.BrokenBarrierError):
            barrier.wait()

    with mock.patch.object(tallies, "count", counting):
        others = [
            Concurrent(lambda pair=pair: lifecycle.settle_many(pair, using="default", consumer=1))
            for pair in ([first, second], [third, fourth])
        ]
        assert [len(other.result(timeout_seconds=30)) for other in others] == [2, 2]
    assert read(a, "failure_count", "retry_count", "active_count") == (1, 1, 1)


@pytest.mark.server
def test_who_revives_a_call_and_the_end_of_the_one_that_has_its_key_meet_in_no_deadlock():
    schedule = every(60, tasks.nothing.job.with_unique_key("k"), overlap="allow")
    first = schedule.run_now()
    assert first.cancel()
    second = schedule.run_now()
    (held,) = claim()
    assert held.id == second.pk
    is_written, is_counting = threading.Event(), threading.Event()
    follow, count_revived = consequences.follow, tallies.count_revived

    def following(*args, **words):
        is_written.set()
        is_counting.wait(2)
        follow(*args, **words)

    def counting(*args, **words):
        count_revived(*args, **words)
        is_counting.set()

    def retry():
        assert is_written.wait(10)
        return lifecycle.retry([first.pk], using="default")

    with (
        mock.patch.object(lifecycle, "follow", following),
        mock.patch.object(tallies, "count_revived", counting),
    ):
        settling = Concurrent(lambda: lifecycle.settle(failed(held), using="default", consumer=1))
        assert Concurrent(retry).result(timeout_seconds=30) == 1
        settling.result(timeout_seconds=30)
    assert read(schedule, "failure_count", "active_count") == (1, 1)


def test_a_sweep_that_looks_while_one_ends_and_another_starts_counts_that():
    schedule = every(60)
    first, active = schedule.run_now(), tallies.active
    looks = []

    def looking(pk, *, using):
        looks.append(pk)
        if len(looks) == 1:
            assert first.cancel()
        found = active(pk, using=using)
        if len(looks) == 1:
            schedule.run_now()
        return found

    with mock.patch.object(tallies, "active", looking):
        tallies.sweep(using="default")
    assert len(looks) == 2
    assert read(schedule, "active_count", "operation") == (1, "running")


# --- declarations


def ticking(consumer=1):
    return Ticker(using="default", owner=lambda: consumer, on_fired=lambda: None)


def started_consumer():
    return ConsumerModel.objects.create(name="c", queues="default", lease_seconds=30.0)


@pytest.fixture
def version(declare):
    """Let the process be of one of two versions of the code, and synchronise as a consumer."""

    def become(number, consumer):
        declarations._declarations.clear()
        declare("report", cron="0 3 * * *" if number == 1 else "0 4 * * *", timezone="UTC")
        if number == 2:
            declare("new", every=60.0)
        else:
            declare("old", every=60.0)
        return syncing.sync(using="default", consumer=consumer and consumer.pk)

    return become


def test_the_old_code_holds_until_its_last_consumer_has_gone(version):
    old, new = started_consumer(), started_consumer()
    assert version(1, old).created == ["old", "report"]

    assert not any(version(2, new))
    late_one = started_consumer()
    assert not any(version(1, late_one))
    old.delete()
    assert not any(version(1, late_one))
    assert version(2, new) == (["new"], ["report"], ["old"])
    assert not any(version(1, late_one))

    rows = {row.name: (row.cron, row.is_retired) for row in ScheduleModel.objects.all()}
    assert rows == {"new": ("", False), "old": ("", True), "report": ("0 4 * * *", False)}
    # A person's command asks nobody.
    assert version(1, None).retired == ["new"]


def test_a_deploy_that_changes_how_and_not_when_leaves_due_what_is_due(declare):
    declare(every=60.0, misfire="all", overlap="allow")
    syncing.sync(using="default")
    late(ScheduleModel.objects.get(), 5 * 60 + 5)
    declare(every=60.0, misfire="all", overlap="allow", jitter=3.0)
    assert syncing.sync(using="default").changed == ["nightly"]
    assert fire() == 6


def test_one_that_cannot_be_written_keeps_the_others_from_nothing(declare, caplog):
    declare("a", tasks.insert.job, every=60.0)
    declare("b", every=60.0)
    assert syncing.sync(using="default").created == ["a", "b"]
    assert "Cannot run" in ScheduleModel.objects.get(name="a").last_error
    assert "Schedule a does not fit its call" in caplog.text

    declare("c", every=60.0)
    declare("d", every=60.0)
    insert = syncing._insert

    def failing(declaration, using):
        if declaration.name == "c":
            message = "no"
            raise ValueError(message)
        return insert(declaration, using)

    with mock.patch.object(syncing, "_insert", failing):
        assert syncing.sync(using="default").created == ["d"]
        syncing.sync(using="default")
    complaint = "Schedule c could not be brought in step with the code: no"
    assert caplog.text.count(complaint) == 1


def test_a_sync_that_fails_is_tried_again(declare):
    declare(every=60.0)
    sync, tries = syncing.sync, []

    def failing(**words):
        tries.append(1)
        if len(tries) == 1:
            message = "database is locked"
            raise OperationalError(message)
        return sync(**words)

    with mock.patch.object(syncing, "sync", failing), consuming():
        eventually(ScheduleModel.objects.get)
    assert len(tries) == 2


def test_a_name_of_another_project_is_left_to_it_while_that_runs(declare, jobs, caplog):
    theirs = started_consumer()
    declare("cleanup", every=60.0)
    jobs(SCHEDULE_OWNER="shop")
    syncing.sync(using="default", consumer=theirs.pk)
    row = ScheduleModel.objects.get()
    late(row, 5)

    jobs(SCHEDULE_OWNER="blog")
    declare("cleanup", every=3600.0)
    assert not any(syncing.sync(using="default", consumer=started_consumer().pk))
    assert "is declared by project shop as well" in caplog.text
    assert fire() == 0
    with pytest.raises(ScheduleError):
        row.run_now()

    theirs.delete()
    assert syncing.sync(using="default").changed == ["cleanup"]
    assert read(row, "owner", "every") == ("blog", 3600.0)


def test_a_function_that_was_moved_keeps_its_row(declare):
    declare("shop.old.report", every=60.0)
    syncing.sync(using="default")
    row = ScheduleModel.objects.get()
    row.run_now()
    row.pause()
    declarations._declarations.clear()
    declare("shop.new.report", every=60.0, former_names=("shop.older", "shop.old.report"))

    syncing.sync(using="default")

    assert read(row, "name", "is_paused", "run_count") == ("shop.new.report", True, 1)
    assert ScheduleModel.objects.count() == 1
    assert not any(syncing.sync(using="default"))


def test_what_code_and_a_person_say_together_may_leave_no_plan(declare, caplog):
    declare(every=60.0)
    syncing.sync(using="default")
    row = ScheduleModel.objects.get()
    row.change(ends_at=NOW + timedelta(days=1))
    declare(every=60.0, starts_at=NOW + timedelta(days=2))

    syncing.sync(using="default")

    assert read(row, "next_run", "last_error")[0] is None
    assert "before it starts" in row.last_error
    row.change(ends_at=None)
    assert read(row, "next_run") is not None
    assert row.last_error == ""


def test_a_person_and_the_code_do_not_share_in_when_it_recurs(declare):
    declare(every=60.0)
    syncing.sync(using="default")
    row = ScheduleModel.objects.get()
    row.change(every=600)

    declare(cron="0 3 * * *", timezone="UTC")
    syncing.sync(using="default")
    assert read(row, "cron", "timezone", "every") == ("", "", 600)
    assert row.next_run is not None

    # Who says the same as the code follows it again.
    row.change(cron="0 3 * * *", timezone="UTC", every=None)
    declare(every=30.0)
    syncing.sync(using="default")
    assert read(row, "cron", "timezone", "every") == ("", "", 30)


def test_one_that_was_refused_is_saved_once_it_is_mended():
    row = ScheduleModel(name="s", func_name=tasks.nothing.name, every=60, arguments={"args": [1]})
    with pytest.raises(ValidationError):
        row.save()
    row.arguments = None
    row.save()
    assert ScheduleModel.objects.get().next_run is not None


# --- what queues


def test_what_was_missed_is_told_from_what_had_to_wait():
    schedule = every(60, overlap="queue")
    schedule.run_now()
    moment = late(schedule, 12 * 60 + 5)
    # Somebody saw the first two wait; then nobody was there.
    seen = moment + timedelta(seconds=65)
    ScheduleModel.objects.update(waited_until=seen)

    for _ in range(5):
        ScheduleModel.objects.update(active_count=0)
        fire()

    found = schedule.tasks.filter(is_manual=False).order_by("occurrence")
    wanted = [moment + timedelta(minutes=n) for n in (0, 1, 12)]
    assert [task.occurrence for task in found] == wanted


def test_a_consumer_that_looks_notes_what_waits():
    schedule = every(60, overlap="queue")
    schedule.run_now()
    late(schedule, 5)
    ticking().look()
    assert read(schedule, "waited_until") >= schedule.next_run


def test_that_it_waits_is_written_once_for_each_occurrence():
    schedule = every(60, overlap="queue")
    late(schedule, 5)
    fire()
    late(schedule, 5)
    firing.note_waiting([schedule.pk], using="default")
    first = read(schedule, "waited_until")
    firing.note_waiting([schedule.pk], using="default")
    assert read(schedule, "waited_until") == first >= schedule.next_run


# --- the thread


def test_only_what_queues_is_looked_at_when_a_call_ends():
    plain, queueing = every(60, name="plain"), every(60, name="queueing", overlap="queue")
    for schedule in (plain, queueing):
        schedule.run_now()
    late(queueing, 5)
    ticker = ticking()
    assert 0 < ticker.look() <= 1
    held = {item.schedule: item for item in claim()}

    ticker.ended(held[plain.pk])
    assert not ticker._bell.is_set()
    ticker.ended(held[queueing.pk])
    assert ticker._bell.is_set()


def test_what_is_held_or_unknown_is_left_alone_for_a_while(caplog):
    schedule = every(60)
    late(schedule, 5)
    ScheduleModel.objects.update(raw_call="", func_name="else.where")
    ticker = ticking()
    assert ticker.look() < 1
    assert ticker.look() > 1
    assert caplog.text.count("is due, and its call is not known here") == 1


def test_a_burst_runs_what_was_due_when_it_began():
    schedule = every(60, tasks.insert.job.with_args("a"), misfire="all", overlap="allow")
    late(schedule, 5 * 60 + 5)
    run_burst()
    assert Effect.objects.count() == len(occurrences(schedule)) == 6


def test_a_row_without_a_plan_is_none():
    schedule = recurring_job("by hand", tasks.nothing)
    assert agenda() == (None, frozenset())
    assert schedule.run_now().is_manual
