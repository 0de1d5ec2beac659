"""What a row carries besides its call: the same on every database, free if not asked for."""

from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, connection, transaction
from django.utils import timezone

from firefly_jobs import enqueue
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import TABLE, ago, captured_statements, query

pytestmark = pytest.mark.django_db(transaction=True)

FIRST_COLUMNS = (
    "func_name", "queue", "status", "priority", "params", "retry_attempts", "retry_delay",
    "max_retries", "fence", "rescues", "lost_alone",
)  # fmt: skip


def row(**fields):
    made = tasks.insert.row(("k",), {})
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def stored(**fields):
    return TaskModel.objects.get(pk=enqueue.insert(row(**fields), using=None).pk)


def found(**where):
    return set(TaskModel.objects.filter(**where).values_list("label", flat=True))


@pytest.fixture
def tagged():
    for label, tags in {
        "none": [],
        "a": ["a"],
        "ab": ["a", "b"],
        "odd": ['x,"y"%_', "é", "a b"],
        "upper": ["A"],
    }.items():
        stored(label=label, tags=tags)


def test_the_consumer_of_the_first_version_can_insert_into_this_table():
    values = (tasks.nothing.name, "default", "created", 0, "pickle::x", 0, 0, 0, 0, 0, 0)
    marks = ", ".join(["%s"] * len(values))

    query(connection, f"INSERT INTO {TABLE} ({', '.join(FIRST_COLUMNS)}) VALUES ({marks})", *values)

    written = TaskModel.objects.get()
    assert (written.label, written.description, written.metadata, written.tags) == ("", "", {}, [])
    assert (written.unique_key, written.active_key, written.expires_at) == (None, None, None)
    assert (written.time_limit, written.memory_limit) == (None, None)


def test_a_row_that_asks_for_nothing_names_no_column_for_it():
    with captured_statements() as statements:
        enqueue.insert(row(), using=None)
        enqueue.insert_many([row(), row()])

    assert not [sql for sql, _ in statements if "unique_key" in sql or "metadata" in sql]


@pytest.mark.parametrize("count", [1, 3, 1_200])
def test_everything_that_was_asked_for_is_stored(count):
    fields = {
        "label": "Nightly",
        "description": "for people",
        "metadata": {"customer": 5, "deep": [1, None, "ä"]},
        "tags": ["a", "ä"],
        "time_limit": 1.5,
        "memory_limit": 2**40,
        "expires_at": ago(-60),
        "unique_key": "k",
    }

    enqueue.insert_many([row(**fields), *(row() for _ in range(count - 1))])

    first = TaskModel.objects.order_by("id")[0]
    assert {name: getattr(first, name) for name in fields} == fields
    others = TaskModel.objects.exclude(pk=first.pk)
    assert set(others.values_list("label", "unique_key", "expires_at")) <= {("", None, None)}


@pytest.mark.parametrize("count", [1, 2, 1_200])
def test_a_moment_from_now_is_counted_by_the_clock_of_the_database(count):
    rows = [row(), *(row(expires_at=SecondsFromNow(60)) for _ in range(count))]

    written = enqueue.insert_many(rows)[1:]

    for first in written[:3]:
        assert first.expires_at is not None
        assert abs(first.expires_at - timezone.now()) < timedelta(minutes=2)
    again = TaskModel.objects.filter(expires_at__isnull=False)
    moments: Any = again.values_list("expires_at", "created")
    assert {round((expires - made).total_seconds()) for expires, made in moments} == {60}
    assert again.count() == count
    assert [r.pk for r in written] == sorted(r.pk for r in written)


@pytest.mark.usefixtures("tagged")
@pytest.mark.parametrize(
    ("tags", "labels"),
    [
        ("a", {"a", "ab"}),
        (["a"], {"a", "ab"}),
        (["b", "a"], {"ab"}),
        ("A", {"upper"}),
        ("é", {"odd"}),
        ("e", set()),
        ('x,"y"%_', {"odd"}),
        ("x", set()),
        ("%", set()),
        ("a b", {"odd"}),
        ([], {"a", "ab", "odd", "upper"}),
    ],
)
def test_rows_are_found_by_their_tags_exactly(tags, labels):
    assert found(tags__contains=tags) - {"none"} == labels


@pytest.mark.usefixtures("tagged")
def test_tags_can_be_excluded_and_combined():
    assert set(TaskModel.objects.tagged("a", "b").values_list("label", flat=True)) == {"ab"}
    others = TaskModel.objects.exclude(tags__contains="a").values_list("label", flat=True)
    assert set(others) == {"none", "odd", "upper"}
    assert TaskModel.objects.due().tagged("a").exclude(tags__contains="b").count() == 1


def test_rows_are_found_by_their_metadata():
    stored(label="five", metadata={"customer": 5, "deep": {"er": "x"}})
    stored(label="six", metadata={"customer": 6})
    stored(label="none")

    assert found(metadata__customer=5) == {"five"}
    assert found(metadata__deep__er="x") == {"five"}
    assert found(metadata__isnull=True) == {"none"}
    assert list(TaskModel.objects.values_list("metadata__deep", flat=True).order_by("id")) == [
        {"er": "x"},
        None,
        None,
    ]


def test_what_is_empty_reads_as_empty():
    again = stored()

    assert (again.tags, again.metadata) == ([], {})
    assert TaskModel.objects.filter(tags__isnull=True, metadata__isnull=True).count() == 1


def test_an_active_key_is_unique_and_its_absence_is_not():
    TaskModel.objects.create(func_name="f", raw_params="", active_key="Key")
    TaskModel.objects.create(func_name="f", raw_params="")
    TaskModel.objects.create(func_name="f", raw_params="")
    # Where text is compared without regard to case and accents, these would be the same.
    TaskModel.objects.create(func_name="f", raw_params="", active_key="key")
    TaskModel.objects.create(func_name="f", raw_params="", active_key="kéy")

    with pytest.raises(IntegrityError), transaction.atomic():
        TaskModel.objects.create(func_name="f", raw_params="", active_key="Key")

    assert TaskModel.objects.count() == 5
