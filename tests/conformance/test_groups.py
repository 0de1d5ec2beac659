"""Group commit: many short calls, a savepoint each, one settling and one COMMIT."""

import threading
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any
from unittest import mock

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction

from firefly_jobs import Snooze, current_task, lifecycle
from firefly_jobs.executors.groups import GROUP_SECONDS, MEMBERS_MAX
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    EFFECTS,
    TABLE,
    Watch,
    consuming,
    deadlock,
    effects,
    outcomes,
    outside,
    prepare_deadlock,
    query,
    run_burst,
    run_until_ended,
    schedule,
    second_connection,
)
from tests.conftest import VENDOR
from tests.support.waiting import eventually
from tests.testapp.models import Effect, Ticket

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

# After so many quick calls a consumer claims the next ones together and knows them as short.
WARM_UP = 80


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch):
    """Take calls for short that take their time because others use the machine as well."""
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 1.0)


def create(value=1):
    Effect.objects.create(task_key="group", value=value)


def schedule_warm_up():
    for _ in range(WARM_UP):
        schedule(lambda: None)


@contextmanager
def groups():
    """Collect the groups that are settled, as lists of task ids."""
    found = []
    settle = lifecycle.complete_group

    def collect(completions, **words):
        found.append([completion.id for completion in completions])
        settle(completions, **words)

    with mock.patch.object(lifecycle, "complete_group", collect):
        yield found


def members(found):
    """Return the ids of all tasks that were settled in groups."""
    return list(chain.from_iterable(found))


def run_as_group(*bodies, **options):
    """Run ``bodies`` so that they are claimed together; return their rows and the groups."""
    schedule_warm_up()
    rows = [schedule(body) for body in bodies]
    with groups() as found:
        run_burst(group_commit=True, **options)
    for row in rows:
        row.refresh_from_db()
    return rows, found


def statuses(rows):
    return [row.status for row in rows]


def test_short_calls_are_settled_and_committed_together():
    rows, found = run_as_group(*[lambda n=n: create(n) for n in range(30)])

    assert statuses(rows) == ["completed"] * 30
    assert effects() == list(range(30))
    assert members(found) == [row.pk for row in rows]
    assert len(found) < 10
    assert {row.returned for row in rows} == {None}


def test_effects_and_completions_of_a_group_are_never_seen_apart():
    def body():
        create(current_task().id)

    rows = [schedule(body) for _ in range(300)]
    with Watch() as watch, groups() as found:
        run_until_ended(*rows, group_commit=True)

    assert members(found)
    assert watch.looks > 0
    assert watch.violations == []
    assert sorted(effects()) == sorted(row.pk for row in rows)


def test_a_group_is_bounded_by_count_and_time():
    rows, found = run_as_group(*[create] * (3 * MEMBERS_MAX))

    assert set(statuses(rows)) == {"completed"}
    assert max(map(len, found)) <= MEMBERS_MAX

    with mock.patch("firefly_jobs.executors.groups.MEMBERS_MAX", 5):
        rows, found = run_as_group(*[create] * 40)
    assert set(statuses(rows)) == {"completed"}
    assert max(map(len, found)) == 5

    def slow():
        create()
        threading.Event().wait(GROUP_SECONDS / 4)

    Effect.objects.all().delete()
    with mock.patch("firefly_jobs.pace.SHORT_SECONDS", 10.0):
        rows, found = run_as_group(*[slow] * 12)
    assert set(statuses(rows)) == {"completed"}
    assert max(map(len, found)) <= 5


def test_only_calls_that_are_known_to_be_short_join_a_group(monkeypatch):
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 0.025)

    def long():
        create()
        threading.Event().wait(0.03)

    rows = [schedule(long) for _ in range(5)]
    with groups() as found:
        run_burst(group_commit=True)

    assert {row.status for row in TaskModel.objects.filter(pk__in=[r.pk for r in rows])} == {
        "completed"
    }
    assert found == []


def test_without_the_option_only_tasks_that_ask_for_it_join_a_group():
    for _ in range(WARM_UP):
        tasks.insert_in_groups.schedule()
    grouped = [tasks.insert_in_groups.schedule().pk for _ in range(20)]
    single = [tasks.insert.schedule("single").pk for _ in range(20)]
    with groups() as found:
        run_burst()

    assert set(members(found)) >= set(grouped)
    assert not set(members(found)) & set(single)
    assert len(effects()) == WARM_UP + 40


def test_a_call_that_touches_nothing_is_settled_apart_from_its_group():
    bodies = [create if n % 2 else (lambda: "nothing") for n in range(20)]
    rows, _ = run_as_group(*bodies)

    assert statuses(rows) == ["completed"] * 20
    assert len(effects()) == 10
    assert [row.returned for row in rows[::2]] == ["nothing"] * 10


# --- failures of one member


def raise_after_writing():
    create(-1)
    raise ValueError("no")


def write_raw_and_raise():
    connection.ensure_connection()
    connection.connection.cursor().execute(
        f"INSERT INTO {EFFECTS} (task_key, value, note, created) "
        "VALUES ('raw', -1, '', CURRENT_TIMESTAMP)"
    )
    raise ValueError("no")


def write_raw_then_by_orm_and_raise():
    connection.ensure_connection()
    connection.connection.cursor().execute(
        f"INSERT INTO {EFFECTS} (task_key, value, note, created) "
        "VALUES ('raw', -1, '', CURRENT_TIMESTAMP)"
    )
    raise_after_writing()


def mark_for_rollback():
    create(-1)
    transaction.set_rollback(True)


def swallow_an_error():
    create(-1)
    with suppress(IntegrityError):
        Effect.objects.create(pk=Effect.objects.latest("pk").pk, task_key="again", value=-1)


def exit_after_writing():
    create(-1)
    raise SystemExit


def leave_an_inner_block():
    create(-1)
    transaction.atomic().__enter__()
    create(-1)
    raise ValueError("no")


FAILURES = [
    raise_after_writing,
    write_raw_and_raise,
    write_raw_then_by_orm_and_raise,
    mark_for_rollback,
    swallow_an_error,
    exit_after_writing,
    leave_an_inner_block,
]


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("place", [0, 7, 19], ids=["first", "middle", "last"])
def test_a_member_that_fails_is_undone_alone(fail, place):
    bodies = [lambda n=n: create(n) for n in range(20)]
    bodies[place] = fail
    rows, found = run_as_group(*bodies)

    expected = ["completed"] * 20
    expected[place] = "failed"
    assert statuses(rows) == expected, [row.error for row in rows]
    assert sorted(effects()) == [n for n in range(20) if n != place]
    assert outcomes(rows[place]) == ["failed"]
    assert rows[place].pk not in members(found)


def test_a_member_that_fails_does_not_make_the_others_run_again():
    called = []

    def body(number):
        called.append(number)
        create(number)

    bodies: list[Any] = [lambda n=n: body(n) for n in range(20)]
    bodies[7] = raise_after_writing
    rows, _ = run_as_group(*bodies)

    assert statuses(rows).count("completed") == 19
    assert sorted(called) == [n for n in range(20) if n != 7]


def test_members_that_fail_in_turn_are_undone_each():
    bodies: list[Any] = [lambda n=n: create(n) for n in range(24)]
    for n in range(24):
        if n % 3:
            bodies[n] = raise_after_writing
    rows, _ = run_as_group(*bodies)

    assert statuses(rows) == ["failed" if n % 3 else "completed" for n in range(24)]
    assert effects() == [n for n in range(24) if n % 3 == 0]


def test_a_member_that_snoozes_leaves_no_effect_and_comes_again():
    def snooze():
        create(-1)
        if current_task().fence == 1:
            raise Snooze(0)

    rows, _ = run_as_group(create, snooze, create)
    run_burst(group_commit=True)

    rows[1].refresh_from_db()
    assert (rows[1].status, outcomes(rows[1])) == ("completed", ["snoozed"])
    assert sorted(effects()) == [-1, 1, 1]


def test_on_commit_callbacks_run_after_the_group_and_not_for_members_that_failed():
    seen = []

    def register(name, fails):
        def body():
            create()
            transaction.on_commit(lambda: seen.append((name, connection.in_atomic_block)))
            if fails:
                raise ValueError("no")

        return body

    run_as_group(*[register(n, fails=n % 2 == 1) for n in range(10)])

    assert seen == [(n, False) for n in range(0, 10, 2)]


@pytest.mark.parametrize(
    "how",
    [
        "statement",
        pytest.param("cursor", marks=pytest.mark.server),
        pytest.param("driver", marks=pytest.mark.server),
    ],
)
def test_a_member_must_not_commit_for_the_others(how):
    def body():
        create(-1)
        if how == "statement":
            query(connection, "COMMIT")
        elif how == "cursor":
            connection.connection.cursor().execute("COMMIT")
        else:
            connection.connection.commit()

    rows, _ = run_as_group(create, create, body, create)

    assert statuses(rows) == ["completed", "completed", "failed", "completed"]
    assert effects() == [1, 1, 1]


@pytest.mark.parametrize("how", ["statement", pytest.param("driver", marks=pytest.mark.server)])
def test_a_member_that_rolls_back_loses_nothing_of_the_others(how):
    def body():
        create(-1)
        if how == "statement":
            connection.connection.cursor().execute("ROLLBACK")
        else:
            connection.connection.rollback()

    rows, _ = run_as_group(create, create, body, create)

    assert statuses(rows) == ["completed", "completed", "failed", "completed"]
    assert effects() == [1, 1, 1]


@pytest.mark.server
@pytest.mark.parametrize("statement", ["SELECT 1; COMMIT", "SELECT 1; SELECT 2"])
def test_a_member_whose_text_may_hide_a_commit_runs_by_itself(statement):
    def body():
        with connection.cursor() as cursor:
            cursor.execute(statement)
            while cursor.nextset():
                pass

    rows, found = run_as_group(create, body, create)

    ended = "failed" if "COMMIT" in statement else "completed"
    assert statuses(rows) == ["completed", ended, "completed"]
    assert effects() == [1, 1]
    assert rows[1].pk not in members(found)
    assert {row.fence for row in rows} == {1}


def test_a_task_that_left_a_group_joins_no_other():
    called = []

    def body():
        called.append(1)
        query(connection, "COMMIT")

    rows, _ = run_as_group(create, body, body, body, create)

    assert statuses(rows) == ["completed", "failed", "failed", "failed", "completed"]
    # The first of them ran twice: in the group, and by itself.  MariaDB knows it for sure.
    assert len(called) == (3 if VENDOR == "mysql" else 4)
    assert effects() == [1, 1]


@pytest.mark.postgresql
def test_what_a_member_sets_for_its_transaction_is_not_there_for_another():
    seen = []

    def body():
        seen.append(query(connection, "SHOW application_name")[0][0])
        query(connection, "SET LOCAL application_name = 'a tenant'")
        create()

    rows, _ = run_as_group(create, body, create, body, body)

    assert statuses(rows) == ["completed"] * 5
    assert "a tenant" not in seen


@pytest.mark.postgresql
def test_a_temporary_table_of_a_member_is_not_there_for_another():
    def body():
        query(connection, "CREATE TEMPORARY TABLE draft (id int) ON COMMIT DROP")
        create()

    rows, _ = run_as_group(create, body, body, body)

    assert statuses(rows) == ["completed"] * 4
    assert effects() == [1] * 4


def test_a_member_that_fails_with_the_database_runs_again_by_itself_before_it_counts():
    called = []

    def body():
        called.append(1)
        Effect.objects.create(pk=first.pk, task_key="group", value=-1)

    first = Effect.objects.create(task_key="group", value=0)
    rows, found = run_as_group(create, body, create)

    assert statuses(rows) == ["completed", "failed", "completed"]
    assert len(called) == 2
    assert outcomes(rows[1]) == ["failed"]
    assert rows[1].pk not in members(found)


def test_a_task_may_stay_out_of_groups_whatever_the_consumer_does():
    for _ in range(WARM_UP):
        tasks.insert_by_itself.schedule("single")
    with groups() as found:
        run_burst(group_commit=True)

    assert found == []
    assert len(effects()) == WARM_UP


def test_a_group_is_closed_before_its_results_are_too_long_for_one_statement(monkeypatch):
    monkeypatch.setattr("firefly_jobs.executors.groups.STATEMENT_BYTES_MAX", 10_000)

    def body():
        create()
        return "x" * 3_000

    _, found = run_as_group(*[body] * 9)

    assert members(found)
    assert max(map(len, found)) <= 3


def test_a_member_that_closes_its_connection_loses_nothing_of_the_others():
    rows, _ = run_as_group(create, create, connection.close, create)

    assert [status for status in statuses(rows) if status != "failed"] == ["completed"] * 3
    assert effects() == [1, 1, 1]


# --- the whole group is lost


def test_a_member_whose_lease_is_lost_costs_the_others_nothing():
    schedule_warm_up()
    rows = [schedule(create, n) for n in range(6)]
    with mock.patch.object(lifecycle, "complete_group", _losing(rows)):
        run_burst(group_commit=True)

    for row in rows:
        row.refresh_from_db()
    assert statuses(rows) == ["completed"] * 6
    assert sorted(effects()) == list(range(6))
    assert {row.fence for row in rows} == {1}


@pytest.mark.server
def test_a_member_that_another_consumer_has_taken_over_is_not_called_again():
    called = []

    def body(n):
        called.append(n)
        create(n)

    def steal(completions, **words):
        stolen = TaskModel.objects.filter(pk=rows[3].pk, fence=1)
        outside(lambda: stolen.update(fence=2, consumer=None))
        settle(completions, **words)

    schedule_warm_up()
    rows = [schedule(body, n) for n in range(6)]
    settle = lifecycle.complete_group
    with mock.patch.object(lifecycle, "complete_group", steal):
        run_burst(group_commit=True)

    assert Counter(called)[3] == 1
    assert sorted(effects()) == [0, 1, 2, 4, 5]
    rows[3].refresh_from_db()
    assert rows[3].status == "running"


def _losing(rows):
    """Settle the first group with a member under a fence that is not its own."""
    settle = lifecycle.complete_group
    is_done: list[bool] = []

    def lose(completions, **words):
        if not is_done and rows[3].pk in [completion.id for completion in completions]:
            is_done.append(True)
            completions = [
                c._replace(fence=c.fence + 7) if c.id == rows[3].pk else c for c in completions
            ]
        settle(completions, **words)

    return lose


@pytest.mark.server
def test_a_member_that_was_taken_over_is_not_settled_and_leaves_nothing():
    rows: list[TaskModel] = []

    def take_away():
        create(5)
        with second_connection() as other:
            query(other, f"UPDATE {TABLE} SET fence = fence + 1 WHERE id = {rows[1].pk}")

    schedule_warm_up()
    rows += [schedule(create, n) for n in range(3)]
    last = schedule(take_away)
    run_burst(group_commit=True)

    for row in [*rows, last]:
        row.refresh_from_db()
    assert statuses([*rows, last]) == ["completed", "created", "completed", "completed"]
    assert sorted(effects()) == [0, 2, 5]


@pytest.mark.sqlite
@pytest.mark.postgresql
def test_a_commit_that_fails_makes_the_members_run_one_by_one():
    """A foreign key that leads nowhere is found at COMMIT."""
    calls = []

    def refer_to_nothing():
        calls.append(1)
        Ticket.objects.create(effect_id=999_999)

    bodies: list[Any] = [lambda n=n: create(n) for n in range(10)]
    bodies[4] = refer_to_nothing
    rows, _ = run_as_group(*bodies)

    assert statuses(rows) == ["completed"] * 4 + ["failed"] + ["completed"] * 5
    assert sorted(effects()) == [n for n in range(10) if n != 4]
    assert len(calls) == 2


@pytest.mark.server
def test_a_deadlock_in_a_group_costs_nobody_an_attempt():
    mine, theirs = prepare_deadlock()
    tries = []

    def body():
        create(7)
        tries.append(1)
        if len(tries) == 1:
            deadlock(mine, theirs)

    rows, _ = run_as_group(create, create, body, create)
    run_until_ended(*rows, group_commit=True)

    assert statuses(rows) == ["completed"] * 4
    assert {row.retry_attempts for row in rows} == {0}
    assert sorted(Effect.objects.filter(task_key="group").values_list("value", flat=True)) == [
        1,
        1,
        1,
        7,
    ]


@pytest.mark.server
@pytest.mark.parametrize("place", [0, 2], ids=["first", "later"])
def test_a_session_that_ends_amid_a_group_costs_nobody_an_attempt(place):
    tries = []

    def body():
        create(7)
        tries.append(1)
        if len(tries) == 1:
            with second_connection() as other:
                if VENDOR == "postgresql":
                    pid = connection.connection.info.backend_pid
                    query(other, "SELECT pg_terminate_backend(%s)", pid)
                else:
                    query(other, "KILL CONNECTION %s", connection.connection.thread_id())
            with pytest.raises(DatabaseError):
                create(8)
            raise ConnectionError

    bodies: list[Any] = [create] * 3
    bodies.insert(place, body)
    rows, _ = run_as_group(*bodies)
    run_until_ended(*rows, group_commit=True)

    assert statuses(rows) == ["completed"] * 4
    assert {row.retry_attempts for row in rows} == {0}
    assert sorted(effects()) == [1, 1, 1, 7]


def test_a_shutdown_amid_a_group_keeps_what_has_returned_and_gives_the_rest_back():
    is_there = threading.Event()

    def endless():
        create(-1)
        is_there.set()
        while True:
            threading.Event().wait(0.005)

    schedule_warm_up()
    rows = [schedule(create) for _ in range(3)] + [schedule(endless)]
    rows += [schedule(create) for _ in range(3)]
    with consuming(group_commit=True, shutdown_timeout=0.0):
        assert is_there.wait(20)

    def is_over():
        for row in rows:
            row.refresh_from_db()
        assert statuses(rows) == ["completed"] * 3 + ["created"] * 4

    eventually(is_over)
    assert effects() == [1, 1, 1]
    assert outcomes(rows[3]) == ["released"]
