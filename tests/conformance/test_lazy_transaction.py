"""To the call it is ``atomic()``; to the database it is nothing until the first query."""

import sys
import threading

import pytest
from asgiref.sync import sync_to_async
from django.db import DatabaseError, IntegrityError, OperationalError, connection, transaction

from firefly_jobs.models import TaskModel
from tests.conformance.support import (
    EFFECTS,
    consuming,
    deadlock,
    effects,
    holds_transaction,
    outcomes,
    outside,
    prepare_deadlock,
    query,
    run_burst,
    run_one,
    run_until_ended,
    schedule,
    second_connection,
    session_id,
    status_seen_outside,
    undone,
)
from tests.conftest import VENDOR
from tests.support.waiting import eventually
from tests.testapp.models import Effect, Seat, Ticket

pytestmark = pytest.mark.django_db(transaction=True)


def create(value=1):
    return Effect.objects.create(task_key="lazy", value=value)


# --- before the first query


def test_the_block_is_entered_before_the_first_query():
    assert run_one(lambda_of(lambda: connection.in_atomic_block)).returned is True


def lambda_of(function):
    def body():
        return function()

    return body


class Waiting:
    """A task that tells when it has got somewhere and waits there until it may go on."""

    def __init__(self, *, queries):
        self.queries = queries
        self.is_there = threading.Event()
        self.may_go_on = threading.Event()
        self.session = 0

    def __call__(self):
        connection.ensure_connection()
        if VENDOR != "sqlite":
            self.session = session_id(connection)
        if self.queries:
            create()
        self.is_there.set()
        assert self.may_go_on.wait(20)

    __name__ = "waiting"


@pytest.fixture(params=["idle", "has queried"])
def waiting(request):
    # Not the first one on its connection, since hardly any call is.
    schedule(create)
    task = Waiting(queries=request.param == "has queried")
    row = schedule(task)
    with consuming():
        try:
            assert task.is_there.wait(20)
            yield task
        finally:
            task.may_go_on.set()
        eventually(lambda: check_completed(row))


def check_completed(row):
    row.refresh_from_db()
    assert row.status == "completed", row.error


@pytest.mark.sqlite
def test_others_can_write_on_sqlite_exactly_until_the_task_has_queried(waiting):
    with second_connection(timeout_seconds=0.5 if waiting.queries else 10) as other:
        statement = f"UPDATE {EFFECTS} SET note = 'other'"
        if waiting.queries:
            with pytest.raises(OperationalError, match="locked"):
                query(other, statement)
        else:
            query(other, statement)


@pytest.mark.postgresql
@pytest.mark.mysql
def test_the_server_sees_a_transaction_exactly_once_the_task_has_queried(waiting):
    def check():
        assert holds_transaction(waiting.session) == waiting.queries

    # information_schema.innodb_trx is a copy that may be a tenth of a second old.
    eventually(check)


def test_a_task_that_never_queries_lets_others_write_all_the_time():
    def body():
        for _ in range(20):
            outside(create)

    assert run_one(body).status == "completed"
    assert len(effects()) == 20


def test_the_first_query_may_be_select_for_update():
    effect = create()

    def body():
        return Effect.objects.select_for_update().get(pk=effect.pk).value

    assert run_one(body).returned == 1


def test_select_for_update_works_after_other_queries():
    effect = create()

    def body():
        create(2)
        Effect.objects.select_for_update().filter(pk=effect.pk).update(value=3)

    assert run_one(body).status == "completed"
    assert effects() == [3, 2]


def test_the_first_query_may_be_a_nested_atomic():
    def body():
        with transaction.atomic():
            create(1)

    assert run_one(body).status == "completed"
    assert effects() == [1]


def test_a_savepoint_that_is_rolled_back_takes_only_its_own_effects():
    def body():
        create(1)
        with pytest.raises(LookupError):
            undone(lambda: create(2))
        create(3)

    assert run_one(body).status == "completed"
    assert effects() == [1, 3]


def test_a_durable_block_is_refused_inside_a_task():
    def body():
        with transaction.atomic(durable=True):
            create()

    row = run_one(body)

    assert row.status == "failed"
    assert "durable" in row.error
    assert effects() == []


def test_the_task_reads_what_was_committed_before_its_first_query():
    def body():
        outside(create)
        return Effect.objects.count()

    assert run_one(body).returned == 1


# --- on_commit


def test_on_commit_runs_after_the_commit_in_autocommit_mode():
    seen = []

    def body():
        create(1)
        transaction.on_commit(lambda: seen.append((outside(effects), connection.in_atomic_block)))
        assert seen == []

    run_one(body)

    assert seen == [([1], False)]


def test_on_commit_does_not_run_after_a_failure():
    seen = []

    def body():
        transaction.on_commit(lambda: seen.append("callback"))
        create()
        raise ValueError("no")

    assert run_one(body).status == "failed"
    assert seen == []


def test_on_commit_of_a_rolled_back_savepoint_does_not_run():
    seen = []

    def body():
        transaction.on_commit(lambda: seen.append("outer"))
        with pytest.raises(LookupError):
            undone(lambda: transaction.on_commit(lambda: seen.append("inner")))

    assert run_one(body).status == "completed"
    assert seen == ["outer"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_raising_callback_changes_no_outcome_and_stops_no_other_callback(error, caplog):
    seen = []

    def fail():
        raise error("callback")

    def body():
        create(1)
        transaction.on_commit(lambda: seen.append("first"))
        transaction.on_commit(fail)
        transaction.on_commit(lambda: seen.append("last"))

    row, after = schedule(body), schedule(create, 2)
    run_burst()

    for item in (row, after):
        item.refresh_from_db()
        assert (item.status, outcomes(item)) == ("completed", [])
    assert seen == ["first", "last"]
    assert effects() == [1, 2]
    assert "on_commit callback" in caplog.text


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_shutdown_that_interrupts_calls_does_not_stop_callbacks_of_committed_ones(is_async):
    seen, has_committed, may_go_on = [], threading.Event(), threading.Event()

    def first():
        has_committed.set()
        assert may_go_on.wait(20)
        seen.append("first")

    def body():
        create(1)
        transaction.on_commit(first)
        transaction.on_commit(lambda: seen.append("last"))

    async def abody():
        await sync_to_async(body)()

    row = schedule(abody if is_async else body)
    with consuming(shutdown_timeout=0.0) as consumer:
        assert has_committed.wait(20)
        consumer.stop()
        # The lane is told to interrupt its call while the first callback runs.
        consumer._slots.interrupt()
        may_go_on.set()

    row.refresh_from_db()
    assert row.status == "completed"
    assert seen == ["first", "last"]


def test_a_callback_may_open_a_transaction_and_schedule():
    def body():
        transaction.on_commit(callback)

    def callback():
        with transaction.atomic(durable=True):
            create(1)
            schedule(create, 2)

    run_one(body)

    assert effects() == [1, 2]


# --- nothing leaks from one call to the next


def spoil_on_commit():
    transaction.on_commit(lambda: create(99))
    raise ValueError("callback is dropped")


def spoil_set_rollback():
    transaction.set_rollback(True)


def spoil_set_rollback_and_raise():
    transaction.set_rollback(True)
    raise ValueError("marked")


def spoil_inner_block():
    transaction.atomic().__enter__()


def spoil_inner_block_after_writing():
    create(98)
    transaction.atomic().__enter__()


def spoil_inner_block_without_savepoint():
    transaction.atomic(savepoint=False).__enter__()


def spoil_inner_block_and_raise():
    transaction.atomic().__enter__()
    raise ValueError("left open")


def spoil_inner_block_without_savepoint_and_raise():
    transaction.atomic(savepoint=False).__enter__()
    raise ValueError("left open")


def spoil_close():
    connection.close()


def spoil_close_after_writing():
    create(97)
    connection.close()


def spoil_swallowed_error():
    try:
        query(connection, "SELECT nonsense FROM nowhere")
    except DatabaseError:
        return


def spoil_raw_rollback():
    create(96)
    connection.connection.rollback()


def spoil_raw_commit():
    create(95)
    connection.connection.commit()


def spoil_exit():
    create(94)
    sys.exit(3)


SPOILERS = [value for name, value in sorted(globals().items()) if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_no_state_leaks_to_the_next_call(spoil):
    states = []

    def look():
        states.append(
            {
                "in_atomic_block": connection.in_atomic_block,
                "needs_rollback": connection.needs_rollback,
                "run_on_commit": list(connection.run_on_commit),
                "savepoint_ids": list(connection.savepoint_ids),
                "atomic_blocks": len(connection.atomic_blocks),
                "closed_in_transaction": connection.closed_in_transaction,
            }
        )
        with transaction.atomic():
            create(1)
        create(2)

    rows = [schedule(body) for body in (look, spoil, look, spoil, look)]
    run_burst(max_tasks=5)

    clean = {
        "in_atomic_block": True,
        "needs_rollback": False,
        "run_on_commit": [],
        "savepoint_ids": [],
        "atomic_blocks": 1,
        "closed_in_transaction": False,
    }
    assert states == [clean] * 3
    for row in rows[::2]:
        row.refresh_from_db()
        assert (row.status, outcomes(row)) == ("completed", []), row.error
    assert [value for value in effects() if value < 90] == [1, 2] * 3


def test_an_untouched_transaction_is_handed_on_by_20_calls():
    sessions = []

    def body():
        sessions.append((id(connection.connection), connection.in_atomic_block))

    for _ in range(20):
        schedule(body)
    run_burst()

    assert len(set(sessions)) == 1
    assert len(sessions) == 20


# --- doomed transactions are failures


def assert_failed_without_effects(row, words):
    row.refresh_from_db()
    assert (row.status, outcomes(row), row.rescues) == ("failed", ["failed"], 0), row.error
    assert words in row.error
    assert effects() == []


def test_set_rollback_fails_the_task():
    def body():
        create()
        transaction.set_rollback(True)

    assert_failed_without_effects(run_one(body), "rollback")


def test_set_rollback_without_a_query_fails_the_task():
    def body():
        transaction.set_rollback(True)

    assert_failed_without_effects(run_one(body), "rollback")


def test_a_swallowed_integrity_error_fails_the_task_clearly():
    def body():
        effect = create()
        try:
            Effect(pk=effect.pk).save(force_insert=True)
        except IntegrityError:
            return

    assert_failed_without_effects(run_one(body), "atomic()")


def test_an_integrity_error_caught_around_an_inner_block_harms_nobody():
    def body():
        effect = create()
        try:
            with transaction.atomic():
                Effect(pk=effect.pk).save(force_insert=True)
        except IntegrityError:
            create(2)

    assert run_one(body).status == "completed"
    assert effects() == [1, 2]


def test_a_task_that_closes_its_connection_after_writing_fails_clearly():
    def body():
        create()
        connection.close()

    assert_failed_without_effects(run_one(body), "closed")


def test_a_task_that_closes_its_connection_before_any_query_is_not_run_again():
    calls = []

    def body():
        calls.append(1)
        connection.close()

    row = schedule(body)
    run_until_ended(row)

    assert len(calls) == 1
    assert outcomes(row) == ["failed"]


def test_a_task_that_rolls_back_behind_djangos_back_fails():
    def body():
        create()
        connection.connection.rollback()

    row = run_one(body)

    assert row.status == "failed"
    assert effects() == []


def test_a_violated_foreign_key_fails_the_task_at_commit_at_the_latest():
    def body():
        create()
        Ticket.objects.create(effect_id=999_999)

    assert_failed_without_effects(run_one(body), "IntegrityError")
    assert not Ticket.objects.exists()


@pytest.mark.postgresql
def test_a_unique_constraint_that_waits_for_the_commit_fails_the_task_there():
    seen = []

    def body():
        create()
        Seat.objects.create(number=1)
        Seat.objects.create(number=1)
        transaction.on_commit(lambda: seen.append("callback"))

    assert_failed_without_effects(run_one(body), "IntegrityError")
    assert seen == []
    assert not Seat.objects.exists()


def test_a_result_that_cannot_be_stored_fails_the_task_and_takes_its_effects():
    def body():
        create()
        return threading.Lock()

    row = run_one(body)

    assert row.status == "failed"
    assert effects() == []


@pytest.mark.mysql
def test_a_caught_deadlock_fails_the_task_since_its_effects_are_gone():
    mine, theirs = prepare_deadlock()

    def body():
        create()
        with pytest.raises(OperationalError):
            deadlock(mine, theirs)

    row = run_one(body)

    assert (row.status, outcomes(row)) == ("failed", ["failed"])
    assert "rolled back" in row.error
    assert not Effect.objects.filter(task_key="lazy").exists()


@pytest.mark.mysql
def test_a_deadlock_caught_around_an_inner_block_fails_the_task_as_well():
    mine, theirs = prepare_deadlock()

    def body():
        create()
        try:
            with transaction.atomic():
                deadlock(mine, theirs)
        except DatabaseError:
            return

    row = run_one(body)

    assert (row.status, outcomes(row)) == ("failed", ["failed"])
    assert not Effect.objects.filter(task_key="lazy").exists()


@pytest.mark.mysql
def test_effects_after_a_caught_deadlock_are_not_kept_either():
    mine, theirs = prepare_deadlock()

    def body():
        with pytest.raises(OperationalError):
            deadlock(mine, theirs)
        create()

    row = run_one(body)

    assert (row.status, outcomes(row)) == ("failed", ["failed"])
    assert not Effect.objects.filter(task_key="lazy").exists()


@pytest.mark.postgresql
def test_a_deadlock_caught_around_an_inner_block_leaves_the_rest_on_postgresql():
    mine, theirs = prepare_deadlock()

    def body():
        create()
        try:
            with transaction.atomic():
                deadlock(mine, theirs)
        except OperationalError:
            return

    assert run_one(body).status == "completed"
    assert Effect.objects.filter(task_key="lazy").count() == 1


# Harmless where they are executed after all.
DDL = [
    "CREATE TABLE IF NOT EXISTS testapp_ticket (id int)",
    "create /* why not */ table if not exists testapp_ticket (id int)",
    "/* first */ ALTER TABLE testapp_ticket COMMENT 'refused'",
    "-- first\nALTER TABLE testapp_ticket COMMENT 'refused'",
    "# first\nDROP TABLE IF EXISTS conformance_missing",
    "TRUNCATE TABLE testapp_ticket",
    "LOCK TABLES testapp_effect WRITE",
    "START TRANSACTION",
    "COMMIT",
]


@pytest.mark.mysql
@pytest.mark.parametrize("statement", DDL)
def test_a_statement_that_commits_implicitly_is_refused_naming_atomic(statement):
    def body():
        create()
        query(connection, statement)

    row = run_one(body)

    assert row.status == "failed"
    assert "atomic=False" in row.error
    assert effects() == []


@pytest.mark.mysql
def test_a_temporary_table_is_not_refused():
    def body():
        query(connection, "CREATE TEMPORARY TABLE conformance_scratch (id int)")
        query(connection, "DROP TEMPORARY TABLE conformance_scratch")

    assert run_one(body).status == "completed"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, BaseException])
def test_an_exception_that_would_end_a_process_fails_only_the_task(error):
    def body():
        create(9)
        raise error("bye")

    row, after = schedule(body), schedule(create, 1)
    run_burst()

    for item in (row, after):
        item.refresh_from_db()
    assert (row.status, after.status) == ("failed", "completed")
    assert type(error()).__name__ in row.error
    assert effects() == [1]


# --- atomic=False


def test_without_atomic_the_call_runs_in_autocommit_mode():
    def body():
        create(1)
        return connection.in_atomic_block, outside(effects)

    assert run_one(body, atomic=False).returned == (False, [1])


def test_without_atomic_effects_stay_when_the_task_fails():
    def body():
        create(1)
        raise ValueError("no")

    assert run_one(body, atomic=False).status == "failed"
    assert effects() == [1]


def test_without_atomic_a_block_of_the_tasks_own_may_be_durable():
    def body():
        with transaction.atomic(durable=True):
            create(1)
            transaction.set_rollback(True)
        with transaction.atomic(durable=True):
            create(2)

    assert run_one(body, atomic=False).status == "completed"
    assert effects() == [2]


def test_without_atomic_on_commit_runs_at_once_and_its_error_is_the_tasks():
    seen = []

    def body():
        transaction.on_commit(lambda: seen.append("callback"))
        assert seen == ["callback"]

    assert run_one(body, atomic=False).status == "completed"


def test_without_atomic_the_task_is_settled_at_once():
    row = schedule(create, atomic=False)
    done = threading.Event()

    def next_one():
        eventually(lambda: check_status(row, "completed"))
        done.set()

    def check_status(item, status):
        assert status_seen_outside(item) == status

    schedule(next_one)
    run_burst()

    assert done.is_set()


def test_atomic_and_autocommit_tasks_may_alternate():
    def body():
        create(int(connection.in_atomic_block))

    for number in range(10):
        schedule(body, atomic=number % 2 == 0)
    run_burst()

    assert effects() == [1, 0] * 5
    assert TaskModel.objects.filter(status="completed").count() == 10


@pytest.mark.mysql
def test_without_atomic_ddl_is_allowed():
    def body():
        query(connection, "CREATE TABLE conformance_made (id int)")
        query(connection, "DROP TABLE conformance_made")

    assert run_one(body, atomic=False).status == "completed"


def test_without_atomic_a_closed_connection_is_no_failure():
    assert run_one(connection_close, atomic=False).status == "completed"


def connection_close():
    create()
    connection.close()


def test_a_task_that_rolls_back_and_queries_again_fails():
    def body():
        create()
        with connection.cursor() as cursor:
            cursor.execute("ROLLBACK")
        Effect.objects.count()

    assert run_one(body).status == "failed"
    assert effects() == []


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_transaction_that_a_task_without_one_left_open_is_dropped():
    def leaves_open():
        transaction.set_autocommit(False)
        create(1)
        raise ValueError("left open")

    def follows():
        create(2)

    first, second = schedule(leaves_open, atomic=False), schedule(follows)
    run_burst()

    first.refresh_from_db()
    second.refresh_from_db()
    assert (first.status, second.status) == ("failed", "completed")
    assert effects() == [2]
