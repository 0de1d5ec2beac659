"""Effects and completion are one commit, by whatever way the effects were written."""

import threading
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import connection, connections, transaction

from firefly_jobs import current_task
from firefly_jobs.models import TaskModel
from tests.conformance.support import (
    EFFECTS,
    TABLE,
    Watch,
    effects,
    impatient_connections,
    outcomes,
    outside,
    query,
    run_burst,
    run_until_ended,
    schedule,
    status_seen_outside,
)
from tests.conftest import VENDOR
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

# CURRENT_TIMESTAMP is understood everywhere, though not as UTC; nobody reads it here.
INSERT = (
    f"INSERT INTO {EFFECTS} (task_key, value, note, created) "
    "VALUES ('raw', %d, '', CURRENT_TIMESTAMP)"
)


def create():
    Effect.objects.create(task_key="orm", value=current_task().id)


def raw_cursor():
    connection.ensure_connection()
    cursor = connection.connection.cursor()
    cursor.execute(INSERT % current_task().id)
    cursor.close()


def copy():
    with (
        connection.cursor() as cursor,
        cursor.copy(f"COPY {EFFECTS} (task_key, value, note, created) FROM STDIN") as sink,
    ):
        sink.write_row(("copied", current_task().id, "", "2026-01-01 00:00+00"))


def callproc():
    with connection.cursor() as cursor:
        cursor.callproc("conformance_insert", [current_task().id])


@contextmanager
def stored_procedure():
    """Let the database have a procedure that inserts one effect."""
    body = INSERT.replace("%d", "given")
    kind = "FUNCTION" if VENDOR == "postgresql" else "PROCEDURE"
    create = {
        "postgresql": "CREATE FUNCTION conformance_insert(given int) RETURNS void "
        f"LANGUAGE sql AS $$ {body} $$",
        "mysql": f"CREATE PROCEDURE conformance_insert(IN given INT) {body}",
    }[VENDOR]
    query(connection, f"DROP {kind} IF EXISTS conformance_insert")
    query(connection, create)
    try:
        yield
    finally:
        query(connection, f"DROP {kind} conformance_insert")


def pytest_generate_tests(metafunc):
    """Leave out the ways that a database does not have."""
    if "way" not in metafunc.fixturenames:
        return
    ways = [
        create,
        raw_cursor,
        pytest.param(copy, marks=pytest.mark.postgresql),
        pytest.param(callproc, marks=[pytest.mark.postgresql, pytest.mark.mysql]),
    ]
    metafunc.parametrize("way", ways, ids=["orm", "raw cursor", "COPY", "callproc"])


@pytest.fixture
def way_exists(way):
    """What ``way`` needs in the database."""
    if way is not callproc:
        yield
        return
    with stored_procedure():
        yield


# --- all or nothing


def test_a_task_that_fails_leaves_none_of_its_rows(way, way_exists):
    def body():
        way()
        way()
        raise ValueError("no")

    row = schedule(body)
    run_burst()

    row.refresh_from_db()
    assert row.status == "failed"
    assert effects() == []


def test_a_task_that_completes_has_all_of_its_rows(way, way_exists):
    def body():
        way()
        way()

    row = schedule(body)
    run_burst()

    row.refresh_from_db()
    assert row.status == "completed"
    assert effects() == [row.pk, row.pk]


def test_a_failure_does_not_take_the_effects_of_its_neighbours_along(way, way_exists):
    def body(fails):
        way()
        if fails:
            raise ValueError("no")

    rows = [schedule(body, number % 2) for number in range(10)]
    run_burst()

    assert effects() == [row.pk for row in rows[::2]]


def test_effects_and_completion_become_visible_in_one_commit(way, way_exists):
    for _ in range(40):
        schedule(way)

    with Watch() as watch:
        run_burst()

    assert watch.violations == []
    assert TaskModel.objects.filter(status="completed").count() == 40
    assert len(effects()) == 40


def test_200_tasks_are_never_seen_half_done():
    def body(number):
        Effect.objects.create(task_key="first", value=current_task().id)
        Effect.objects.create(task_key="second", value=current_task().id)
        if number % 4 == 3:
            raise ValueError("every fourth fails")

    for number in range(200):
        schedule(body, number)

    with Watch(expected=2) as watch:
        run_burst()

    assert watch.violations == []
    assert watch.looks > 5
    assert TaskModel.objects.filter(status="completed").count() == 150
    assert TaskModel.objects.filter(status="failed").count() == 50
    assert Effect.objects.count() == 300


@pytest.mark.postgresql
def test_the_completion_carries_the_transaction_id_of_the_effects():
    with stored_procedure():
        rows = [schedule(way) for way in (create, raw_cursor, copy, callproc)]
        run_burst()

    completions = query(connection, f"SELECT id, xmin FROM {TABLE} ORDER BY id")
    assert [task_id for task_id, _ in completions] == [row.pk for row in rows]
    assert query(connection, f"SELECT value, xmin FROM {EFFECTS} ORDER BY value") == completions


def test_a_write_that_waited_for_nobody_is_committed_before_the_next_call(way, way_exists):
    seen = []

    def look(previous):
        def count() -> int:
            return Effect.objects.filter(value=previous).count()

        seen.append((outside(count), status_seen_outside(TaskModel(pk=previous))))

    for _ in range(10):
        row = schedule(way)
        schedule(look, row.pk)
    run_burst()

    assert seen == [(1, "completed")] * 10


# --- what passes no cursor of Django's


def test_a_raw_read_leaves_no_snapshot_to_the_next_call():
    counts = []

    def read():
        connection.ensure_connection()
        cursor = connection.connection.cursor()
        cursor.execute(f"SELECT COUNT(*) FROM {EFFECTS}")
        cursor.fetchall()
        cursor.close()

    def write():
        outside(lambda: Effect.objects.create(task_key="meanwhile", value=0))
        counts.append(Effect.objects.count())
        Effect.objects.create(task_key="mine", value=1)

    rows = [schedule(body) for body in (read, write) * 5]
    run_until_ended(*rows)

    assert [row.status for row in rows] == ["completed"] * 10
    # SQLite: if another connection commits between the raw read and the outcome, the read
    # has to be repeated; what writes afterwards never does.
    reads, writes = rows[::2], rows[1::2]
    assert {ended for row in reads for ended in outcomes(row)} <= {"lost"}
    assert [outcomes(row) for row in writes] == [[]] * 5
    assert counts == [1, 3, 5, 7, 9]


@pytest.mark.sqlite
@pytest.mark.postgresql
def test_raw_ddl_is_committed_with_its_task_and_not_with_the_next():
    def create_table():
        connection.ensure_connection()
        connection.connection.cursor().execute("CREATE TABLE conformance_made (id int)")

    # Patience would only make a consumer that waits for itself wait for longer.
    with impatient_connections():
        row = schedule(create_table)
        try:
            run_until_ended(row, timeout_seconds=5)

            assert (row.status, outcomes(row)) == ("completed", [])
            assert "conformance_made" in connection.introspection.table_names()
        finally:
            query(connection, "DROP TABLE IF EXISTS conformance_made")


# --- other databases, and callbacks


def test_a_task_that_wrote_to_another_alias_is_settled_before_the_next_call_starts():
    seen = []

    def write_elsewhere():
        Effect.objects.using("other").create(task_key="elsewhere", value=current_task().id)

    def look(previous):
        seen.append(status_seen_outside(TaskModel(pk=previous)))

    for _ in range(20):
        row = schedule(write_elsewhere)
        schedule(look, row.pk)
    run_burst()

    assert seen == ["completed"] * 20
    assert Effect.objects.using("other").count() == 20


def test_a_failed_task_leaves_nothing_on_its_own_alias_whatever_it_wrote_to_another():
    def body():
        Effect.objects.create(task_key="here", value=1)
        Effect.objects.using("other").create(task_key="there", value=1)
        raise ValueError("effects elsewhere are at-least-once")

    row = schedule(body)
    run_burst()

    row.refresh_from_db()
    assert row.status == "failed"
    assert effects() == []
    assert Effect.objects.using("other").count() == 1


def test_a_task_that_only_registers_on_commit_is_settled_before_its_callback_runs():
    seen = []

    def body():
        row = TaskModel(pk=current_task().id)
        transaction.on_commit(
            lambda: seen.append((status_seen_outside(row), connection.in_atomic_block))
        )

    for _ in range(20):
        schedule(body)
    run_burst()

    assert seen == [("completed", False)] * 20


def test_effects_of_a_callback_are_committed_by_themselves():
    def body():
        transaction.on_commit(lambda: Effect.objects.create(task_key="after", value=5))

    row = schedule(body)
    run_burst()

    row.refresh_from_db()
    assert row.status == "completed"
    assert outside(effects) == [5]


def test_rows_scheduled_by_a_task_belong_to_its_transaction():
    started = threading.Event()

    def child():
        started.set()

    def body(fails):
        schedule(child)
        assert outside(TaskModel.objects.filter(status="created").count) == 0
        if fails:
            raise ValueError("no")

    schedule(body, True)
    run_burst()
    assert not started.is_set()

    schedule(body, False)
    run_burst()
    assert started.is_set()


def test_a_large_result_and_falsy_results_come_back_as_they_were():
    values: list[Any] = [None, 0, False, "", [], {}, "x" * 100_000, (1, 2)]

    rows = [schedule(lambda_returning(value)) for value in values]
    run_burst()

    assert [TaskModel.objects.get(pk=row.pk).returned for row in rows] == values


def lambda_returning(value):
    def body():
        return value

    return body


def test_connections_of_a_finished_consumer_are_closed():
    before = threading.active_count()
    schedule(create)
    run_burst()

    assert threading.active_count() == before
    assert connections["default"].connection is None
