"""A failure spends a retry; what the database did to the task spends none."""

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection, connections, transaction
from django.utils import timezone

from firefly_jobs import Cancel, Exponential, Fixed, RandomDelay, Retry, Snooze, current_task
from firefly_jobs.models import TaskModel
from tests.conformance.support import (
    ago,
    deadlock,
    effects,
    impatient_connections,
    locked_by_another,
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
    update_impatiently,
)
from tests.conftest import VENDOR
from tests.support.threads import Concurrent
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def make_due(row):
    TaskModel.objects.filter(pk=row.pk).update(not_before=ago(1))


def pause_after(row):
    """Return the seconds from the end of the last attempt to the next, by the database."""
    row.refresh_from_db()
    return (row.not_before - row.attempts.last().ended).total_seconds()


def fail():
    raise ValueError("no")


# --- how often and how soon


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_exactly_max_retries_retries_follow_the_first_attempt(retries):
    attempts = []

    def body():
        attempts.append((current_task().attempt, current_task().fence))
        raise ValueError("no")

    row = run_one(body, max_retries=retries, retry_delay=0)

    assert attempts == [(number, number) for number in range(1, retries + 2)]
    assert row.status == "failed"
    assert row.failed is not None
    assert row.retry_attempts == retries
    assert outcomes(row) == ["retried"] * retries + ["failed"]


def test_a_task_that_succeeds_at_its_last_retry_has_completed():
    def body():
        Effect.objects.create(task_key="attempt", value=current_task().attempt)
        if current_task().attempt < 3:
            raise ValueError("not yet")
        return "done"

    row = run_one(body, max_retries=2, retry_delay=0)

    assert (row.status, row.returned, row.retry_attempts) == ("completed", "done", 2)
    assert row.failed is None
    assert effects() == [3]


def test_a_retry_is_due_after_retry_delay_by_the_databases_clock():
    row = run_one(fail, max_retries=1, retry_delay=timedelta(minutes=10))

    assert (row.status, row.retry_attempts) == ("created", 1)
    assert pause_after(row) == pytest.approx(600, abs=1)
    assert row.run_at == row.not_before


def test_a_retry_that_is_not_due_does_not_run():
    row = run_one(fail, max_retries=1, retry_delay=600)

    run_burst()

    row.refresh_from_db()
    assert outcomes(row) == ["retried"]


@pytest.mark.parametrize(
    ("strategy", "least", "most"),
    [
        (Fixed(retries_max=2, delay=50), [50, 50], [50, 50]),
        (
            Exponential(retries_max=3, base_delay=100, factor=3, max_delay=500),
            [100, 300, 500],
            [100, 300, 500],
        ),
        (RandomDelay(retries_max=2, min_delay=100, max_delay=200), [100, 100], [200, 200]),
    ],
    ids=["fixed", "exponential", "random"],
)
def test_a_strategy_says_how_often_and_how_soon(strategy, least, most):
    row = schedule(fail, retry=strategy)

    for lower, upper in zip(least, most, strict=True):
        run_burst()
        assert lower - 1 <= pause_after(row) <= upper + 1
        make_due(row)
    run_burst()

    row.refresh_from_db()
    assert row.status == "failed"
    assert outcomes(row) == ["retried"] * len(least) + ["failed"]


def test_an_error_that_is_not_in_retry_on_is_not_retried():
    def body(kind):
        raise {"os": ConnectionError, "value": ValueError}[kind]("no")

    options: dict[str, Any] = {"max_retries": 1, "retry_delay": 0, "retry_on": (OSError,)}
    retried, failed = schedule(body, "os", **options), schedule(body, "value", **options)
    run_burst()

    assert outcomes(retried) == ["retried", "failed"]
    assert outcomes(failed) == ["failed"]


def test_the_traceback_and_the_error_are_kept():
    row = run_one(fail)

    attempt = row.attempts.get()
    assert row.error == "ValueError: no"
    assert attempt.error == "ValueError: no"
    assert "in fail" in attempt.traceback
    assert (attempt.number, attempt.fence) == (1, 1)


# --- what a task may raise on purpose


def test_retry_spends_a_retry_at_its_own_delay():
    def body():
        Effect.objects.create(task_key="gone", value=1)
        raise Retry(delay=30)

    row = run_one(body, max_retries=1, retry_delay=600)

    assert (row.status, row.retry_attempts) == ("created", 1)
    assert pause_after(row) == pytest.approx(30, abs=1)
    make_due(row)
    run_burst()
    row.refresh_from_db()
    assert row.status == "failed"
    assert outcomes(row) == ["retried", "failed"]
    assert effects() == []


def test_retry_without_a_delay_takes_that_of_the_task():
    def body():
        raise Retry

    row = run_one(body, max_retries=1, retry_delay=300)

    assert pause_after(row) == pytest.approx(300, abs=1)


def test_retry_without_retries_left_fails():
    def body():
        raise Retry(delay=0)

    assert outcomes(run_one(body, max_retries=0)) == ["failed"]


def test_snooze_spends_no_retry():
    calls = []

    def body():
        calls.append(current_task().attempt)
        Effect.objects.create(task_key="snoozed", value=len(calls))
        if len(calls) < 4:
            raise Snooze(delay=0)

    row = run_one(body, max_retries=0)

    assert calls == [1, 1, 1, 1]
    assert (row.status, row.retry_attempts, row.rescues) == ("completed", 0, 0)
    assert outcomes(row) == ["snoozed"] * 3
    assert effects() == [4]


def test_a_snoozed_task_is_due_after_its_delay():
    def body():
        raise Snooze(delay=timedelta(hours=1))

    assert pause_after(run_one(body)) == pytest.approx(3600, abs=1)


def test_cancel_ends_the_task_and_rolls_back():
    def body():
        Effect.objects.create(task_key="gone", value=1)
        raise Cancel("nobody needs it")

    row = run_one(body, max_retries=5, retry_delay=0)

    assert (row.status, outcomes(row)) == ("cancelled", ["cancelled"])
    assert "nobody needs it" in row.error
    assert effects() == []


def test_what_a_cancelled_row_says_is_true_of_one_that_waited_for_a_retry():
    retried = run_one(lambda: 1 / 0, max_retries=1, retry_delay=60)
    fresh = schedule(lambda: None)

    for row, has_run in ((retried, True), (fresh, False)):
        assert row.cancel()
        row.refresh_from_db()
        assert row.already_run == has_run
        assert (row.status, row.error) == ("cancelled", "cancelled while it waited")


@pytest.mark.parametrize(
    ("error", "status"),
    [(Retry(delay=60), "created"), (Snooze(delay=60), "created"), (Cancel("no"), "cancelled")],
)
def test_a_coroutine_may_steer_as_well(error, status):
    async def body():
        await Effect.objects.acreate(task_key="gone", value=1)
        raise error

    row = run_one(body, max_retries=1)

    assert row.status == status
    assert effects() == []


# --- lost, not failed


class Trouble:
    """A task that gets into ``trouble`` at its first attempts and inserts one row.

    Its effect of an attempt that was lost would be seen as one too many.
    """

    __name__ = "trouble"

    def __init__(self, trouble, *, times=1):
        self._trouble = trouble
        self._times = times
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls <= self._times:
            self._trouble()
        Effect.objects.create(task_key="mine", value=self.calls)


def assert_ran_again(body, *, times=1):
    """Run ``body`` with no retries and assert that it was lost, not failed, and then done."""
    row = schedule(body, max_retries=0)
    run_until_ended(row)
    assert row.status == "completed", row.error
    assert outcomes(row) == ["lost"] * times
    assert (row.retry_attempts, row.rescues, row.fence) == (0, times, times + 1)
    assert body.calls == times + 1
    assert list(Effect.objects.filter(task_key="mine").values_list("value", flat=True)) == [
        times + 1
    ]


@pytest.mark.postgresql
@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_serialization_failure_does_not_fail_the_task(level):
    effect = Effect.objects.create(task_key="shared", value=0)

    def change():
        Effect.objects.filter(pk=effect.pk).update(note="changed outside")

    def trouble():
        query(connection, f"SET TRANSACTION ISOLATION LEVEL {level}")
        Effect.objects.create(task_key="mine", value=0)
        effect.refresh_from_db()
        outside(change)
        effect.save()

    assert_ran_again(Trouble(trouble))


@pytest.mark.postgresql
def test_a_serialization_failure_at_commit_does_not_fail_the_task():
    def cross():
        # Each reads what the other writes, so they have no order.
        with transaction.atomic():
            query(connection, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            Effect.objects.filter(task_key="b").count()
            Effect.objects.create(task_key="a", value=0)
            has_read.set()
            assert may_commit.wait(10)

    def trouble():
        query(connection, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        Effect.objects.filter(task_key="a").count()
        Effect.objects.create(task_key="b", value=0)
        crossing = Concurrent(cross)
        assert has_read.wait(10)
        may_commit.set()
        crossing.result()

    has_read, may_commit = threading.Event(), threading.Event()
    row = schedule(body := Trouble(trouble), max_retries=0)
    run_until_ended(row)

    assert row.status == "completed", row.error
    assert outcomes(row) == ["lost"]
    assert body.calls == 2
    assert Effect.objects.filter(task_key="mine").count() == 1
    assert not Effect.objects.filter(task_key="b").exists()


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_deadlock_does_not_fail_the_task():
    mine, theirs = prepare_deadlock()

    def trouble():
        Effect.objects.create(task_key="mine", value=0)
        deadlock(mine, theirs)

    assert_ran_again(Trouble(trouble))


def test_a_lock_time_out_does_not_fail_the_task():
    effect = Effect.objects.create(task_key="shared", value=0)

    def trouble():
        with locked_by_another(effect):
            if VENDOR != "sqlite":
                Effect.objects.create(task_key="mine", value=0)
            update_impatiently(effect)

    with impatient_connections():
        assert_ran_again(Trouble(trouble))


@pytest.mark.sqlite
def test_a_busy_database_at_the_first_read_does_not_fail_the_task():
    effect = Effect.objects.create(task_key="shared", value=0)

    def trouble():
        with locked_by_another(effect):
            Effect.objects.count()

    with impatient_connections():
        assert_ran_again(Trouble(trouble))


@pytest.mark.sqlite
def test_a_busy_database_while_an_untouched_call_is_settled_does_not_fail_it():
    effect = Effect.objects.create(task_key="shared", value=0)
    locking = locked_by_another(effect)
    timers = []

    def body():
        locking.__enter__()
        timer = threading.Timer(0.5, locking.__exit__, (None, None, None))
        timers.append(timer)
        timer.start()

    with impatient_connections():
        row = schedule(body)
        run_until_ended(row)
        timers[0].join()

    assert (row.status, outcomes(row), row.fence) == ("completed", [], 1)


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_session_that_the_server_ends_does_not_fail_the_task(wrapped):
    def trouble():
        Effect.objects.create(task_key="mine", value=0)
        session = session_id(connection)
        with second_connection() as other:
            if VENDOR == "postgresql":
                query(other, "SELECT pg_terminate_backend(%s, 5000)", session)
            else:
                query(other, f"KILL {session}")
        try:
            Effect.objects.count()
        except OperationalError as error:
            if wrapped:
                raise RuntimeError("the task's own words") from error
            raise

    assert_ran_again(Trouble(trouble))


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_session_that_ends_unnoticed_before_the_commit_does_not_fail_the_task():
    def trouble():
        raise_nothing = Effect.objects.create(task_key="lost", value=0)
        session = session_id(connection)
        with second_connection() as other:
            if VENDOR == "postgresql":
                query(other, "SELECT pg_terminate_backend(%s, 5000)", session)
            else:
                query(other, f"KILL {session}")
        assert raise_nothing.pk

    class Unnoticed(Trouble):
        def __call__(self):
            self.calls += 1
            if self.calls == 1:
                trouble()
                return
            Effect.objects.create(task_key="mine", value=self.calls)

    assert_ran_again(Unnoticed(trouble))
    assert not Effect.objects.filter(task_key="lost").exists()


def test_a_coroutine_that_meets_a_lock_time_out_runs_again():
    effect = Effect.objects.create(task_key="shared", value=0)
    calls = []

    async def body():
        from asgiref.sync import sync_to_async

        calls.append(1)
        if len(calls) == 1:
            await sync_to_async(meet_lock)()
        await Effect.objects.acreate(task_key="mine", value=len(calls))

    def meet_lock():
        with locked_by_another(effect):
            update_impatiently(effect)

    with impatient_connections():
        row = schedule(body, max_retries=0)
        run_until_ended(row)

    assert row.status == "completed", row.error
    assert outcomes(row) == ["lost"]
    assert Effect.objects.filter(task_key="mine").count() == 1


def test_losses_are_bounded(jobs):
    jobs(MAX_RESCUES=1)
    effect = Effect.objects.create(task_key="shared", value=0)

    def trouble():
        with locked_by_another(effect):
            update_impatiently(effect)

    with impatient_connections():
        body = Trouble(trouble, times=100)
        row = schedule(body, max_retries=0)
        run_until_ended(row)

    assert row.status == "failed"
    # Two among others, which may be to blame; then alone, one that it survives and one more.
    assert outcomes(row) == ["lost", "lost", "lost", "failed"]
    assert body.calls == 4
    assert Effect.objects.filter(task_key="mine").count() == 0


def test_a_loss_does_not_spend_the_retries_that_follow():
    effect = Effect.objects.create(task_key="shared", value=0)
    calls = []

    def body():
        calls.append(current_task().attempt)
        if len(calls) == 1:
            with locked_by_another(effect):
                update_impatiently(effect)
        raise ValueError("no")

    with impatient_connections():
        row = schedule(body, max_retries=1, retry_delay=0)
        run_until_ended(row)

    assert calls == [1, 1, 2]
    assert outcomes(row) == ["lost", "retried", "failed"]


def test_a_database_error_of_the_tasks_own_making_fails_it():
    def body():
        query(connection, "SELECT nonsense FROM nowhere")

    row = run_one(body)

    assert (row.status, outcomes(row), row.rescues) == ("failed", ["failed"], 0)


def test_a_row_brought_back_by_a_person_has_all_its_retries_again():
    row = run_one(fail, max_retries=1, retry_delay=0)
    assert row.status == "failed"

    assert row.retry_now()
    run_burst()

    assert outcomes(row) == ["retried", "failed"] * 2
    row.refresh_from_db()
    assert row.status == "failed"
    assert row.not_before is not None
    assert abs(row.not_before - timezone.now()) < timedelta(minutes=1)
    assert connections["default"].in_atomic_block is False


def test_a_reason_that_no_database_can_store_holds_nothing_up():
    def cancels():
        raise Cancel("cannot read \udcff.txt")

    def follows():
        return 1

    first, second = schedule(cancels), schedule(follows)
    run_burst()

    first.refresh_from_db()
    second.refresh_from_db()
    assert (first.status, first.error) == ("cancelled", "cannot read \\udcff.txt")
    assert second.status == "completed"
