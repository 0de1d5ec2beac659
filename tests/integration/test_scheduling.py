"""What ``schedule`` writes, when, and what it refuses before anything is written."""

import asyncio
import threading
from datetime import UTC, date, datetime, timedelta

import pytest
from asgiref.sync import async_to_sync
from django.db import connection, transaction
from django.test import override_settings
from django.utils import timezone

from firefly_jobs import lifecycle, serializers
from firefly_jobs.attempts import Claim, Ended, Settlement
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import PayloadError, PayloadTooLargeError
from firefly_jobs.models import TaskModel
from firefly_jobs.retries import Exponential, RetryStrategy
from firefly_jobs.states import Status
from firefly_jobs.utils import task_as_dict
from tests.support.threads import Concurrent
from tests.testapp.models import Effect
from tests.testapp.tasks import aadd, add, echo, echo_json, with_context, write_effect

ETA = datetime(2031, 5, 1, 12, 30, 15, 123456, tzinfo=UTC)
SECRET = "card-4111-1111"


def claim_one(*, queue: str = "default", priority: int = 0, consumer: int = 1) -> Claim:
    (it,) = lifecycle.claim(
        using="default", consumer=consumer, queue=queue, priority=priority, limit=1
    )
    return it


def complete(row: TaskModel, *, text: str) -> None:
    it = claim_one()
    assert it.id == row.pk
    done = Completion(id=it.id, fence=it.fence, duration=0.5, returned=text)
    assert lifecycle.complete_many([done], using="default") == []


# --- what is written


@pytest.mark.django_db
def test_schedule_writes_one_row_with_one_insert(django_assert_num_queries):
    with django_assert_num_queries(1) as queries:
        row = add.schedule(1, b=3)

    assert queries.captured_queries[0]["sql"].startswith("INSERT INTO")
    assert TaskModel.objects.get() == row


@pytest.mark.django_db
def test_a_scheduled_row_says_what_to_call_when_and_how():
    before = timezone.now() - timedelta(minutes=1)

    pk = add.schedule(1, b=3).pk

    row = TaskModel.objects.get(pk=pk)
    assert row.func_name == add.name == "tests.testapp.tasks.add"
    assert (row.queue, row.status, row.priority) == ("default", Status.CREATED, 0)
    assert row.params == {"args": (1,), "kwargs": {"b": 3}}
    assert before < row.created < before + timedelta(minutes=2)
    assert row.not_before is None
    assert row.run_at == row.created
    assert (row.max_retries, row.retry_delay, row.retry) == (0, 120, None)
    assert (row.retry_attempts, row.rescues, row.lost_alone, row.fence) == (0, 0, 0, 0)
    assert (row.started, row.completed, row.failed, row.duration) == (None, None, None, None)
    assert (row.raw_returned, row.returned, row.error, row.consumer) == (None, None, "", None)


@pytest.mark.django_db
def test_the_returned_row_is_filled_in_without_another_look():
    row = add.schedule(1)

    again = TaskModel.objects.get(pk=row.pk)
    assert row.pk > 0
    assert row.created == again.created
    assert row.run_at == again.run_at
    assert row.status is Status.CREATED


@pytest.mark.django_db
def test_an_eta_is_kept_to_the_microsecond_and_is_when_the_row_is_due():
    row = add.schedule(1, eta=ETA)

    again = TaskModel.objects.get(pk=row.pk)
    assert again.not_before == again.run_at == ETA
    assert again.params == {"args": (1,), "kwargs": {}}
    assert not TaskModel.objects.due().exists()


@pytest.mark.django_db
def test_an_eta_in_another_zone_is_the_same_moment():
    oslo = timezone.get_default_timezone()

    row = add.schedule(1, eta=ETA.astimezone(oslo))

    assert TaskModel.objects.get(pk=row.pk).run_at == ETA


@pytest.mark.django_db
def test_no_eta_and_a_past_one_are_due_at_once():
    now, past = add.schedule(1, eta=None), add.schedule(2, eta=ETA.replace(year=2001))

    assert set(TaskModel.objects.due()) == {now, past}


@pytest.mark.django_db
def test_options_of_using_are_written_with_the_row():
    row = add.using(
        queue="slow", priority=-50, max_retries=7, retry_delay=timedelta(minutes=1), eta=ETA
    ).schedule(1)

    again = TaskModel.objects.get(pk=row.pk)
    assert (again.queue, again.priority, again.not_before) == ("slow", -50, ETA)
    assert (again.max_retries, again.retry_delay, again.retry) == (7, 60, None)
    assert add.options.queue is None


@pytest.mark.django_db
def test_an_eta_of_the_call_wins_over_that_of_using():
    later = ETA + timedelta(days=1)

    row = add.using(eta=later).schedule(1, eta=ETA)

    assert TaskModel.objects.get(pk=row.pk).run_at == ETA


@pytest.mark.django_db
def test_a_strategy_travels_with_the_row():
    strategy = Exponential(5, base_delay=2, jitter_ratio=0.5)

    row = add.using(retry=strategy).schedule(1)

    again = TaskModel.objects.get(pk=row.pk)
    assert (again.max_retries, again.retry_delay) == (5, 0)
    assert again.retry is not None
    assert RetryStrategy.from_json(again.retry) == strategy


@pytest.mark.django_db
def test_settings_of_the_project_are_the_defaults_of_a_row():
    with override_settings(
        FIREFLY_JOBS={
            "DEFAULT_QUEUE": "mail",
            "MAX_RETRIES": 3,
            "RETRY_DELAY": 5,
            "SERIALIZER": "json",
        }
    ):
        row = add.schedule(1, 3)

    again = TaskModel.objects.get(pk=row.pk)
    assert (again.queue, again.max_retries, again.retry_delay) == ("mail", 3, 5)
    assert again.raw_params.startswith("json:")
    assert again.params == {"args": (1, 3), "kwargs": {}}


@pytest.mark.django_db
def test_a_context_is_not_an_argument_of_the_call():
    row = with_context.schedule(5)  # type: ignore[call-overload]

    assert TaskModel.objects.get(pk=row.pk).params == {"args": (5,), "kwargs": {}}


@pytest.mark.django_db
def test_a_task_calls_its_function_and_writes_nothing():
    assert add(1, 3) == 4
    assert not TaskModel.objects.exists()


# --- with the caller's data


@pytest.mark.django_db(transaction=True)
def test_a_rolled_back_transaction_leaves_no_task_behind():
    with transaction.atomic():
        Effect.objects.create(task_key="mine")
        add.schedule(1)
        assert TaskModel.objects.count() == 1
        transaction.set_rollback(True)

    assert not TaskModel.objects.exists()
    assert not Effect.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_rolled_back_savepoint_takes_its_task_with_it():
    with transaction.atomic():
        kept = add.schedule(1)
        with transaction.atomic():
            add.schedule(2)
            transaction.set_rollback(True)

    assert TaskModel.objects.get() == kept


@pytest.mark.django_db(transaction=True)
def test_a_task_becomes_visible_with_the_data_of_its_transaction():
    def seen() -> tuple[int, int]:
        return TaskModel.objects.count(), Effect.objects.count()

    with transaction.atomic():
        Effect.objects.create(task_key="mine")
        add.schedule(1)
        assert Concurrent(seen).result() == (0, 0)

    assert Concurrent(seen).result() == (1, 1)


@pytest.mark.django_db(transaction=True)
def test_an_uncommitted_task_is_not_claimed():
    def claim() -> list[Claim]:
        return lifecycle.claim(using="default", consumer=1, queue="default", priority=0, limit=5)

    with transaction.atomic():
        row = add.schedule(1)
        assert Concurrent(claim).result() == []

    assert [it.id for it in Concurrent(claim).result()] == [row.pk]


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_using_another_database_writes_there_and_not_here():
    row = add.using(database="other").schedule(1)

    assert row._state.db == "other"
    assert not TaskModel.objects.exists()
    assert TaskModel.objects.using("other").get().params == {"args": (1,), "kwargs": {}}
    assert row.cancel()
    assert TaskModel.objects.using("other").get().status == Status.CANCELLED


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_the_database_of_the_settings_is_where_rows_go():
    with override_settings(FIREFLY_JOBS={"DATABASE": "other"}):
        add.schedule(1)

    assert not TaskModel.objects.exists()
    assert TaskModel.objects.using("other").count() == 1


@pytest.mark.django_db(transaction=True, databases=["default", "other"])
def test_a_task_on_another_database_does_not_belong_to_this_transaction():
    with transaction.atomic():
        add.using(database="other").schedule(1)
        transaction.set_rollback(True)

    assert TaskModel.objects.using("other").count() == 1


# --- what is refused before anything is written


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"tests\.testapp\.tasks\.add\(a.* cannot be called like this: missing .* 'a'"),
        ((1, 2, 3), {}, "cannot be called like this: too many positional arguments"),
        ((1,), {"c": 3}, "cannot be called like this: got an unexpected keyword argument 'c'"),
        ((1,), {"a": 2}, "cannot be called like this: multiple values for argument 'a'"),
        ((1,), {"eta": 60}, r"eta must be a timezone-aware datetime.*timedelta"),
        ((1,), {"eta": date(2031, 5, 1)}, "eta must be a timezone-aware datetime"),
        ((1,), {"eta": "2031-05-01"}, "eta must be a timezone-aware datetime"),
        ((1,), {"eta": timedelta(hours=1)}, "For a delay, pass timezone.now"),
    ],
)
@pytest.mark.django_db
def test_a_wrong_call_is_a_type_error_and_writes_nothing(
    django_assert_num_queries, args, kwargs, message
):
    with django_assert_num_queries(0), pytest.raises(TypeError, match=message):
        add.schedule(*args, **kwargs)


@pytest.mark.django_db
def test_a_naive_eta_is_refused_with_the_remedy_and_writes_nothing(django_assert_num_queries):
    naive = ETA.replace(tzinfo=None)

    with (
        django_assert_num_queries(0),
        pytest.raises(ValueError, match=r"naive datetime .* Use django\.utils\.timezone\.now"),
    ):
        add.schedule(1, eta=naive)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: echo.schedule(threading.Lock()), PayloadError, "tasks.echo' cannot be stored"),
        (lambda: echo.schedule(lambda: 1), PayloadError, "Pass plain values, or an id to load"),
        (lambda: echo_json.schedule({1: 2}), PayloadError, "cannot be stored with serializer 'js"),
        (lambda: echo.schedule(Effect()), PayloadError, "An unsaved testapp.Effect.* Save it fi"),
        (lambda: echo.schedule("x" * 2**21), PayloadTooLargeError, "pass a reference to it"),
        (lambda: add.using(database="othr"), ValueError, "no database 'othr' in DATABASES. Did y"),
        (lambda: add.using(queue="a,b"), ValueError, "queue must have 1 to 100 characters, no c"),
        (lambda: add.using(priority=101), ValueError, "priority must be between -100 and 100"),
    ],
)
@pytest.mark.django_db
def test_what_cannot_be_stored_is_refused_with_the_remedy_and_writes_nothing(
    django_assert_num_queries, call, error, message
):
    def schedule() -> None:
        made = call()
        if not isinstance(made, TaskModel):
            made.schedule(1)

    with django_assert_num_queries(0), pytest.raises(error, match=message):
        schedule()


@pytest.mark.django_db
def test_a_refused_call_leaves_the_callers_transaction_usable():
    with transaction.atomic():
        with pytest.raises(TypeError):
            add.schedule()  # type: ignore[call-overload]
        with pytest.raises(PayloadError):
            echo.schedule(threading.Lock())
        row = add.schedule(1)

    assert TaskModel.objects.get() == row


@pytest.mark.django_db
def test_a_message_about_arguments_never_quotes_them():
    for call in (
        lambda: add.schedule(SECRET, SECRET, SECRET),  # type: ignore[call-overload]
        lambda: echo.schedule([SECRET, threading.Lock()]),
        lambda: echo.schedule(SECRET * 100_000),
        lambda: echo_json.schedule([SECRET, object()]),
    ):
        with pytest.raises((TypeError, PayloadError)) as caught:
            call()
        assert SECRET not in str(caught.value)


# --- async


@pytest.mark.django_db(transaction=True)
def test_an_async_task_is_scheduled_by_awaiting():
    async def main() -> TaskModel:
        return await aadd.schedule(1, b=3)

    row = async_to_sync(main)()

    again = TaskModel.objects.get()
    assert again == row
    assert again.func_name == "tests.testapp.tasks.aadd"
    assert again.params == {"args": (1,), "kwargs": {"b": 3}}


@pytest.mark.django_db(transaction=True)
def test_aschedule_does_the_same_for_both_kinds():
    async def main() -> list[TaskModel]:
        return [await add.aschedule(1, eta=ETA), await aadd.aschedule(1, eta=ETA)]

    rows = async_to_sync(main)()

    assert [row.func_name.rpartition(".")[2] for row in rows] == ["add", "aadd"]
    assert [row.run_at for row in TaskModel.objects.order_by("id")] == [ETA, ETA]


@pytest.mark.django_db(transaction=True)
def test_async_to_sync_schedules_in_the_callers_transaction():
    with transaction.atomic():
        async_to_sync(aadd.schedule)(1)
        async_to_sync(add.aschedule)(1)
        assert TaskModel.objects.count() == 2
        transaction.set_rollback(True)

    assert not TaskModel.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_a_wrong_call_of_an_async_task_is_refused_when_awaited():
    async def main() -> None:
        await aadd.schedule(1, c=3)  # type: ignore[call-overload]

    with pytest.raises(TypeError, match="got an unexpected keyword argument 'c'"):
        async_to_sync(main)()
    assert not TaskModel.objects.exists()


@pytest.mark.django_db(transaction=True)
def test_many_coroutines_schedule_at_the_same_time():
    async def main() -> list[TaskModel]:
        return list(await asyncio.gather(*(aadd.schedule(n) for n in range(20))))

    rows = async_to_sync(main)()

    assert len({row.pk for row in rows}) == 20
    assert sorted(row.params["args"][0] for row in TaskModel.objects.all()) == list(range(20))


# --- what a row gives back


@pytest.mark.parametrize("value", [0, False, "", None, 0.0, [], {}, {"a": (1, 2)}])
@pytest.mark.django_db(transaction=True)
def test_returned_gives_back_what_the_call_returned(value):
    row = echo.schedule(value)
    assert row.params["args"] == (value,)

    complete(
        row,
        text=serializers.dumps_returned(value, task_name=row.func_name, serializer="pickle"),
    )

    returned = TaskModel.objects.get(pk=row.pk).returned
    assert returned == value
    assert type(returned) is type(value)


@pytest.mark.django_db
def test_a_row_as_a_dictionary_has_the_documented_fields_and_no_more():
    row = add.using(max_retries=3).schedule(1, eta=ETA)

    assert task_as_dict(row) == {
        "id": row.pk,
        "func_name": "tests.testapp.tasks.add",
        "status": "created",
        "not_before": ETA,
        "created": row.created,
        "retry_attempts": 0,
        "retry_delay": "120s",
        "max_retries": 3,
    }
    assert type(task_as_dict(row)["status"]) is str
    assert task_as_dict(TaskModel.objects.get(pk=row.pk)) == task_as_dict(row)


@pytest.mark.django_db
def test_a_row_without_retries_as_a_dictionary_has_a_delay_of_no_seconds():
    row = add.using(retry_delay=0).schedule(1)

    fields = task_as_dict(row)
    assert (fields["not_before"], fields["retry_delay"]) == (None, "0s")


def settle(it: Claim, ended: Ended, *, delay: float | None = None, retries: int = 0) -> None:
    lifecycle.settle(
        Settlement(
            claim=it,
            ended=ended,
            status=Status.CREATED,
            duration=0.1,
            delay_seconds=delay,
            retries=retries,
        ),
        using="default",
        consumer=1,
    )


def already_run() -> bool:
    return TaskModel.objects.get().already_run


@pytest.mark.django_db(transaction=True)
def test_already_run_is_false_until_the_first_attempt_starts():
    row = add.schedule(1)
    assert not row.already_run

    claim_one()

    assert already_run()


@pytest.mark.parametrize(
    ("ended", "retries"), [(Ended.RETRIED, 1), (Ended.SNOOZED, 0), (Ended.LOST, 0)]
)
@pytest.mark.django_db(transaction=True)
def test_already_run_stays_true_while_the_row_waits_for_its_next_attempt(ended, retries):
    add.schedule(1)

    settle(claim_one(), ended, delay=0, retries=retries)

    assert already_run()


@pytest.mark.django_db(transaction=True)
def test_already_run_is_false_for_a_claim_that_was_given_back_unstarted():
    add.schedule(1)

    lifecycle.release([claim_one()], using="default")

    assert not already_run()


@pytest.mark.parametrize(("ended", "retries"), [(Ended.RETRIED, 1), (Ended.SNOOZED, 0)])
@pytest.mark.django_db(transaction=True)
def test_already_run_survives_a_later_claim_that_was_given_back_unstarted(ended, retries):
    add.schedule(1)
    settle(claim_one(), ended, delay=0, retries=retries)

    lifecycle.release([claim_one()], using="default")

    assert already_run()


@pytest.mark.django_db(transaction=True)
def test_already_run_is_true_for_an_attempt_that_a_shutdown_interrupted():
    add.schedule(1)

    settle(claim_one(), Ended.RELEASED)

    assert already_run()


@pytest.mark.django_db
def test_rows_are_found_by_task_and_by_name():
    one, _ = add.schedule(1), echo.schedule(1)

    assert list(TaskModel.objects.for_task(add)) == [one]
    assert list(TaskModel.objects.for_task("tests.testapp.tasks.add")) == [one]


@pytest.mark.django_db(transaction=True)
def test_a_row_is_cancelled_and_made_due_again_by_its_own_verbs():
    row = write_effect.schedule("never", eta=ETA)

    assert row.cancel()
    assert not row.cancel()
    assert TaskModel.objects.get().status == Status.CANCELLED

    assert row.retry_now()
    assert not row.retry_now()
    assert list(TaskModel.objects.due()) == [row]


@pytest.mark.django_db(transaction=True)
def test_a_running_row_is_not_cancelled():
    row = add.schedule(1)
    claim_one()

    assert not row.cancel()

    assert TaskModel.objects.get().status == Status.RUNNING


@pytest.mark.django_db
def test_the_database_fills_in_created_for_a_row_that_another_program_inserts():
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {TaskModel._meta.db_table} (func_name, queue, status, priority, params,"
            " retry_attempts, retry_delay, max_retries, fence, rescues, lost_alone)"
            " VALUES ('shop.tasks.charge', 'default', 'created', 0, '', 0, 0, 0, 0, 0, 0)"
        )

    row = TaskModel.objects.get()
    assert row.run_at == row.created
    assert abs(row.created - timezone.now()) < timedelta(minutes=1)
    assert list(TaskModel.objects.due()) == [row]


@pytest.mark.django_db
def test_the_context_cannot_be_passed_by_name():
    with pytest.raises(TypeError, match="the consumer passes"):
        with_context.schedule(1, context=5)  # type: ignore[call-overload]

    assert not TaskModel.objects.exists()
