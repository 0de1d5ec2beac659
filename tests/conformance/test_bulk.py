"""Many rows at once: in order, with their ids, all or nothing."""

import weakref
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest import mock

import pytest
from django.db import connection, transaction
from django.utils import timezone

from firefly_jobs import Fixed, databases, enqueue, schedule_many
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import captured_statements, outside, run_burst
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

COUNT = 2_500
TAGS = [f"{number:x<98}" for number in range(100)]


def rows(count=COUNT):
    return (tasks.insert.row((f"key-{number}", number), {}) for number in range(count))


@pytest.mark.parametrize("count", [0, 1, 7, 1_000, COUNT])
def test_rows_come_back_in_order_with_their_ids(count):
    written = enqueue.insert_many(rows(count))

    ids = [row.pk for row in written]
    assert len(set(ids)) == TaskModel.objects.count() == count
    found = {row.pk: row.params["args"] for row in TaskModel.objects.all()}
    assert [found[pk] for pk in ids] == [(f"key-{n}", n) for n in range(count)]


def test_rows_longer_than_one_statement_may_be_are_written():
    # 40 MB; MariaDB takes 16 MiB at once.
    long = (tasks.insert.row((f"{number}" + "x" * 100_000, number), {}) for number in range(300))

    written = enqueue.insert_many(long)

    assert len(written) == TaskModel.objects.count() == 300
    assert TaskModel.objects.get(pk=written[-1].pk).params["args"][1] == 299


@pytest.mark.parametrize(
    ("text", "options"),
    [
        pytest.param("x" * 20_000, lambda n: {"unique_key": f"k{n}"}, id="arguments and a key"),
        pytest.param("", lambda n: {"metadata": {"a": "x" * 20_000}}, id="metadata"),
        pytest.param(
            "",
            lambda n: {"unique_key": f"k{n}", "metadata": {"a": "\N{BUTTERFLY}" * 2_000}},
            id="metadata and a key",
        ),
        pytest.param(
            "",
            lambda n: {"description": "\N{BUTTERFLY}" * 2_000, "tags": TAGS},
            id="words for people",
        ),
    ],
)
def test_whatever_makes_rows_long_they_are_cut_into_statements(text, options):
    # 20 MB in all; and what the caller has open survives.
    with transaction.atomic():
        Effect.objects.create(task_key="before", value=1)

        written = schedule_many(
            tasks.insert.job.with_args(text, n).with_options(**options(n)) for n in range(1_000)
        )

    assert [row.params["args"][1] for row in written] == list(range(1_000))
    assert len({row.pk for row in written}) == TaskModel.objects.count() == 1_000
    assert Effect.objects.count() == 1


def test_a_row_written_among_many_is_that_of_a_row_written_alone():
    eta = datetime(2101, 2, 3, 4, 5, 6, 789, tzinfo=UTC)
    for options in (
        {},
        {"queue": "slow", "priority": 7, "eta": eta},
        {"max_retries": 3, "retry_delay": 60},
        {"retry": Fixed(2, 5.0), "eta": timezone.now() - timedelta(hours=1)},
    ):
        task = tasks.insert.using(**options)
        alone = TaskModel.objects.get(pk=task.schedule("k", 1).pk)
        (among, *_) = enqueue.insert_many(task.row(("k", 1), {}) for _ in range(1_001))
        among = TaskModel.objects.get(pk=among.pk)
        own = {"id", "created", "run_at"}
        for field in TaskModel._meta.concrete_fields:
            if field.name not in own:
                assert getattr(among, field.attname) == getattr(alone, field.attname), field.name
        assert abs(among.created - alone.created) < timedelta(minutes=1)
        assert (among.run_at == eta) == (options.get("eta") == eta)


def test_rows_know_where_they_are_and_when_they_were_created():
    (row, *_) = enqueue.insert_many(rows(3))

    assert row._state.db == "default"
    assert abs(row.created - timezone.now()) < timedelta(minutes=1)
    assert row.cancel()


def test_rows_are_rolled_back_with_the_callers_transaction_and_unseen_before():
    with transaction.atomic():
        enqueue.insert_many(rows())
        assert outside(TaskModel.objects.count) == 0
        transaction.set_rollback(True)

    assert not TaskModel.objects.exists()


def test_an_iterator_that_fails_leaves_no_row():
    def failing():
        yield from rows()
        raise LookupError

    with pytest.raises(LookupError):
        enqueue.insert_many(failing())

    assert not TaskModel.objects.exists()


def test_an_iterator_is_read_batch_by_batch():
    size = databases.of("default").insert_batch_size
    written = []

    def noting():
        for number, row in enumerate(rows(size + 2)):
            if number == size + 1:
                written.append(TaskModel.objects.count())
            yield row

    enqueue.insert_many(noting())

    assert written == [size]


def test_a_thousand_rows_take_one_statement():
    with captured_statements() as statements:
        enqueue.insert_many(rows(1_000))

    assert len([sql for sql, _ in statements if "INSERT" in sql]) == 1


@pytest.mark.postgresql
def test_more_rows_are_copied():
    with captured_statements() as statements:
        enqueue.insert_many(rows())

    assert not [sql for sql, _ in statements if "INSERT" in sql]
    assert connection.is_usable()


def test_what_was_written_runs():
    enqueue.insert_many(rows(1_200))

    run_burst()

    assert Effect.objects.count() == 1_200
    assert set(TaskModel.objects.values_list("status", flat=True)) == {"completed"}


def test_an_unknown_alias_is_refused_before_anything_is_read():
    read = []

    def noting():
        read.append(1)
        yield from rows(1)

    with pytest.raises(ValueError, match="There is no database 'nowhere'"):
        enqueue.insert_many(noting(), using="nowhere")

    assert read == []


def test_ids_alone_hold_no_more_rows_than_a_batch():
    alive: weakref.WeakSet[TaskModel] = weakref.WeakSet()
    most: list[int] = []

    def jobs():
        for number in range(1_000):
            yield tasks.insert.job.with_args(f"{number}")

    def watched(connection, rows):
        write(connection, rows)
        alive.update(rows)
        most.append(len(alive))

    write = enqueue._write
    database = type(databases.of("default"))
    with (
        mock.patch.object(enqueue, "_write", watched),
        mock.patch.object(database, "insert_batch_size", 100),
    ):
        ids = schedule_many(jobs(), returns="ids")

    # Of one batch, and of the one before it until that is replaced.
    assert max(most) <= 200
    assert len(ids) == 1_000
    assert ids == list(TaskModel.objects.order_by("pk").values_list("pk", flat=True))


def test_ids_of_calls_with_keys_are_those_of_their_rows():
    there = tasks.insert.using(unique_key="k1").schedule("there")
    jobs = [tasks.insert.job.with_args("a").with_unique_key(key) for key in ("k1", None, "k2")]
    ids = schedule_many(jobs, returns="ids")
    assert ids[0] == there.pk
    assert sorted(ids) == sorted(TaskModel.objects.values_list("pk", flat=True))
    wrong: Any = "row"
    with pytest.raises(ValueError, match="returns must be 'rows' or 'ids', got 'row'"):
        schedule_many(jobs, returns=wrong)
