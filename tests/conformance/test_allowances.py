"""Limits on time and memory, as far as one process enforces them: an exception in the call.

What is left to a supervisor is in ``tests/crash/test_hard_limits.py``.
"""

import asyncio
import logging
import os
import threading
import time

import pytest
from asgiref.sync import sync_to_async
from django.db import Error, connection, connections

from firefly_jobs import Retry, current_task, registry, task
from firefly_jobs.exceptions import TimeLimitExceeded
from firefly_jobs.executors import allowances
from firefly_jobs.memory import MEGABYTE, resident_bytes
from firefly_jobs.models import ConsumerModel
from tests.conformance import tasks
from tests.conformance.support import (
    Gate,
    Watch,
    claim_one,
    consuming,
    effects,
    outcomes,
    query,
    run_burst,
    run_one,
    schedule,
)
from tests.conformance.test_groups import groups, members, schedule_warm_up
from tests.conftest import VENDOR
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

# Ample for what a body does before it waits, on a busy machine too.
LIMIT = 1
TOO_LONG = "TimeLimitExceeded: It ran for more than 1s."
# A statement that ends by itself long after the test.
LONG_QUERY = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
    "SELECT MAX(i) FROM n",
    "postgresql": "SELECT pg_sleep(100)",
    "mysql": "SELECT SLEEP(100)",
}[VENDOR]
# One that takes longer than a request to end it takes to arrive.
SHORT_QUERY = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) "
    "SELECT MAX(i) FROM n",
    "postgresql": "SELECT pg_sleep(0.3)",
    "mysql": "SELECT SLEEP(0.3)",
}[VENDOR]


def create(value=1):
    Effect.objects.create(task_key="limited", value=value)


def spin():
    while True:
        pass


def spin_for(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def query_for_long():
    query(connection, LONG_QUERY)


def failed_with(row, error):
    assert (row.status, row.error) == ("failed", error)
    assert (row.rescues, row.lost_alone) == (0, 0)
    assert outcomes(row) == ["failed"]
    return True


# --- sync calls


def test_sync_call_that_computes_for_too_long_fails_and_its_lane_goes_on():
    def body():
        create()
        spin()

    row = schedule(body, time_limit=LIMIT)
    after = schedule(lambda: create(2))
    run_burst()

    row.refresh_from_db()
    assert failed_with(row, TOO_LONG)
    (attempt,) = row.attempts.all()
    assert LIMIT <= (attempt.duration or 0) < 10
    assert "in spin" in attempt.traceback
    after.refresh_from_db()
    assert after.status == "completed"
    assert effects() == [2]


@pytest.mark.parametrize("atomic", [True, False])
def test_sync_call_is_reached_in_the_midst_of_a_query(atomic):
    def body():
        create()
        query_for_long()

    schedule(create, 0)
    row = schedule(body, atomic=atomic, time_limit=LIMIT)
    after = schedule(lambda: create(2))
    run_burst()

    row.refresh_from_db()
    assert failed_with(row, TOO_LONG)
    assert "in query_for_long" in row.attempts.get().traceback
    after.refresh_from_db()
    assert (after.status, after.rescues) == ("completed", 0)
    assert effects() == ([0, 2] if atomic else [0, 1, 2])


def test_call_that_swallows_the_exception_and_returns_is_completed(settings):
    settings.FIREFLY_JOBS = {"TIME_LIMIT_GRACE": 60}
    seen = []

    def body():
        create(1)
        try:
            spin()
        except TimeLimitExceeded as error:
            seen.append((str(error), current_task().id))
        create(2)
        return "in the end"

    row = run_one(body, time_limit=LIMIT)

    assert (row.status, row.returned, row.error) == ("completed", "in the end", "")
    assert seen == [("It ran for longer than its time_limit.", row.pk)]
    assert effects() == [1, 2]


@pytest.mark.parametrize("atomic", [True, False])
def test_queries_with_which_a_call_cleans_up_are_left_alone(settings, atomic):
    settings.FIREFLY_JOBS = {"TIME_LIMIT_GRACE": 60}

    def body():
        create(1)
        try:
            spin()
        finally:
            # Nothing ran when the limit passed, so nothing is to be ended on the server.
            query(connection, SHORT_QUERY)
            cleaned.append(True)

    cleaned: list[bool] = []
    row = run_one(body, atomic=atomic, time_limit=LIMIT)

    assert failed_with(row, TOO_LONG)
    assert cleaned == [True]


def test_call_that_swallows_the_exception_and_goes_on_is_reached_again(settings):
    settings.FIREFLY_JOBS = {"TIME_LIMIT_GRACE": 0}
    times = []

    def body():
        for _ in range(2):
            try:
                spin()
            except TimeLimitExceeded:
                times.append(time.monotonic())
        spin()

    row = run_one(body, time_limit=LIMIT)

    assert failed_with(row, TOO_LONG)
    assert times[1] - times[0] > allowances.PAUSE_SECONDS_MIN * 0.9


def test_call_has_the_grace_to_clean_up(settings):
    settings.FIREFLY_JOBS = {"TIME_LIMIT_GRACE": 60}
    cleaned = []

    def body():
        try:
            spin()
        finally:
            spin_for(2 * allowances.PAUSE_SECONDS_MIN)
            cleaned.append(True)

    row = run_one(body, time_limit=LIMIT)

    assert failed_with(row, TOO_LONG)
    assert cleaned == [True]


def test_what_a_call_raises_instead_is_what_it_failed_with():
    def translate():
        try:
            query_for_long()
        except (TimeLimitExceeded, Error) as error:
            raise LookupError from error

    row = run_one(translate, time_limit=LIMIT)

    assert failed_with(row, "LookupError")
    assert "in translate" in row.attempts.get().traceback


def test_call_may_ask_for_a_retry_when_it_is_reached():
    def body():
        try:
            query_for_long()
        except TimeLimitExceeded:
            raise Retry(0) from None

    row = run_one(body, time_limit=LIMIT, max_retries=1)

    assert row.status == "failed"
    assert outcomes(row) == ["retried", "failed"]


def test_retry_policy_sees_the_limit():
    tried = run_one(spin, time_limit=LIMIT, max_retries=1, retry_delay=0)
    wanted = schedule(
        spin, time_limit=LIMIT, max_retries=1, retry_delay=0, retry_on=(TimeLimitExceeded,)
    )
    unwanted = schedule(spin, time_limit=LIMIT, max_retries=1, retry_on=(LookupError,))
    run_burst(threads=2)

    assert outcomes(tried) == outcomes(wanted) == ["retried", "failed"]
    assert outcomes(unwanted) == ["failed"]
    assert tried.attempts.all()[0].error == TOO_LONG


def test_limit_is_that_of_its_call_only():
    rows = [schedule(create, n, time_limit=LIMIT) for n in range(20)]
    # It runs on the same lane while their limits pass.
    last = schedule(spin_for, 2 * LIMIT)
    run_burst()

    last.refresh_from_db()
    assert last.status == "completed"
    assert effects() == list(range(20))
    assert not any(outcomes(row) for row in [*rows, last])


def test_limits_that_pass_as_calls_end_hit_no_other_call():
    # Each ends about when its limit passes: some are completed, some are not.
    limited = [
        schedule(spin_for, 0.02 + 0.0005 * (n % 20 - 10), time_limit=0.02) for n in range(60)
    ]
    others = [schedule(lambda n=n: create(n)) for n in range(60)]
    with Watch(expected=0) as watch:
        run_burst(threads=2)

    assert watch.looks
    for row in limited:
        row.refresh_from_db()
        assert row.status == "completed" or row.error.startswith("TimeLimitExceeded"), row.error
        assert row.rescues == 0
    assert sorted(effects()) == list(range(60))
    assert not any(outcomes(row) for row in others)


class SlowToRead:
    def __reduce__(self):
        return spin, ()


class SlowToStore:
    def __reduce__(self):
        spin()


@pytest.mark.parametrize("serialize", ["arguments", "result"])
def test_limit_that_passes_as_values_are_read_or_stored_is_what_the_call_fails_with(serialize):
    if serialize == "arguments":
        row = schedule(len, SlowToRead(), time_limit=LIMIT)
    else:
        row = schedule(SlowToStore, time_limit=LIMIT)
    run_burst()

    row.refresh_from_db()
    assert failed_with(row, TOO_LONG)


def test_connection_of_an_interrupted_call_is_not_the_next_ones():
    used = []

    def body():
        used.append(connections["default"].connection)
        used.append(connections["other"].connection or connections["other"].cursor().connection)
        spin()

    def after():
        used.append(connections["default"].connection)
        used.append(connections["other"].connection)

    schedule(body, time_limit=LIMIT)
    schedule(after)
    run_burst()

    assert used[2] is not used[0]
    assert used[3] is None


def test_bounded_calls_join_no_group():
    schedule_warm_up()
    rows = [schedule(create, n, time_limit=60 if n % 2 else None) for n in range(20)]
    with groups() as found:
        run_burst(group_commit=True)

    # Not all of them, if some took long on this machine.
    assert members(found)
    assert set(members(found)) <= {row.pk for row in rows[::2]}
    assert sorted(effects()) == list(range(20))


def test_limit_of_a_task_that_runs_alone_holds_as_well():
    row = schedule(spin, time_limit=LIMIT)
    type(row).objects.filter(pk=row.pk).update(rescues=2)

    run_burst()

    row.refresh_from_db()
    assert (row.status, row.error) == ("failed", TOO_LONG)


def test_limits_are_claimed_with_the_row():
    schedule(create, time_limit=1.5, memory_limit="1MB")

    claim = claim_one()

    assert (claim.time_limit, claim.memory_limit, claim.is_bounded) == (1.5, MEGABYTE, True)
    schedule(create)
    assert not claim_one().is_bounded


def test_nothing_watches_calls_without_limits(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(allowances.Allowances, "begin", refuse)
    names: list[str] = []
    schedule(lambda: names.extend(thread.name for thread in threading.enumerate()))
    run_burst()

    assert "firefly-lane-1" in names
    assert "firefly-allowances" not in names


# --- coroutines


async def await_for_ever():
    await Gate().wait()


@pytest.mark.parametrize("atomic", [True, False])
def test_coroutine_that_waits_for_too_long_fails_and_its_neighbour_does_not(atomic):
    neighbour_may_end = Gate()

    async def body():
        await Effect.objects.acreate(task_key="limited", value=1)
        await await_for_ever()

    async def neighbour():
        await neighbour_may_end.wait()
        await Effect.objects.acreate(task_key="limited", value=2)

    other = schedule(neighbour)
    row = schedule(body, atomic=atomic, time_limit=LIMIT)
    with consuming():
        eventually(lambda: _has_ended(row))
        neighbour_may_end.open()
        eventually(lambda: _has_ended(other))

    assert failed_with(row, TOO_LONG)
    assert "in await_for_ever" in row.attempts.get().traceback
    assert outcomes(other) == []
    assert effects() == ([2] if atomic else [1, 2])


def _has_ended(row):
    row.refresh_from_db()
    assert row.status in {"completed", "failed"}


@pytest.mark.parametrize("atomic", [True, False])
def test_coroutine_is_reached_in_the_midst_of_a_query(atomic):
    async def body():
        await Effect.objects.acreate(task_key="limited", value=1)
        await sync_to_async(query_for_long)()

    row = schedule(body, atomic=atomic, time_limit=LIMIT)
    run_burst(async_connections=1)
    after = run_one(_acreate)

    row.refresh_from_db()
    assert failed_with(row, TOO_LONG)
    assert after.status == "completed"
    assert effects() == ([2] if atomic else [1, 2])


async def _acreate():
    await Effect.objects.acreate(task_key="limited", value=2)


def test_coroutine_that_swallows_its_cancellation_and_returns_is_completed():
    async def body():
        try:
            await await_for_ever()
        except asyncio.CancelledError:
            await Effect.objects.acreate(task_key="limited", value=1)
        return "in the end"

    row = run_one(body, time_limit=LIMIT)

    assert (row.status, row.returned, outcomes(row)) == ("completed", "in the end", [])
    assert effects() == [1]


def test_coroutine_that_cancels_itself_is_not_taken_for_one_beyond_its_limit():
    async def body():
        raise asyncio.CancelledError

    row = run_one(body, time_limit=60)

    assert failed_with(row, "CancelledError")


def test_coroutine_that_waits_for_a_connection_is_reached():
    has_begun, is_held, may_end = Gate(), Gate(), Gate()

    async def hold():
        # Not before both are claimed: on SQLite nobody can be while it has queried.
        await has_begun.wait()
        await Effect.objects.acreate(task_key="limited", value=1)
        is_held.open()
        await may_end.wait()

    async def body():
        has_begun.open()
        await is_held.wait()
        try:
            await Effect.objects.acreate(task_key="limited", value=2)
        finally:
            may_end.open()

    holder = schedule(hold)
    row = schedule(body, time_limit=LIMIT)
    run_burst(async_connections=1)

    row.refresh_from_db()
    assert failed_with(row, TOO_LONG)
    holder.refresh_from_db()
    assert holder.status == "completed"
    assert effects() == [1]


def _is_running(row):
    row.refresh_from_db()
    assert row.status == "running"


def test_many_coroutines_have_limits_of_their_own():
    late = [schedule(await_for_ever, time_limit=LIMIT) for _ in range(20)]
    timely = [schedule(tasks_pass, time_limit=60) for _ in range(20)]
    run_burst()

    for row in late:
        row.refresh_from_db()
        assert failed_with(row, TOO_LONG)
    assert not any(outcomes(row) for row in timely)


async def tasks_pass():
    await asyncio.sleep(0)


# --- stopping


def test_limit_holds_while_the_consumer_stops():
    has_begun = threading.Event()

    def body():
        has_begun.set()
        spin()

    row = schedule(body, time_limit=1)
    with consuming(shutdown_timeout=60) as consumer:
        assert has_begun.wait(20)
        consumer.stop()

    row.refresh_from_db()
    assert failed_with(row, "TimeLimitExceeded: It ran for more than 1s.")
    assert not ConsumerModel.objects.exists()


def test_shutdown_that_comes_before_the_limit_spends_nothing():
    have_begun = threading.Barrier(3)

    def body():
        have_begun.wait(20)
        spin()

    async def abody():
        have_begun.wait(20)
        await await_for_ever()

    rows = [schedule(body, time_limit=60), schedule(abody, time_limit=60)]
    with consuming(shutdown_timeout=0) as consumer:
        have_begun.wait(20)
        consumer.stop()

    for row in rows:
        row.refresh_from_db()
        assert (row.status, row.retry_attempts, row.rescues) == ("created", 0, 0)
        assert outcomes(row) == ["released"]


# --- memory


def memory_that_may_be_taken(megabytes):
    return (resident_bytes(os.getpid()) or 0) + megabytes * MEGABYTE


def take(megabytes):
    kept = [b"x" * MEGABYTE for _ in range(megabytes)]
    spin()
    return len(kept)


def test_call_whose_process_takes_too_much_memory_fails_and_its_neighbours_do_not():
    is_over = threading.Event()

    def neighbour():
        assert is_over.wait(60)
        create(2)

    def body():
        create(1)
        take(200)

    other = schedule(neighbour)
    row = schedule(body, memory_limit=memory_that_may_be_taken(100))
    with consuming(threads=2):
        eventually(lambda: _has_ended(row), timeout_seconds=30)
        is_over.set()
        eventually(lambda: _has_ended(other))

    assert row.error.startswith("MemoryLimitExceeded: Its process kept ")
    assert "in take" in row.attempts.get().traceback
    assert outcomes(row) == ["failed"]
    assert outcomes(other) == []
    assert effects() == [2]


def test_memory_within_the_limit_is_no_failure():
    row = run_one(lambda: spin_for(0.5), memory_limit=memory_that_may_be_taken(500))

    assert (row.status, outcomes(row)) == ("completed", [])


# --- what cannot be enforced is said


WARNING = "No supervisor watches this consumer"


def limited():
    """Do nothing; a task in one test only."""


def test_consumer_without_a_supervisor_says_at_its_start_what_it_cannot_enforce(
    caplog, monkeypatch
):
    monkeypatch.setattr(registry, "_tasks", dict(registry._tasks))
    task(time_limit=1, aliases=["limited-of-old"])(limited).schedule()
    with caplog.at_level(logging.WARNING, "firefly_jobs"):
        run_burst()

    (line,) = [record.getMessage() for record in caplog.records if WARNING in record.getMessage()]
    assert "Registered tasks with a limit: 1." in line
    assert "--processes 1 or more" in line


def test_consumer_says_so_once_if_only_a_call_has_a_limit(caplog):
    rows = [schedule(create, n, time_limit=60) for n in range(3)]
    with caplog.at_level(logging.WARNING, "firefly_jobs"):
        run_burst()

    (line,) = [record for record in caplog.records if WARNING in record.getMessage()]
    assert f"Task {rows[0].pk} has a limit." in line.getMessage()
    assert line.task_id == rows[0].pk
    assert len(effects()) == 3


def test_consumer_without_limits_says_nothing(caplog):
    tasks.insert.schedule("unlimited")
    with caplog.at_level(logging.WARNING, "firefly_jobs"):
        run_burst()

    assert not [record for record in caplog.records if WARNING in record.getMessage()]
