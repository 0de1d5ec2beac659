"""Several sync calls at the same time: a lane each, a connection each, one dispatcher."""

import threading
from collections import Counter

import pytest
from django.db import connection

from firefly_jobs import current_task
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    Watch,
    consuming,
    effects,
    outcomes,
    run_burst,
    run_until_ended,
    schedule,
)
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def test_as_many_calls_run_at_the_same_time_as_there_are_threads():
    barrier = threading.Barrier(4)
    seen = []

    def body():
        barrier.wait(20)
        seen.append((threading.get_ident(), id(connection.connection)))

    rows = [schedule(body) for _ in range(8)]

    run_burst(threads=4)

    assert {outcome for row in rows for outcome in outcomes(row)} == set()
    assert len(set(seen)) == 4
    assert len({ident for ident, _ in seen}) == len({session for _, session in seen}) == 4


def test_never_more_calls_run_than_there_are_threads():
    lock = threading.Lock()
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()

    def body():
        with lock:
            running["now"] += 1
            most["ever"] = max(most["ever"], running["now"])
        Effect.objects.create(task_key="one", value=1)
        with lock:
            running["now"] -= 1

    for _ in range(60):
        schedule(body)

    run_burst(threads=3)

    assert len(effects()) == 60
    assert most["ever"] <= 3


def test_a_slow_call_holds_up_its_own_lane_only():
    may_end, is_slow = threading.Event(), threading.Event()

    def slow():
        is_slow.set()
        assert may_end.wait(30)

    slow_row = schedule(slow)
    with consuming(threads=2):
        assert is_slow.wait(20)
        quick = [tasks.insert.schedule("quick", n) for n in range(50)]

        def all_quick_ended():
            ended = TaskModel.objects.filter(pk__in=[row.pk for row in quick], status="completed")
            assert ended.count() == 50

        eventually(all_quick_ended)
        slow_row.refresh_from_db()
        assert slow_row.status == "running"
        may_end.set()


def test_slow_calls_on_every_lane_hoard_nothing():
    barrier, may_end = threading.Barrier(4), threading.Event()

    def slow():
        barrier.wait(20)
        assert may_end.wait(30)

    slow_rows = [schedule(slow) for _ in range(3)]
    with consuming(threads=3):
        barrier.wait(20)
        left = [tasks.nothing.schedule() for _ in range(20)]

        def others_may_have_them():
            rows = TaskModel.objects.filter(pk__in=[row.pk for row in left])
            assert set(rows.values_list("status", flat=True)) == {"created"}

        eventually(others_may_have_them)
        may_end.set()
        eventually(lambda: _all_completed(*slow_rows, *left))


def _all_completed(*rows):
    ended = TaskModel.objects.filter(pk__in=[row.pk for row in rows], status="completed")
    assert ended.count() == len(rows)


def test_effects_and_completions_of_several_lanes_are_never_seen_apart():
    def body():
        Effect.objects.create(task_key="own", value=current_task().id)

    rows = [schedule(body) for _ in range(100)]
    with Watch() as watch:
        run_until_ended(*rows, threads=4)

    assert watch.looks > 0
    assert watch.violations == []
    assert sorted(effects()) == sorted(row.pk for row in rows)


def test_a_call_that_fails_leaves_its_neighbours_alone():
    def fail():
        Effect.objects.create(task_key="gone", value=0)
        raise ValueError("no")

    rows = [schedule(fail) if n % 3 else tasks.insert.schedule("kept", n) for n in range(30)]

    run_burst(threads=4)

    assert len(effects()) == 10
    assert [outcomes(row) for row in rows] == [["failed"] if n % 3 else [] for n in range(30)]


def test_a_task_that_was_lost_twice_runs_alone_among_several_lanes():
    running: Counter[str] = Counter()
    beside: list[int] = []
    lock = threading.Lock()

    def other():
        with lock:
            running["now"] += 1
        Effect.objects.create(task_key="other", value=1)
        with lock:
            running["now"] -= 1

    def alone():
        beside.append(running["now"])

    rows = [schedule(other) for _ in range(10)]
    it = schedule(alone)
    TaskModel.objects.filter(pk=it.pk).update(rescues=2)
    rows += [schedule(other) for _ in range(10)]

    run_until_ended(it, *rows, threads=3)

    assert beside == [0]


def test_shutdown_interrupts_the_calls_of_all_lanes_and_gives_them_back():
    barrier = threading.Barrier(4)

    def endless():
        barrier.wait(20)
        while True:
            threading.Event().wait(0.005)

    rows = [schedule(endless) for _ in range(3)]
    with consuming(threads=3, shutdown_timeout=0.0):
        barrier.wait(20)

    for row in rows:
        row.refresh_from_db()
        assert (row.status, outcomes(row)) == ("created", ["released"])
    assert not ConsumerModel.objects.exists()
