"""What reviewers found: calls and servers that do what nobody had thought of."""

import asyncio
import contextlib
import threading
from collections import Counter
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import sync_to_async
from django.db import OperationalError, connection, connections, transaction
from django.utils import translation

from firefly_jobs import Snooze, attempts, fencing, lifecycle
from firefly_jobs.databases import Session
from firefly_jobs.executors.ending import Ending
from firefly_jobs.models import TaskModel
from firefly_jobs.pace import Durations
from firefly_jobs.transactions import CallTransaction
from tests.conformance.support import (
    Gate,
    consuming,
    effects,
    outcomes,
    query,
    run_burst,
    run_one,
    run_until_ended,
    schedule,
    second_connection,
)
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def create(value=1):
    Effect.objects.create(task_key="hard", value=value)


# --- what a call leaves behind


@pytest.mark.parametrize("options", [{}, {"group_commit": True}], ids=["single", "group"])
def test_what_a_call_sets_in_its_context_is_not_there_for_the_next(options):
    seen = []

    def body(language):
        seen.append(translation.get_language())
        if language:
            translation.activate(language)

    before = translation.get_language()
    for language in ("de", "fr", None):
        schedule(body, language)

    run_burst(**options)

    assert seen == [before] * 3


def test_an_effect_is_not_committed_if_a_call_fails_and_its_lane_breaks():
    def body():
        create()
        raise ValueError("no")

    row = schedule(body)
    with mock.patch.object(Ending, "raised", side_effect=RuntimeError("a mistake of ours")):
        assert run_burst(shutdown_timeout=0.2) == 1

    assert effects() == []
    row.refresh_from_db()
    assert row.status == "created"


# --- coroutines


@pytest.mark.parametrize("is_swallowed", [False, True])
def test_coroutine_without_a_connection_is_given_back_and_not_blamed(is_swallowed):
    enter = CallTransaction._enter
    refusals: list[int] = []

    def refuse(self):
        if threading.current_thread().name.startswith("firefly-async-lane") and len(refusals) < 4:
            refusals.append(1)
            raise OperationalError("FATAL: sorry, too many clients already")
        enter(self)

    async def body():
        with contextlib.suppress(OperationalError if is_swallowed else LookupError):
            await Effect.objects.acreate(task_key="hardship", value=1)

    row = schedule(body)
    with (
        mock.patch.object(CallTransaction, "_enter", refuse),
        mock.patch.object(attempts, "NOT_STARTED_DELAY_SECONDS", 0.2),
    ):
        run_until_ended(row)

    assert (row.status, row.rescues, row.lost_alone, row.retry_attempts) == ("completed", 0, 0, 0)
    assert (effects(), outcomes(row)) == ([1], [])


def test_no_more_coroutines_run_than_there_are_slots():
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    are_full = Gate()

    async def body():
        running["now"] += 1
        most["ever"] = max(most["ever"], running["now"])
        if running["now"] == 5:
            are_full.open()
        await are_full.wait()
        await asyncio.sleep(0.01)
        running["now"] -= 1

    rows = [schedule(body) for _ in range(40)]

    run_until_ended(*rows, async_slots=5)

    assert most["ever"] == 5


def test_a_coroutine_that_cancels_its_own_asyncio_task_fails():
    async def body():
        await sync_to_async(create)()
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        raise ValueError("no")

    row = run_one(body)

    assert row.status == "failed"
    assert effects() == []


# --- databases that say no


@pytest.mark.server
def test_what_a_task_says_itself_counts_though_a_conflict_made_it_say_so():
    with transaction.atomic():
        create()
    (locked,) = Effect.objects.all()

    def body():
        try:
            Effect.objects.select_for_update(nowait=True).get(pk=locked.pk)
        except OperationalError as error:
            raise Snooze(3600) from error

    row = schedule(body)
    with second_connection() as other:
        query(other, "BEGIN")
        query(other, f"SELECT id FROM {Effect._meta.db_table} WHERE id = {locked.pk} FOR UPDATE")
        run_burst()
        query(other, "ROLLBACK")

    row.refresh_from_db()
    assert (row.status, outcomes(row), row.rescues) == ("created", ["snoozed"], 0)


def test_a_lane_that_cannot_connect_spends_nothing_of_its_tasks():
    calls: list[int] = []
    wrapper = type(connections["default"])
    connect = wrapper.get_new_connection
    is_full = threading.Event()
    is_full.set()
    refused = threading.Event()

    def get_new_connection(self: Any, params: Any) -> Any:
        if threading.current_thread().name.startswith("firefly-lane") and is_full.is_set():
            refused.set()
            raise OperationalError("too many connections")
        return connect(self, params)

    rows = [schedule(calls.append, 1) for _ in range(3)]
    with (
        mock.patch.object(wrapper, "get_new_connection", get_new_connection),
        consuming(),
    ):
        assert refused.wait(20)

        def is_given_back() -> None:
            assert TaskModel.objects.filter(status="created", not_before__isnull=False).exists()

        eventually(is_given_back)
        is_full.clear()

        def all_completed() -> None:
            assert TaskModel.objects.filter(status="completed").count() == 3

        eventually(all_completed)

    for row in rows:
        row.refresh_from_db()
        assert (outcomes(row), row.rescues, row.retry_attempts) == ([], 0, 0)
    assert calls == [1, 1, 1]


@pytest.mark.mysql
@pytest.mark.parametrize("joins_group", [False, True], ids=["single", "group"])
def test_a_session_that_ends_before_it_is_watched_spends_nothing_of_its_task(joins_group):
    from firefly_jobs.databases.mysql import MySQLSession

    watch = MySQLSession.watch
    ended: list[int] = []

    def watch_too_late(self: Any, driver: Any) -> None:
        if not ended:
            ended.append(driver.thread_id())
            with second_connection() as other:
                query(other, "KILL CONNECTION %s", driver.thread_id())
        watch(self, driver)

    row = schedule(create)
    with (
        mock.patch.object(MySQLSession, "watch", watch_too_late),
        mock.patch.object(Durations, "are_short", return_value=True),
    ):
        run_until_ended(row, group_commit=joins_group)

    assert len(ended) == 1
    assert (row.status, outcomes(row), row.rescues, row.retry_attempts) == ("completed", [], 0, 0)
    assert effects() == [1]


@pytest.mark.mysql
def test_outcomes_that_are_too_long_for_one_statement_are_written_in_several():
    ((_, limit),) = query(connection, "SHOW VARIABLES LIKE 'max_allowed_packet'")
    size = 700_000

    async def body():
        return "x" * size

    rows = [schedule(body) for _ in range(int(limit) // size + 5)]

    run_until_ended(*rows)

    assert {row.status for row in rows} == {"completed"}


def test_an_outcome_over_which_the_connection_breaks_each_time_does_not_hold_up_others():
    complete_many, settle = lifecycle.complete_many, lifecycle.settle
    row = schedule(lambda: "too long")
    others = [schedule(lambda: "short") for _ in range(5)]

    def break_over_it(completions, **words):
        if row.pk in [completion.id for completion in completions]:
            raise OperationalError("server has gone away")
        return complete_many(completions, **words)

    def settle_what_is_left(settlement, *, using, consumer):
        if settlement.claim.id == row.pk and settlement.returned:
            raise OperationalError("server has gone away")
        settle(settlement, using=using, consumer=consumer)

    with (
        mock.patch.object(lifecycle, "complete_many", break_over_it),
        mock.patch.object(lifecycle, "settle", settle_what_is_left),
    ):
        run_until_ended(row, *others)

    assert [it.status for it in others] == ["completed"] * 5
    assert row.status == "failed"
    assert "while its outcome was stored" in row.error


@pytest.mark.server
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_callbacks_run_although_nobody_answered_at_first_whether_the_commit_arrived(
    is_async, caplog
):
    seen: list[str] = []
    was_completed, asked = fencing.was_completed, []

    def body():
        create()
        transaction.on_commit(lambda: seen.append("callback"))

    async def abody():
        await sync_to_async(body)()

    def ask(claim, *, using):
        asked.append(claim)
        if len(asked) == 1:
            raise OperationalError("refused")
        return was_completed(claim, using=using)

    row = schedule(abody if is_async else body)
    with lost_commit_answer(), mock.patch.object(fencing, "was_completed", ask):
        run_burst()

    row.refresh_from_db()
    assert (row.status, len(asked)) == ("completed", 2)
    assert effects() == [1]
    assert seen == ["callback"]
    assert f"whether the COMMIT of task {row.pk} arrived; 1 on_commit callbacks wait" in caplog.text


@contextlib.contextmanager
def lost_commit_answer():
    """Let the first COMMIT arrive, and its answer not."""
    commit = Session.commit
    is_lost: list[bool] = []

    def lose(self):
        commit(self)
        if not is_lost:
            is_lost.append(True)
            self.connection.connection.close()
            raise _connection_error()

    with mock.patch.object(Session, "commit", lose):
        yield


def _connection_error() -> Exception:
    """Return what Django raises when the connection is lost."""
    error = OperationalError("server closed the connection unexpectedly")
    if connection.vendor == "postgresql":
        import psycopg

        error.__cause__ = psycopg.OperationalError("gone")
    else:
        import MySQLdb

        error.__cause__ = MySQLdb.OperationalError(2013, "gone")
    return error


# --- tasks that have to run alone


def test_many_tasks_that_were_lost_together_do_not_keep_each_other_waiting():
    rows = [schedule(lambda: None) for _ in range(60)]
    TaskModel.objects.all().update(rescues=2)
    released = []
    release = lifecycle.release

    def count(claims, *, using):
        released.append(len(claims))
        return release(claims, using=using)

    with mock.patch.object(lifecycle, "release", count):
        run_until_ended(*rows)

    # Each was claimed by itself, once the first had shown what is coming.
    assert sum(released) < 5


# --- transactions that calls end, or leave open


@pytest.mark.server
@pytest.mark.parametrize("cursor_of", ["Django", "the driver"])
@pytest.mark.parametrize(
    "statement",
    [
        "/* quietly */ COMMIT",
        "SELECT 1; COMMIT",
        "SELECT 1; COMMIT; BEGIN",
        "ROLLBACK",
        pytest.param(b"COMMIT", marks=pytest.mark.postgresql),
        pytest.param("-- quietly\nCOMMIT", marks=pytest.mark.postgresql),
        pytest.param("CALL conformance_commits()", marks=pytest.mark.mysql),
        pytest.param("EXECUTE IMMEDIATE 'DROP TABLE IF EXISTS nothing'", marks=pytest.mark.mysql),
        pytest.param("/*!50000 DROP TABLE IF EXISTS nothing */", marks=pytest.mark.mysql),
    ],
)
def test_a_call_that_hides_the_end_of_its_transaction_is_not_completed(statement, cursor_of):
    if "CALL" in str(statement):
        query(connection, "DROP PROCEDURE IF EXISTS conformance_commits")
        query(connection, "CREATE PROCEDURE conformance_commits() COMMIT")

    def body():
        create(1)
        on = connection if cursor_of == "Django" else connection.connection
        with on.cursor() as cursor:
            cursor.execute(statement)
        create(2)

    row = run_one(body)

    assert row.status == "failed"
    assert "Transaction" in row.error or "ImplicitCommit" in row.error
    assert 2 not in effects()


@pytest.mark.postgresql
@pytest.mark.parametrize("way", ["composed", "inside", "connection"])
def test_whatever_way_a_statement_takes_to_psycopg_it_is_looked_at(way):
    from psycopg import sql

    def body():
        create(1)
        with connection.cursor() as cursor:
            if way == "composed":
                cursor.execute(sql.SQL("COMMIT"))
            elif way == "inside":
                cursor.cursor.execute("ROLLBACK")
            else:
                connection.connection.execute("COMMIT")
        create(2)

    row = run_one(body)

    assert (row.status, row.error.partition(":")[0]) == ("failed", "ImplicitCommitError")
    assert effects() == []


@pytest.mark.postgresql
@pytest.mark.parametrize("fails", [False, True])
def test_a_block_of_psycopg_is_part_of_the_calls_transaction(fails):
    def body():
        driver = connection.connection
        with driver.transaction():
            driver.execute("SELECT 1; SELECT 2")
            create(1)
        with contextlib.suppress(LookupError), driver.transaction():
            create(2)
            raise LookupError
        if fails:
            raise ValueError

    row = run_one(body)

    assert (row.status, effects()) == (("failed", []) if fails else ("completed", [1]))


@pytest.mark.server
def test_a_call_that_begins_with_a_text_of_several_statements_is_completed():
    def body():
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1; SELECT 2")
            while cursor.nextset():
                pass
        create()

    assert run_one(body).status == "completed"
    assert effects() == [1]


@pytest.mark.server
def test_a_call_that_sends_harmless_texts_of_several_statements_is_completed():
    def body():
        create(1)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1; SELECT 2")
            while cursor.nextset():
                pass
        with contextlib.suppress(LookupError), transaction.atomic():
            create(2)
            raise LookupError
        create(3)

    assert run_one(body).status == "completed"
    assert effects() == [1, 3]


@pytest.mark.mysql
@pytest.mark.parametrize(
    "statement",
    [
        "ANALYZE LOCAL TABLE testapp_effect",
        "CHECK TABLE testapp_effect",
        "SET @x = 1, autocommit = 1",
        "SET STATEMENT max_statement_time = 5 FOR DROP TABLE IF EXISTS nothing",
        "/* why not */ DROP TABLE IF EXISTS nothing",
    ],
)
def test_statements_that_would_commit_are_refused(statement):
    def body():
        create(1)
        query(connection, statement)

    row = run_one(body)

    assert (row.status, row.error.partition(":")[0]) == ("failed", "ImplicitCommitError")
    assert "/*" not in row.error
    assert effects() == []


@pytest.mark.mysql
def test_temporary_tables_are_no_end_of_a_transaction():
    def body():
        create(1)
        query(connection, "CREATE OR REPLACE TEMPORARY TABLE conformance_temporary (n INT)")
        query(connection, "DROP TEMPORARY TABLE conformance_temporary")

    assert run_one(body).status == "completed"
    assert effects() == [1]


@pytest.mark.server
def test_a_harmless_text_of_several_statements_inside_an_inner_block_dooms_nothing():
    """The end of the inner block takes every later savepoint with it, ours among them."""

    def body():
        create(1)
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1; SELECT 2")
                while cursor.nextset():
                    pass
            create(2)
        create(3)

    row = run_one(body)

    assert (row.status, row.error) == ("completed", "")
    assert effects() == [1, 2, 3]
