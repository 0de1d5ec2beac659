"""Schedules fire each occurrence once, count what became of it, and follow their code."""

import threading
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest
from django.core.exceptions import ValidationError
from django.db import DatabaseError, connection, transaction

from firefly_jobs import Workflow, current_task, declarations, firing, lifecycle, syncing, tallies
from firefly_jobs.exceptions import Retry, ScheduleError
from firefly_jobs.models import ScheduleModel, TaskModel, WorkflowModel
from firefly_jobs.recurring_jobs import recurring_job
from firefly_jobs.ticker import Ticker
from tests.conformance import tasks
from tests.conformance.schedule_support import (
    agenda,
    call_of,
    every,
    fire,
    late,
    occurrences,
    read,
)
from tests.conformance.support import outside, run_burst
from tests.support.clocks import database_clock
from tests.support.threads import Concurrent
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

HOUR = 3_600


# --- firing


def test_a_schedule_is_due_an_interval_after_it_was_made():
    schedule = every(60)
    assert schedule.next_run == schedule.created + timedelta(seconds=60)
    assert fire() == 0


def test_an_occurrence_fires_once_and_its_end_is_counted():
    schedule = every(60, tasks.insert.job.with_args("a"))
    moment = late(schedule, 5)

    assert (fire(), fire()) == (1, 0)

    task = TaskModel.objects.get()
    assert (task.schedule, task.occurrence, task.not_before) == (schedule, moment, moment)
    assert task.is_manual is False
    assert read(schedule, "next_run") == moment + timedelta(seconds=60)
    assert read(schedule, "operation", "run_count", "active_count") == ("running", 1, 1)
    assert schedule.last_run is not None
    run_burst()
    assert read(schedule, "operation", "success_count", "active_count") == ("idle", 1, 0)
    assert (schedule.last_status, schedule.last_result) == ("completed", Effect.objects.get().pk)


def test_what_a_rolled_back_firing_has_done_is_done_again():
    schedule = every(60)
    moment = late(schedule, 5)
    with mock.patch.object(firing, "reach", side_effect=DatabaseError("gone")):
        fired = firing.fire_due(using="default")
    assert (fired.calls, set(fired.held), fired.error) == (0, {schedule.pk}, None)
    assert (TaskModel.objects.count(), read(schedule, "next_run", "run_count")) == (0, (moment, 0))
    assert fire() == 1


def test_many_who_look_at_the_same_moment_fire_each_occurrence_once():
    schedules = [every(60, name=f"s{n}", misfire="all", overlap="allow") for n in range(20)]
    for schedule in schedules:
        late(schedule, 5 * 60 + 5)
    barrier = threading.Barrier(4)

    def consumer():
        barrier.wait(20)
        ticker = Ticker(using="default", owner=lambda: 1, on_fired=lambda: None)
        # At most one turn for each that another has locked, and a few in vain.
        for _ in range(200):
            if ticker.look() > 1:
                return

    for other in [Concurrent(consumer) for _ in range(4)]:
        other.result(timeout_seconds=60)

    for schedule in schedules:
        found = occurrences(schedule)
        assert len(found) == len(set(found)) == 6
        assert read(schedule, "run_count", "active_count") == (6, 6)


def test_a_schedule_that_somebody_has_locked_keeps_the_others_from_nothing():
    locked, other = every(60, name="locked"), every(60, name="other")
    late(locked, 5), late(other, 5)

    with transaction.atomic():
        ScheduleModel.objects.filter(pk=locked.pk).update(jitter=0)
        if connection.features.has_select_for_update_skip_locked:
            assert outside(fire) == 1
    assert fire() == (1 if connection.features.has_select_for_update_skip_locked else 2)


def test_a_call_that_cannot_be_made_counts_as_failed_and_keeps_the_others_from_nothing(caplog):
    broken, other = every(60, name="a"), every(60, name="b")
    late(broken, 5), late(other, 5)
    ScheduleModel.objects.filter(pk=broken.pk).update(arguments={"args": [1, 2, 3]})

    assert fire() == 1

    assert read(broken, "failure_count", "run_count", "last_status") == (1, 1, "failed")
    assert "TypeError" in broken.last_result
    assert broken.next_run > datetime.now(UTC)
    assert "Schedule a could not start its call" in caplog.text


def test_a_call_that_is_not_known_here_is_left_to_others():
    schedule = every(60)
    moment = late(schedule, 5)
    ScheduleModel.objects.filter(pk=schedule.pk).update(raw_call="", func_name="else.where")

    fired = firing.fire_due(using="default")

    assert (fired.calls, set(fired.unknown)) == (0, {schedule.pk})
    assert read(schedule, "next_run") == moment
    assert agenda(besides=fired.unknown) == (None, frozenset())


def test_a_row_that_cannot_be_read_keeps_the_others_from_nothing(caplog):
    broken, other = every(60, name="a"), every(60, name="b")
    late(broken, 5), late(other, 5)
    ScheduleModel.objects.filter(pk=broken.pk).update(every=None, cron="x", timezone="UTC")

    fired = firing.fire_due(using="default")

    assert (fired.calls, set(fired.unknown)) == (1, {broken.pk})
    assert "Schedule a cannot be read here" in caplog.text
    ScheduleModel.objects.filter(pk=broken.pk).update(cron="", timezone="")
    assert set(firing.fire_due(using="default").unknown) == {broken.pk}


def test_a_unique_key_that_is_taken_leaves_an_occurrence_out():
    schedule = every(60, tasks.nothing.job.with_unique_key("k"), overlap="allow", misfire="all")
    late(schedule, 65)
    assert fire() == 1
    late(schedule, 5)
    assert fire() == 0
    assert read(schedule, "run_count", "active_count") == (1, 1)


def test_what_a_taken_key_leaves_out_is_none_of_the_runs_that_there_may_be():
    job = tasks.nothing.job.with_unique_key("k")
    schedule = every(60, job, overlap="allow", max_runs=2)
    for number in (1, 1):
        late(schedule, 5)
        fire()
        assert read(schedule, "run_count") == number
    assert schedule.next_run is not None
    run_burst()
    late(schedule, 5)
    fire()
    assert read(schedule, "run_count", "next_run") == (2, None)


# --- missed


@pytest.mark.parametrize(
    ("misfire", "missed", "expected"),
    [
        ("once", 10, [0]),
        ("skip", 10, [0]),
        ("all", 10, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        ("all", 0, [0]),
    ],
)
def test_missed_occurrences(misfire, missed, expected):
    schedule = every(HOUR, misfire=misfire, overlap="allow")
    first = late(schedule, missed * HOUR + 5)

    fire()

    wanted = [first + timedelta(hours=missed - ago) for ago in expected]
    assert occurrences(schedule) == wanted
    assert read(schedule, "next_run") == first + timedelta(hours=missed + 1)


def test_what_is_missed_by_more_than_a_minute_is_skipped():
    schedule = every(HOUR, misfire="skip")
    first = late(schedule, 10 * HOUR + 120)
    assert fire() == 0
    assert read(schedule, "next_run") == first + timedelta(hours=11)


def test_thousands_of_missed_occurrences_are_made_up_for_in_portions():
    schedule = every(60, misfire="all", overlap="allow")
    late(schedule, 60 * 1_500 + 5)

    assert [fire() for _ in range(3)] == [1_000, 501, 0]
    assert len(set(occurrences(schedule))) == 1_501


# --- overlaps


def test_an_occurrence_is_left_out_while_a_former_one_has_not_ended():
    schedule = every(60, overlap="skip")
    late(schedule, 5)
    assert fire() == 1
    late(schedule, 65)
    assert fire() == 0
    run_burst()
    late(schedule, 5)
    assert fire() == 1


def test_an_occurrence_waits_for_the_former_one_and_none_is_lost():
    schedule = every(60, overlap="queue")
    late(schedule, 5)
    assert fire() == 1
    late(schedule, 125)
    assert fire() == 0
    assert agenda() == (None, frozenset({schedule.pk}))
    firing.note_waiting([schedule.pk], using="default")
    while read(schedule, "success_count") < 4:
        # Its end lets the next one go, though that is not the latest that was missed.
        fire()
        assert read(schedule, "active_count") == 1
        run_burst()
    assert len(set(occurrences(schedule))) == read(schedule, "run_count") == 4


def test_occurrences_that_may_overlap_do():
    schedule = every(60, overlap="allow")
    for number in (1, 2):
        late(schedule, 5)
        assert fire() == 1
        assert read(schedule, "active_count") == number


# --- ends and counts


def test_it_ends_after_so_many_runs_and_runs_by_hand_do_not_count():
    schedule = every(60, max_runs=2, overlap="allow", misfire="all")
    schedule.run_now()
    late(schedule, 10 * 60)

    assert fire() == 2

    assert read(schedule, "next_run", "run_count", "manual_count") == (None, 3, 1)
    assert schedule.upcoming() == []
    schedule.change(max_runs=3)
    assert len(schedule.upcoming()) == 1


def test_it_runs_between_its_start_and_its_end_both_included():
    start = datetime(2030, 1, 1, tzinfo=UTC)
    schedule = every(HOUR, starts_at=start, ends_at=start + timedelta(hours=2))
    assert schedule.upcoming() == [start + timedelta(hours=n) for n in range(3)]


def test_an_end_in_the_past_is_no_run():
    schedule = every(HOUR, ends_at=datetime(2020, 1, 1, tzinfo=UTC))
    assert (schedule.next_run, schedule.upcoming()) == (None, [])


def test_failures_and_retries_are_counted():
    def body():
        if current_task().attempt < 3:
            raise Retry(0)
        message = "at last"
        raise RuntimeError(message)

    schedule = every(60, call_of(body).with_max_retries(2))
    late(schedule, 5)
    fire()
    run_burst()

    assert read(schedule, "retry_count", "failure_count", "run_count") == (2, 1, 1)
    assert (schedule.operation, schedule.last_status) == ("idle", "failed")
    assert schedule.last_result == "RuntimeError: at last"


def test_a_call_that_is_cancelled_or_revived_is_counted():
    schedule = every(60)
    late(schedule, 5)
    fire()
    task = schedule.tasks.get()

    assert task.cancel()
    assert read(schedule, "operation", "active_count", "last_status") == ("idle", 0, "cancelled")
    assert task.retry_now()
    assert read(schedule, "operation", "active_count") == ("running", 1)
    run_burst()
    assert read(schedule, "operation", "success_count", "failure_count") == ("idle", 1, 0)


def test_a_call_of_a_consumer_that_died_is_counted_once(jobs):
    schedule = every(60)
    late(schedule, 5)
    fire()
    (claim,) = lifecycle.claim(using="default", consumer=7, queue="default", priority=0, limit=5)
    assert claim.schedule == schedule.pk
    lifecycle.release([claim], using="default")
    assert read(schedule, "active_count") == 1
    run_burst()
    assert read(schedule, "active_count", "success_count") == (0, 1)


def test_rows_that_were_deleted_past_us_are_found_by_the_sweep():
    schedule = every(60, overlap="allow", misfire="all")
    late(schedule, 65)
    fire()
    TaskModel.objects.filter(pk=schedule.tasks.last().pk).delete()

    tallies.sweep(using="default")
    assert read(schedule, "active_count", "operation") == (1, "running")
    TaskModel.objects.all().delete()
    tallies.sweep(using="default")
    assert read(schedule, "active_count", "operation") == (0, "idle")


def test_a_call_knows_its_schedule():
    seen = []
    schedule = every(60, call_of(lambda: seen.append(current_task().schedule)))
    schedule.run_now()
    run_burst()
    assert seen == [schedule]


def test_rows_are_found_by_their_schedule():
    def body():
        assert list(TaskModel.objects.active_for(schedule)) == [schedule.tasks.get()]

    schedule = every(60, call_of(body))
    row = schedule.run_now()
    run_burst()
    assert read(schedule, "last_status") == "completed"
    assert TaskModel.objects.lookup(row.pk) == (row, schedule)


# --- by hand


def test_a_run_by_hand_moves_nothing():
    schedule = every(60)
    before = schedule.next_run

    row = schedule.run_now()

    assert (row.is_manual, row.occurrence, row.not_before) == (True, None, None)
    assert read(schedule, "next_run", "run_count", "manual_count") == (before, 1, 1)
    run_burst()
    assert read(schedule, "success_count") == 1


def test_a_schedule_without_a_plan_runs_by_hand_only():
    schedule = recurring_job("by hand", tasks.nothing)
    assert (schedule.recurrence, schedule.next_run) == (None, None)
    schedule.run_now()
    run_burst()
    assert read(schedule, "success_count") == 1


def test_a_paused_one_makes_up_for_nothing():
    schedule = every(60, misfire="all", overlap="allow")
    schedule.pause()
    assert (schedule.next_run, schedule.upcoming()) == (None, [])
    assert fire() == 0
    schedule.resume()
    assert schedule.next_run > datetime.now(UTC)


def test_changes_are_checked_and_plan_anew():
    schedule = every(HOUR, tasks.insert.job.with_args("a"))
    schedule.change(every=10)
    assert schedule.next_run <= datetime.now(UTC) + timedelta(seconds=11)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"every": 0}, "every"),
        ({"every": None, "cron": "0 0 30 2 *"}, "cron"),
        ({"every": None, "cron": "@never"}, "cron"),
        ({"every": None, "cron": "* * * * *", "timezone": "Europe/Olso"}, "timezone"),
        ({"arguments": {"args": []}}, "arguments"),
        ({"arguments": [1]}, "arguments"),
        ({"max_runs": 0}, "max_runs"),
        ({"jitter": -1}, "jitter"),
    ]
    for changes, field in cases:
        with pytest.raises(ValidationError) as caught:
            schedule.change(**changes)
        assert field in caught.value.message_dict
    with pytest.raises(TypeError, match="next_run cannot be changed"):
        schedule.change(next_run=None)
    assert read(schedule, "every", "cron", "arguments") == (10, "", None)


def test_one_that_a_person_makes_calls_a_registered_task_with_json():
    row = ScheduleModel(
        name="made", func_name=tasks.insert.name, every=60, arguments={"kwargs": {"key": "made"}}
    )
    row.save()
    assert row.next_run is not None
    row.run_now()
    run_burst()
    assert Effect.objects.get().task_key == "made"

    for func_name, key in (("os.system", "key"), (tasks.insert.name, "keys")):
        with pytest.raises(ValidationError):
            ScheduleModel.objects.create(
                name="wrong", func_name=func_name, every=60, arguments={"kwargs": {key: 1}}
            )
    assert ScheduleModel.objects.count() == 1


def test_names_are_unique():
    every(60)
    with pytest.raises(ValueError, match="There is a schedule 'often' already"):
        every(30)


# --- workflows


def test_a_workflow_gives_a_run_for_each_occurrence():
    workflow = Workflow("nightly")
    first = workflow.add(tasks.insert.job.with_args("first"))
    workflow.add(tasks.insert.job.with_args("second"), depends_on=first)
    schedule = recurring_job("flow", workflow, every=60, misfire="all", overlap="allow")
    moment = late(schedule, 65)

    assert fire() == 2
    assert read(schedule, "active_count", "operation") == (2, "running")
    run_burst()

    runs = WorkflowModel.objects.filter(schedule=schedule).order_by("occurrence")
    assert [run.status for run in runs] == ["completed"] * 2
    assert [run.occurrence for run in runs] == [moment, moment + timedelta(seconds=60)]
    assert read(schedule, "success_count", "active_count") == (2, 0)
    assert Effect.objects.count() == 4


def test_a_workflow_that_fails_counts_and_counts_again_when_it_is_run_again():
    def body():
        if not Effect.objects.exists():
            message = "not yet"
            raise RuntimeError(message)

    workflow = Workflow("fails")
    workflow.add(call_of(body))
    schedule = recurring_job("flow", workflow, every=60)
    run = schedule.run_now()
    run_burst()
    assert read(schedule, "failure_count", "operation") == (1, "idle")
    assert "RuntimeError" in schedule.last_result
    Effect.objects.create(task_key="now", value=1)

    assert run.retry_failed() == 1
    assert read(schedule, "operation", "active_count") == ("running", 1)
    run_burst()
    assert read(schedule, "success_count", "operation", "active_count") == (1, "idle", 0)


def test_jitter_puts_off_the_first_steps_of_a_workflow():
    workflow = Workflow("nightly")
    first = workflow.add(tasks.insert.job.with_args("first"))
    own = datetime(2040, 1, 1, tzinfo=UTC)
    workflow.add(tasks.insert.job.with_args("own").with_eta(own), name="own")
    workflow.add(tasks.insert.job.with_args("second"), depends_on=first, name="second")
    schedule = recurring_job("flow", workflow, every=HOUR, jitter=600)
    moment = late(schedule, 5)
    assert fire() == 1

    due = {task.step.name: task.not_before for task in TaskModel.objects.all()}

    assert moment < due["insert"] < moment + timedelta(seconds=600)
    assert (due["own"], due["second"]) == (own, None)


def test_what_is_made_at_run_time_may_have_functions_among_its_options():
    job = tasks.keyed_by_function.job.with_args("a").with_priority(7)
    schedule = every(60, job)
    row = schedule.run_now()
    assert (row.unique_key, row.priority) == ("key of a", 7)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        ({"max_runs": 2**31}, "max_runs"),
        ({"starts_at": datetime(1, 1, 1, tzinfo=UTC)}, "starts_at"),
        ({"ends_at": datetime(9999, 12, 31, tzinfo=UTC)}, "ends_at"),
        ({"name": "a\0b"}, "name"),
        ({"name": "\ud800"}, "name"),
        ({"name": ""}, "name"),
    ],
)
def test_what_no_database_could_hold_is_refused_when_it_is_declared(words, field):
    words = {"name": "s", **words}
    with pytest.raises(ValueError, match=f", {field}: "):
        every(60, **words)
    assert not ScheduleModel.objects.exists()


@pytest.mark.parametrize("value", [float("nan"), "\0", "\ud800", float("inf")])
def test_arguments_that_no_database_could_hold_are_refused(value):
    with pytest.raises(ValidationError) as caught:
        ScheduleModel.objects.create(
            name="s", func_name=tasks.insert.name, arguments={"args": [value]}
        )
    assert set(caught.value.message_dict) == {"arguments"}


# --- declared


def test_declarations_become_rows_once(declare):
    declare(every=60.0, max_runs=7)

    assert syncing.sync(using="default").created == ["nightly"]
    assert not any(syncing.sync(using="default"))

    row = ScheduleModel.objects.get()
    assert (row.every, row.max_runs, row.owner) == (60.0, 7, "testproject")
    assert row.next_run is not None
    late(row, 5)
    assert fire() == 1
    declarations._declarations.clear()
    with pytest.raises(ScheduleError, match="its call is not known here"):
        row.run_now()


def test_a_row_follows_its_code_but_for_what_a_person_has_changed(declare):
    declare(every=60.0, jitter=1.0)
    syncing.sync(using="default")
    row = ScheduleModel.objects.get()
    row.change(every=600, is_paused=True)

    declare(every=120.0, jitter=2.0)
    assert syncing.sync(using="default").changed == ["nightly"]

    assert read(row, "every", "jitter", "is_paused", "next_run") == (600, 2.0, True, None)
    # What a person has set back follows again.
    row.change(every=120)
    declare(every=30.0, jitter=2.0)
    syncing.sync(using="default")
    assert read(row, "every") == 30


def test_a_row_whose_declaration_has_gone_is_retired_and_comes_back(declare):
    declare(every=60.0)
    every(60, name="made at run time")
    syncing.sync(using="default")
    row = ScheduleModel.objects.get(name="nightly")
    ScheduleModel.objects.create(name="theirs", func_name=tasks.nothing.name, owner="theirs")
    declarations._declarations.clear()

    assert syncing.sync(using="default").retired == ["nightly"]
    assert not any(syncing.sync(using="default"))

    assert read(row, "is_retired", "next_run") == (True, None)
    with pytest.raises(ScheduleError, match="its declaration has gone"):
        row.run_now()
    assert ScheduleModel.objects.filter(is_retired=True).count() == 1
    declare(every=60.0)
    assert syncing.sync(using="default").changed == ["nightly"]
    assert read(row, "is_retired") is False
    assert row.upcoming(1) > [datetime.now(UTC)]


def test_many_consumers_that_start_at_once_write_each_row_once(declare):
    for n in range(10):
        declare(f"s{n}", every=60.0)
    barrier = threading.Barrier(4)

    def start():
        barrier.wait(20)
        return len(syncing.sync(using="default").created)

    others = [Concurrent(start) for _ in range(4)]
    assert sum(other.result(timeout_seconds=30) for other in others) == 10
    assert ScheduleModel.objects.count() == 10


def test_arguments_that_do_not_fit_any_more_are_told(declare, caplog):
    declare(call=tasks.insert.job.with_args("a"), every=60.0)
    syncing.sync(using="default")
    row = ScheduleModel.objects.get()
    row.change(arguments={"args": ["b", 2]})

    declare(call=tasks.nothing.job, every=60.0)
    syncing.sync(using="default")

    assert "nightly does not fit its call any more" in caplog.text
    assert "Cannot run" in read(row, "last_error")


def test_a_consumer_writes_and_fires_what_is_declared(declare):
    declare(call=tasks.insert.job.with_args("a"), every=60.0)
    run_burst()
    row = ScheduleModel.objects.get()
    late(row, 5)
    run_burst()
    assert Effect.objects.count() == 1
    assert read(row, "success_count") == 1


# --- clocks


@pytest.mark.parametrize(("misfire", "expected"), [("once", 1), ("skip", 0), ("all", 24)])
def test_after_a_day_without_a_consumer_it_catches_up_as_it_is_told(misfire, expected):
    schedule = every(HOUR, misfire=misfire, overlap="allow")
    first = schedule.next_run
    with database_clock(connection, first + timedelta(hours=23, minutes=30)):
        assert fire() == expected
        assert fire() == 0
    assert read(schedule, "next_run") == first + timedelta(hours=24)
    assert len(set(occurrences(schedule))) == expected


def test_a_clock_that_jumps_back_fires_nothing_twice():
    schedule = every(HOUR, overlap="allow", misfire="all")
    first = schedule.next_run
    with database_clock(connection, first + timedelta(hours=2)):
        assert fire() == 3
    with database_clock(connection, first):
        assert fire() == 0
        assert agenda()[0] == 3 * HOUR
    with database_clock(connection, first + timedelta(hours=3, seconds=1)):
        assert fire() == 1
    assert occurrences(schedule) == [first + timedelta(hours=n) for n in range(4)]
