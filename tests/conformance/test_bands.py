"""A consumer of some priorities sees nothing of the others: not to run, not to wait for."""

from datetime import timedelta

import pytest
from django.db import connection
from django.utils import timezone

from firefly_jobs import databases, schedule_many
from firefly_jobs.claiming import Claimer
from firefly_jobs.consumer import Consumer
from firefly_jobs.lifecycle import release
from firefly_jobs.models import TaskModel
from firefly_jobs.priorities import bands
from tests.conformance import tasks
from tests.conformance.support import (
    CLAIM_INDEX,
    about_tasks,
    ago,
    analyze,
    captured_statements,
    indexes_used,
    plant,
    rows_read,
    run_burst,
    run_until_ended,
)

pytestmark = pytest.mark.django_db(transaction=True)

PRIORITIES = [100, 99, 50, 49, 0, -1, -50, -51, -100]
MANY = 20_000


def done():
    rows = TaskModel.objects.filter(status="completed").order_by("-priority")
    return list(rows.values_list("priority", flat=True))


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (["low", "background"], [-1, -50, -51, -100]),
        (["critical", "normal"], [100, 49, 0]),
        (["-50..100"], [100, 99, 50, 49, 0, -1, -50]),
        ([0, (-100, -100)], [0, -100]),
        (None, PRIORITIES),
    ],
)
def test_a_consumer_runs_the_priorities_it_serves_and_no_others(served, expected):
    for priority in PRIORITIES:
        tasks.nothing.using(priority=priority).schedule()

    run_burst(priorities=served)

    assert done() == expected
    assert TaskModel.objects.filter(status="created").count() == len(PRIORITIES) - len(expected)


def test_priorities_are_served_highest_first_across_queues():
    for priority in (0, 60, -60):
        tasks.nothing.using(priority=priority, queue="b").schedule()
    claimer = Claimer(["*"], using="default", bands=bands(["high", "background"]))

    assert [item.priority for item in claimer.claim(5, consumer=1)] == [60, -60]


def test_a_wrong_band_is_refused_when_the_consumer_is_made():
    with pytest.raises(ValueError, match="no band 'hihg'"):
        Consumer(priorities=["hihg"])


def test_a_consumer_sleeps_until_its_own_next_row_is_due():
    # Due at once, but not its own: it must not keep looking.
    tasks.nothing.using(priority=10).schedule()
    later = timezone.now() + timedelta(seconds=100)
    tasks.nothing.using(priority=-10).schedule(eta=later)
    claimer = Claimer(["default"], using="default", bands=bands(["low"]))

    assert claimer.claim(5, consumer=1) == []

    wait = claimer.seconds_until_due()
    assert wait is not None
    # SQLite counts days, to some ten microseconds.
    assert 60 < wait < 101


def test_a_consumer_waits_for_nothing_if_only_others_have_work():
    tasks.nothing.using(priority=10).schedule()
    claimer = Claimer(["default"], using="default", bands=bands(["low"]))

    assert claimer.claim(5, consumer=1) == []
    assert claimer.seconds_until_due() is None


def test_a_row_that_becomes_due_while_it_sleeps_is_run():
    tasks.nothing.using(priority=90).schedule()
    own = tasks.nothing.using(priority="low").schedule(eta=timezone.now() + timedelta(seconds=0.7))

    run_until_ended(own, priorities=["low", "background"])

    assert done() == [-50]


def test_after_a_claim_in_vain_it_finds_its_own_row_below_a_higher_one():
    claimer = Claimer(["default"], using="default", bands=bands(["low"]))
    assert claimer.claim(5, consumer=1) == []
    tasks.nothing.using(priority=90).schedule()
    own = tasks.nothing.using(priority=-5).schedule()

    assert [item.id for item in claimer.claim(5, consumer=1)] == [own.pk]


def test_rows_of_other_bands_cost_a_claim_nothing():
    plant(MANY, priority=50)
    plant(MANY, priority=-100, due=ago(-3600))
    plant(MANY, priority=-20)
    analyze()
    claimer = Claimer(["default"], using="default", bands=bands(["low"]))

    with captured_statements() as statements:
        claims = claimer.claim(10, consumer=1)

    assert {item.priority for item in claims} == {-20}
    release(claims, using="default")
    for sql, params in about_tasks(statements):
        if "WHERE id IN (%s" not in sql:
            assert rows_read(sql, params) <= 10 * 12 + 60, sql
        if "MAX(" in sql and "RECURSIVE" not in sql:
            continue  # some databases answer it from the index without naming it
        if "WHERE id IN (%s" not in sql:
            assert CLAIM_INDEX in indexes_used(sql, params), sql


def test_priorities_are_looked_up_within_the_bands():
    for priority in PRIORITIES:
        tasks.nothing.using(priority=priority).schedule()
    found = databases.of("default").priorities

    assert found(connection, "default") == PRIORITIES
    assert found(connection, "default", bands(["high", "low"])) == [99, 50, -1, -50]
    assert found(connection, "default", bands([7])) == []
    assert found(connection, "elsewhere", bands(["low"])) == []


def test_priorities_outside_of_the_bands_are_not_looked_up():
    schedule_many(tasks.nothing.using(priority=number) for number in range(-100, 101))
    analyze()

    def cost(*served):
        with captured_statements() as statements:
            databases.of("default").priorities(connection, "default", *served)
        return sum(rows_read(sql, params) for sql, params in about_tasks(statements))

    assert cost(bands([7, 9])) * 10 < cost()
