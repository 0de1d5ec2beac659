"""One schedule that fails, waits or is not known keeps the others from nothing."""

import asyncio
from typing import Any
from unittest import mock

import pytest
from django.db import InterfaceError, connection, connections, transaction

from firefly_jobs import databases, enqueue, firing, job_registry, planning, registry, syncing
from firefly_jobs.exceptions import TaskNotFoundError
from firefly_jobs.models import SavedJob, ScheduleModel, TaskModel
from firefly_jobs.ticker import Ticker
from testproject.datafiles.models import DataFile, Project
from tests.conformance import tasks
from tests.conformance.schedule_support import every, fire, late, occurrences, read
from tests.conformance.support import consuming, query, run_burst, second_connection
from tests.conftest import VENDOR
from tests.support.threads import Concurrent
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)


def ask_a_database_that_is_away() -> None:
    away: Any = connections["default"].copy()
    away.settings_dict = {**away.settings_dict, "NAME": "/no/such/directory/file"}
    if VENDOR != "sqlite":
        away.settings_dict |= {"NAME": "any", "HOST": "127.0.0.1", "PORT": "1", "OPTIONS": {}}
    away.ensure_connection()


def raising(error: BaseException) -> Any:
    def fail() -> None:
        raise error

    return fail


TROUBLES: dict[str, Any] = {
    "another database is away": ask_a_database_that_is_away,
    "interface error": raising(InterfaceError("closed")),
    "sys.exit()": raising(SystemExit(3)),
    "interrupt": raising(KeyboardInterrupt()),
    "cancelled": raising(asyncio.CancelledError()),
}


def making(schedule: ScheduleModel, trouble: Any) -> Any:
    """Let the project's code, which makes the calls of one schedule, run into trouble."""
    name, make = read(schedule, "name"), planning.call_of

    def call_of(row: ScheduleModel) -> Any:
        if row.name == name:
            trouble()
        return make(row)

    return mock.patch.object(firing, "call_of", call_of)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_a_call_runs_into_while_it_is_made_is_its_own(trouble, caplog):
    broken, other = every(60, name="a"), every(60, name="b")
    late(broken, 10), late(other, 5)

    with making(broken, TROUBLES[trouble]):
        assert fire() == 1

    assert read(broken, "run_count", "failure_count", "last_status") == (1, 1, "failed")
    assert read(broken, "next_run") is not None
    assert read(other, "run_count", "failure_count") == (1, 0)
    assert "Schedule a could not start its call" in caplog.text


def test_a_call_that_closes_our_connection_is_tried_again_and_the_others_fire():
    broken, other = every(60, name="a"), every(60, name="b")
    moment = late(broken, 10)
    late(other, 5)
    ticker = Ticker(using="default", owner=lambda: 1, on_fired=lambda: None)

    with making(broken, connection.close):
        with pytest.raises(Exception):  # noqa: B017, PT011 - the driver's own, of any kind
            ticker.look()
        ticker.look()

    assert read(other, "run_count") == 1
    assert read(broken, "run_count", "next_run") == (0, moment)


def test_a_consumer_survives_what_ends_a_look():
    schedule = every(60)
    late(schedule, 5)
    looks: list[int] = []
    sync = syncing.sync

    def synced(**words: Any) -> Any:
        looks.append(1)
        if len(looks) == 1:
            raise SystemExit
        return sync(**words)

    with mock.patch.object(syncing, "sync", synced), consuming() as consumer:
        eventually(lambda: _assert_ran(schedule), timeout_seconds=20)
        consumer.stop()
    assert len(looks) > 1


def _assert_ran(schedule: ScheduleModel) -> None:
    schedule.refresh_from_db()
    assert schedule.success_count == 1


# --- not known here


@pytest.fixture
def saved(transactional_db):
    project = Project.objects.create(name="apollo")
    DataFile.objects.create(name="a", project=project)
    values: dict[str, Any] = {"task_name": "rename_files", "obj_type": "datafile"}
    values |= {"job_args": {"prefix": "x"}, "target": project, "objects": "datafiles"}
    return SavedJob.objects.create(name="rename", **values)


def test_a_saved_job_that_older_code_does_not_have_is_left_to_newer_code(saved, caplog):
    schedule = ScheduleModel.objects.create(name="s", saved_job=saved, every=60)
    moment = late(schedule, 5)

    with mock.patch.object(job_registry, "_jobs", {}):
        fired = firing.fire_due(using="default")

    assert (fired.calls, set(fired.unknown)) == (0, {schedule.pk})
    assert read(schedule, "next_run", "run_count", "failure_count") == (moment, 0, 0)
    assert fire() == 1


@pytest.mark.parametrize("what", ["task", "key"])
def test_a_stored_call_that_cannot_be_read_here_is_left_to_others(what, settings):
    schedule = every(60, tasks.insert.job.with_args("a"))
    moment = late(schedule, 5)
    former = settings.SECRET_KEY
    if what == "key":
        settings.SECRET_KEY = "of another project"
        fired = firing.fire_due(using="default")
        settings.SECRET_KEY = former
    else:
        with mock.patch.object(registry, "find", side_effect=TaskNotFoundError("no")):
            fired = firing.fire_due(using="default")

    assert (fired.calls, set(fired.unknown)) == (0, {schedule.pk})
    assert read(schedule, "next_run", "run_count", "failure_count") == (moment, 0, 0)
    assert fire() == 1


# --- locked


@pytest.mark.server
def test_those_that_are_locked_are_left_alone_for_longer_each_time(monkeypatch):
    monkeypatch.setattr("firefly_jobs.ticker._HELD_SECONDS_MIN", 1.0)
    held = [every(60, name=f"held {n}") for n in range(3)]
    free = every(60, name="free")
    moments = [late(schedule, 100) for schedule in held]
    late(free, 5)
    ticker = Ticker(using="default", owner=lambda: 1, on_fired=lambda: None)

    with second_connection() as other, mock.patch.object(firing, "BATCH_SIZE", 2):
        other.set_autocommit(False)
        table = ScheduleModel._meta.db_table
        for schedule in held:
            # One by one, or InnoDB locks whatever it reads on the way.
            query(other, f"SELECT id FROM {table} WHERE id = {schedule.pk} FOR UPDATE")
        for _ in range(3):
            ticker.look()
        assert read(free, "run_count") == 1
        pauses = []
        for _ in range(8):
            ticker._besides.clear()
            ticker.look(), ticker.look()
            pauses.append(max(ticker._held_seconds.values()))
        assert pauses == sorted(pauses)
        assert pauses[-1] == 5.0
        other.rollback()
        other.set_autocommit(True)

    assert [read(schedule, "next_run") for schedule in held] == moments
    ticker._besides.clear()
    ticker.look(), ticker.look()
    assert [read(schedule, "run_count") for schedule in held] == [1, 1, 1]
    assert ticker._held_seconds == {}


@pytest.mark.postgresql
def test_unique_keys_that_others_are_about_to_take_are_waited_for_briefly():
    job = tasks.nothing.job
    keyed = [every(60, job.with_unique_key(f"k{n}"), name=f"keyed {n}") for n in range(3)]
    moments = [late(schedule, 5) for schedule in keyed]
    timeouts: list[str] = []
    insert = enqueue.insert_many

    def insert_many(rows: Any, **words: Any) -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SHOW lock_timeout")
            timeouts.append(cursor.fetchone()[0])
        return insert(rows, **words)

    def look() -> firing.Fired:
        databases.of("default").prepare_dispatcher(connection, 1)
        with mock.patch.object(enqueue, "insert_many", insert_many):
            return firing.fire_due(using="default")

    with transaction.atomic():
        for n in range(3):
            job.with_unique_key(f"k{n}").schedule()
        fired = Concurrent(look).result()

    assert set(fired.held) == {schedule.pk for schedule in keyed}
    assert [read(schedule, "next_run") for schedule in keyed] == moments
    assert timeouts == ["20ms"] * 3


# --- what queues


def test_what_queues_is_looked_at_when_it_is_due():
    schedule = every(60, overlap="queue")
    schedule.run_now()
    back = schedule.next_run
    ticker = Ticker(using="default", owner=lambda: 1, on_fired=lambda: None)
    assert ticker.look() > 1
    late(schedule, -0.5)
    assert 0 < ticker.look() <= 0.5
    assert read(schedule, "next_run") != back


def test_a_burst_runs_one_after_the_other_what_queues():
    schedule = every(60, tasks.insert.job.with_args("a"), overlap="queue", misfire="all")
    late(schedule, 24 * 60 + 5)
    run_burst()
    assert len(occurrences(schedule)) == read(schedule, "success_count") == 25
    assert TaskModel.objects.exclude(status="completed").count() == 0
