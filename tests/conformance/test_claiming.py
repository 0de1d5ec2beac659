"""Claims take what is due, in order, once, and cost what the batch costs."""

from time import monotonic

import pytest
from django.db import connection

from firefly_jobs import claiming, databases
from firefly_jobs.claiming import Claimer
from firefly_jobs.databases import Completion
from firefly_jobs.lifecycle import complete_many, release
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    CLAIM_INDEX,
    TABLE,
    about_tasks,
    ago,
    analyze,
    captured_statements,
    claim,
    indexes_used,
    plant,
    query,
    rows_read,
    run_burst,
    second_connection,
)
from tests.conftest import VENDOR
from tests.support.threads import Concurrent

pytestmark = pytest.mark.django_db(transaction=True)

MANY = 100_000
# Index entries, rows or their like that a claim may read: so many per claimed row, and so
# many for finding the place in the index.
PER_ROW, PER_CLAIM = 12, 120


def ids(claims):
    return [item.id for item in claims]


# --- order


def test_claims_come_by_queue_then_priority_then_due_time_then_id():
    def row(queue, priority, seconds_ago):
        options = {"queue": queue, "priority": priority, "eta": moments[seconds_ago]}
        return tasks.nothing.using(**options).schedule().pk

    moments = {seconds: ago(seconds) for seconds in (10, 20, 30)}
    last = row("second", 100, 30)
    low = row("first", -10, 30)
    late, early = row("first", 0, 10), row("first", 0, 30)
    middle, twin = row("first", 0, 20), row("first", 0, 20)
    high = row("first", 50, 10)

    assert ids(claim("first", "second")) == [high, early, middle, twin, late, low, last]


def test_a_claim_of_few_takes_the_best():
    low = tasks.nothing.using(priority=-100).schedule()
    high = tasks.nothing.using(priority=100).schedule()

    assert ids(claim(limit=1)) == [high.pk]
    assert ids(claim(limit=5)) == [low.pk]


def test_a_future_row_is_never_claimed():
    tasks.nothing.schedule(eta=ago(-60))
    tasks.nothing.using(priority=100).schedule(eta=ago(-1800))

    assert claim() == []


def test_rows_that_are_not_created_are_never_claimed():
    for status in TaskModel.Status.values:
        if status != "created":
            plant(1, status=status)

    assert claim("*") == []


def test_a_claim_raises_the_fence_and_names_the_consumer():
    row = tasks.nothing.schedule()

    (held,) = claim(consumer=7)

    row.refresh_from_db()
    assert (row.status, row.fence, row.consumer, held.fence) == ("running", 1, 7, 1)
    assert row.started is not None


def test_the_star_takes_every_queue():
    names = ["alpha", "default", "ünïcode", "Z"]
    rows = {tasks.nothing.using(queue=name).schedule().pk for name in names}

    assert set(ids(claim("*"))) == rows


def test_a_named_queue_goes_before_those_of_the_star():
    first = tasks.nothing.using(queue="a").schedule()
    preferred = tasks.nothing.using(queue="z").schedule()

    assert ids(claim("z", "*")) == [preferred.pk, first.pk]


def test_in_fair_order_every_claim_starts_one_queue_further_on():
    for name in ("a", "b", "c"):
        for _ in range(3):
            tasks.nothing.using(queue=name).schedule()
        tasks.nothing.using(queue=name, priority=50).schedule()
    claimer = Claimer(["c", "a", "b"], using="default", order="fair")

    taken = [claimer.claim(2, consumer=1) for _ in range(6)]

    assert [[(item.queue, item.priority) for item in claims] for claims in taken] == [
        [(name, 50), (name, 0)] for name in ("c", "a", "b")
    ] + [[(name, 0)] * 2 for name in ("c", "a", "b")]
    assert claimer.claim(2, consumer=1) == []


# --- once


def test_four_connections_claim_2000_rows_once_each():
    plant(2_000)

    def hammer(consumer):
        claimer = Claimer(["default"], using="default")
        found = []
        while claims := claimer.claim(7, consumer=consumer):
            found += ids(claims)
        return found

    threads = [Concurrent(hammer, consumer) for consumer in (1, 2, 3, 4)]
    found = [item for thread in threads for item in thread.result(timeout_seconds=60)]

    assert len(found) == len(set(found)) == 2_000
    assert set(TaskModel.objects.values_list("fence", "status")) == {(1, "running")}


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_locked_row_is_passed_over():
    locked, free = (tasks.nothing.schedule() for _ in range(2))
    with second_connection() as other:
        other.set_autocommit(False)
        query(other, f"SELECT id FROM {TABLE} WHERE id = %s FOR UPDATE", locked.pk)

        assert ids(claim()) == [free.pk]

        other.rollback()
        other.set_autocommit(True)
    assert ids(claim()) == [locked.pk]


# --- nobody starves


def test_a_due_eta_and_a_due_retry_run_among_the_first_of_10000_later_rows():
    waiting = tasks.nothing.schedule(eta=ago(5))
    retried = tasks.nothing.schedule(eta=ago(4))
    TaskModel.objects.filter(pk=retried.pk).update(retry_attempts=1, max_retries=1)
    plant(10_000)

    run_burst(max_tasks=5)

    for row in (waiting, retried):
        row.refresh_from_db()
        assert row.status == "completed"
    assert TaskModel.objects.filter(status="completed").count() == 5


def test_an_eta_that_comes_due_while_the_queue_is_kept_full_goes_before_later_rows():
    plant(1_000, due=ago(-3600))
    plant(50)
    soon = tasks.nothing.schedule(eta=ago(-0.3))
    claimer = Claimer(["default"], using="default")
    deadline = monotonic() + 20

    before = []
    while soon.pk not in ids(claims := claimer.claim(1, consumer=1)):
        before += ids(claims)
        plant(1)
        assert monotonic() < deadline

    soon.refresh_from_db()
    assert not TaskModel.objects.filter(pk__in=before, run_at__gt=soon.run_at).exists()


# --- the low-water mark


def drained(claimer, *, until, deadline_seconds=10):
    """Claim one by one until row ``until`` came, and return how many came before it."""
    deadline = monotonic() + deadline_seconds
    before = 0
    while True:
        claims = claimer.claim(1, consumer=1)
        assert claims, "it was not found although nothing else is left"
        if until in ids(claims):
            return before
        before += 1
        assert monotonic() < deadline


@pytest.mark.postgresql
def test_a_kept_full_queue_is_claimed_from_a_mark_on():
    plant(200)
    claimer = Claimer(["default"], using="default")

    with captured_statements() as statements:
        for _ in range(20):
            claimer.claim(5, consumer=1)

    assert any("run_at >=" in sql for sql, _ in about_tasks(statements))


@pytest.mark.postgresql
def test_a_row_that_commits_late_is_found_below_the_mark():
    plant(30_000)
    claimer = Claimer(["default"], using="default")
    for _ in range(5):
        claimer.claim(5, consumer=1)

    late = TaskModel.objects.create(
        func_name=tasks.nothing.name,
        raw_params=tasks.nothing.row((), {}).raw_params,
        created=ago(600),
    )

    assert drained(claimer, until=late.pk) < 29_000


@pytest.mark.postgresql
def test_a_released_row_is_found_below_the_mark():
    old = tasks.nothing.schedule(eta=ago(600))
    plant(30_000)
    claimer = Claimer(["default"], using="default")
    (held,) = claimer.claim(1, consumer=2)
    assert held.id == old.pk
    for _ in range(5):
        claimer.claim(5, consumer=1)

    release([held], using="default")

    assert drained(claimer, until=old.pk) < 29_000


@pytest.mark.postgresql
def test_rows_that_a_limit_lets_go_are_found_below_the_mark_without_a_pause(monkeypatch):
    monkeypatch.setattr(claiming, "REMEMBER_SECONDS", 1_000.0)
    monkeypatch.setattr(claiming, "UNMARKED_SHARE", 0.0)
    limited = tasks.nothing.using(concurrency=1)
    oldest = [limited.schedule(eta=ago(60 - n)) for n in range(3)]
    plant(100)
    claimer = Claimer(["default"], using="default")
    found = []

    for _ in range(5):
        claims = claimer.claim(5, consumer=1)
        found += [item.id for item in claims if item.is_limited]
        outcomes = [Completion(item.id, item.fence, 0.0, "", item.is_limited) for item in claims]
        complete_many(outcomes, using="default")

    assert found == [row.pk for row in oldest]


@pytest.mark.postgresql
def test_the_last_row_below_the_mark_is_found_by_a_claim_that_came_back_short():
    plant(20)
    claimer = Claimer(["default"], using="default")
    for _ in range(2):
        claimer.claim(5, consumer=1)
    old = tasks.nothing.schedule(eta=ago(600))

    assert old.pk in ids(claimer.claim(100, consumer=1))


# --- what it costs


def claiming_statements(limit):
    """Return the statements that claim ``limit`` rows, after they have been executed."""
    with captured_statements() as statements:
        claims = claim(limit=limit)
    assert len(claims) == limit
    return [(sql, params) for sql, params in about_tasks(statements) if "MAX(" not in sql]


def assert_cheap(statements, limit):
    for sql, params in statements:
        if "WHERE id IN (%s" not in sql:  # MariaDB's second statement goes by primary key
            assert CLAIM_INDEX in indexes_used(sql, params), sql
        assert rows_read(sql, params) <= PER_ROW * limit + PER_CLAIM, sql


def test_a_claim_after_one_that_found_nothing_takes_the_highest_priority_first():
    claimer = Claimer(["first", "second"], using="default")
    assert claimer.claim(5, consumer=1) == []
    other = tasks.nothing.using(queue="second", priority=90).schedule()
    low = tasks.nothing.using(queue="first").schedule()
    high = tasks.nothing.using(queue="first", priority=5).schedule()

    claims = []
    while found := claimer.claim(5, consumer=1):
        claims += found

    assert ids(claims) == [high.pk, low.pk, other.pk]


def test_a_claim_after_one_that_found_nothing_passes_over_what_is_due_later():
    claimer = Claimer(["default"], using="default")
    tasks.nothing.using(priority=5).schedule(eta=ago(-3600))
    assert claimer.claim(5, consumer=1) == []
    due = tasks.nothing.schedule()

    assert ids(claimer.claim(5, consumer=1)) == [due.pk]


def test_a_claim_after_one_that_found_nothing_reads_in_proportion_to_its_batch():
    claimer = Claimer(["default"], using="default")
    assert claimer.claim(5, consumer=1) == []
    plant(MANY, priority=5)
    plant(MANY // 2)
    analyze()

    with captured_statements() as statements:
        claims = claimer.claim(10, consumer=1)

    assert {item.priority for item in claims} == {5}
    release(claims, using="default")
    for sql, params in about_tasks(statements):
        assert rows_read(sql, params) <= PER_ROW * 10 + PER_CLAIM, sql


@pytest.mark.parametrize("has_statistics", [True, False])
def test_a_claim_from_100000_rows_reads_in_proportion_to_its_batch(has_statistics):
    plant(MANY // 2, status="completed")
    plant(MANY)
    if has_statistics:
        analyze()

    for limit in (1, 10, 100):
        assert_cheap(claiming_statements(limit), limit)


def test_200000_future_rows_do_not_slow_the_claim_of_a_due_row_at_a_lower_priority():
    plant(2 * MANY, due=ago(-3600))
    analyze()
    due = tasks.nothing.using(priority=-10).schedule()

    with captured_statements() as statements:
        claims = claim(limit=1)

    assert ids(claims) == [due.pk]
    release(claims, using="default")
    for sql, params in about_tasks(statements):
        assert rows_read(sql, params) <= PER_ROW + PER_CLAIM, sql


def test_priorities_and_queues_are_index_look_ups_with_100000_rows():
    plant(MANY // 2, queue="a", priority=5)
    plant(MANY // 2, queue="b", priority=-5)
    plant(10, queue="b", priority=7)
    analyze()
    database = databases.of("default")

    with captured_statements() as statements:
        assert database.queues(connection) == ["a", "b"]
        assert database.priorities(connection, "b") == [7, -5]

    # PostgreSQL looks up all priorities of a queue in one statement.
    assert len(statements) == (4 if VENDOR == "postgresql" else 6)
    for sql, params in statements:
        if VENDOR != "mysql":  # MariaDB answers MIN and MAX while it plans and names no index
            assert CLAIM_INDEX in indexes_used(sql, params)
        assert rows_read(sql, params) <= PER_CLAIM, sql
