"""Concurrency limits: never more than permitted run, nobody is forgotten, others pay nothing."""

import asyncio
import threading
from collections import Counter
from queue import SimpleQueue
from unittest import mock

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.db import connection, transaction

from firefly_jobs import (
    Cancel,
    Concurrency,
    Job,
    Retry,
    Snooze,
    admission,
    databases,
    fencing,
    leases,
    lifecycle,
    lines,
    schedule_many,
    task,
)
from firefly_jobs.attempts import Outcome, decide
from firefly_jobs.databases import Completion
from firefly_jobs.databases.functions import Isolation
from firefly_jobs.exceptions import Withdrawn
from firefly_jobs.models import ConcurrencySlot, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    CLAIM_INDEX,
    about_tasks,
    ago,
    analyze,
    assert_waits_for_lock,
    captured_statements,
    claim,
    consuming,
    dead_consumer,
    indexes_used,
    outside,
    plant,
    repeatable_reads,
    rows_read,
    run_burst,
    run_until_ended,
    schedule,
    session_id,
)
from tests.factories import create_effect
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

LIMIT_INDEX = "firefly_limit"
one = tasks.nothing.using(concurrency=1)
one_key = tasks.nothing.name


@task(concurrency=Concurrency(1, key="user_id"))
def sync(user_id, *, depth=1):
    return user_id


@task(concurrency=Concurrency(1, key=lambda user_id: f"api-{user_id % 2}"))
def fetch(user_id):
    return user_id


def statuses(*rows):
    found = dict(TaskModel.objects.values_list("pk", "status"))
    return [found[row.pk] for row in rows]


def stands(row):
    return TaskModel.objects.values_list("status", "limit_key").get(pk=row.pk)


def line_of(row):
    return f"c:{row.concurrency_key}"


def ids(claims):
    return [item.id for item in claims]


def running_and_blocked(count=2):
    """Schedule calls with a limit of one; return the claim of the first, and the other rows."""
    first, *rest = [one.schedule() for _ in range(count)]
    (held,) = claim()
    assert held.id == first.pk
    assert statuses(*rest) == ["blocked"] * len(rest)
    return held, rest


class Gauge:
    """Counts how many calls run at the same time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._running: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.calls = 0

    def run(self, key="all", seconds=0.002):
        with self._lock:
            self.calls += 1
            self._running[key] += 1
            self.most[key] = max(self.most[key], self._running[key])
        threading.Event().wait(seconds)
        with self._lock:
            self._running[key] -= 1


# --- what the row carries


def test_the_key_is_the_task_or_the_parameters_value_behind_it_or_a_callables_text():
    rows = [one.schedule(), sync.schedule(5, depth=2), sync.schedule(user_id=5), fetch.schedule(3)]

    name = sync.name
    assert [row.concurrency_key for row in rows] == [
        tasks.nothing.name, f"{name}[user_id=5]", f"{name}[user_id=5]", "api-1",
    ]  # fmt: skip
    assert {row.max_concurrent for row in TaskModel.objects.all()} == {1}


def test_a_job_and_a_bulk_carry_their_limits():
    job = tasks.insert.job.with_kwargs(key="a").with_concurrency(3, key="key")

    alone, (first, second) = job.schedule(), schedule_many([job, tasks.nothing])

    for row in (alone, first):
        row.refresh_from_db()
        assert (row.concurrency_key, row.max_concurrent) == (f"{tasks.insert.name}[key=a]", 3)
    assert (second.concurrency_key, second.max_concurrent) == (None, None)


def test_a_model_instance_is_told_by_its_primary_key():
    effect = create_effect()

    row = tasks.insert.job.with_concurrency(1, key="key").with_args(effect).schedule()

    assert row.concurrency_key == f"{tasks.insert.name}[key=testapp.effect:{effect.pk}]"


def test_a_callable_may_say_that_a_call_has_no_limit():
    free = tasks.insert.using(concurrency=Concurrency(1, key=lambda key: None))

    assert free.schedule("a").concurrency_key is None


@pytest.mark.parametrize(
    ("key", "error", "message"),
    [
        (lambda key: 5, TypeError, "The key of concurrency must be text or a callable"),
        (lambda key: "x" * 256, ValueError, "The key of concurrency must have 1 to 255 char"),
        (lambda key: " x", ValueError, "The key of concurrency must not begin or end with"),
        (lambda other: "x", TypeError, "missing 1 required positional argument"),
        (lambda key: 1 / 0, ZeroDivisionError, "division by zero"),
        ("key", ValueError, "1 to 255 characters, got 3.*Use a callable that hashes"),
    ],
)
def test_a_key_that_is_none_is_refused_and_nothing_is_written(key, error, message):
    limited = tasks.insert.using(concurrency=Concurrency(1, key=key))

    with pytest.raises(error, match=message):
        limited.schedule("x" * 300)

    assert not TaskModel.objects.exists()


@pytest.mark.parametrize(
    "define",
    [
        lambda limit: task(concurrency=limit)(sync.func),
        lambda limit: sync.using(concurrency=limit),
        lambda limit: sync.job.with_options(concurrency=limit),
        lambda limit: sync.job.with_concurrency(limit.max_concurrent, limit.key),
        lambda limit: Job(sync, concurrency=limit),
    ],
)
def test_a_key_that_names_no_parameter_is_refused_at_once_with_a_suggestion(define):
    with pytest.raises(
        ValueError, match=r"is 'user', but .*sync\(user_id.* Did you mean 'user_id'"
    ):
        define(Concurrency(1, key="user"))


# --- never more than permitted


@pytest.mark.parametrize("limit", [1, 3])
def test_three_consumers_never_run_more_than_permitted_and_all_calls_complete(limit):
    gauge = Gauge()
    rows = [
        schedule(gauge.run, key, concurrency=Concurrency(limit, key=lambda key: key.split("-")[0]))
        for key in ["all"] * 60
    ]

    with consuming(threads=3), consuming(threads=3):
        run_until_ended(*rows, threads=3, timeout_seconds=60)

    assert gauge.calls == 60
    assert gauge.most["all"] <= limit
    assert set(TaskModel.objects.values_list("status", "limit_key")) == {("completed", None)}


def test_keys_do_not_hold_each_other_up():
    gauge = Gauge()
    rows = [
        schedule(gauge.run, f"{n % 4}", 0.01, concurrency=Concurrency(1, key=lambda args: args[0]))
        for n in range(24)
    ]

    run_until_ended(*rows, threads=8, timeout_seconds=60)

    assert set(gauge.most.values()) == {1}


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_touch_the_database_and_coroutines_are_counted_as_well(is_async):
    gauge = Gauge()

    def write(n):
        gauge.run()
        Effect.objects.create(task_key=f"e-{n}", value=n)

    async def awrite(n):
        gauge.run()
        await Effect.objects.acreate(task_key=f"e-{n}", value=n)

    rows = [schedule(awrite if is_async else write, n, concurrency=2) for n in range(20)]

    with consuming(threads=3):
        run_until_ended(*rows, threads=3, timeout_seconds=60)

    assert gauge.most["all"] <= 2
    assert Effect.objects.count() == gauge.calls == 20


def claimed_only(consumer=2):
    """Claim one row as a consumer that has not come to admit it yet."""
    (found,) = lifecycle.claim(
        using="default", consumer=consumer, queue="default", priority=0, limit=1
    )
    return found


def admit(*claims):
    return admission.admit(claims, using="default")


def test_two_consumers_that_admit_at_the_same_time_let_one_in_and_forget_nobody():
    rows = [one.schedule() for _ in range(2)]
    claims = [claimed_only(consumer) for consumer in (1, 2)]
    start = threading.Barrier(2)

    def race(item):
        start.wait(10)
        return admit(item)

    admitted = [item for racer in [Concurrent(race, c) for c in claims] for item in racer.result()]

    assert len(admitted) == 1
    assert sorted(statuses(*rows)) == ["blocked", "running"]
    lifecycle.release(admitted, using="default")
    assert statuses(*rows) == ["created", "created"]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_who_admits_waits_for_who_ends_a_call_and_sees_whom_that_let_go():
    held, (waits,) = running_and_blocked()
    late = one.schedule()
    raw = claimed_only()
    sessions: SimpleQueue[int] = SimpleQueue()

    def admit_elsewhere():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        return admit(raw)

    with transaction.atomic():
        lifecycle.complete(completion(held), using="default")
        admitting = Concurrent(admit_elsewhere)
        session = sessions.get(timeout=10)
        eventually(lambda: assert_waits_for_lock(session))

    assert admitting.result() == []
    assert statuses(waits, late) == ["created", "blocked"]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_who_ends_a_call_waits_for_who_admits_and_forgets_nobody():
    held, _ = running_and_blocked(1)
    late = one.schedule()
    raw = claimed_only()
    has_counted, may_go_on = threading.Event(), threading.Event()
    write = lines.Line.write

    def stop(line):
        has_counted.set()
        assert may_go_on.wait(20)
        write(line)

    with mock.patch.object(lines.Line, "write", stop):
        admitting = Concurrent(lambda: admit(raw))
        assert has_counted.wait(10)
    ending = Concurrent(lambda: lifecycle.complete_many([completion(held)], using="default"))
    may_go_on.set()

    assert admitting.result() == []
    assert ending.result() == []
    assert stands(late) == ("created", line_of(late))


def completion(held):
    return Completion(held.id, held.fence, 0.1, "x", is_limited=held.is_limited)


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("group_commit", [False, True])
def test_with_repeatable_reads_as_many_run_and_nobody_is_forgotten(group_commit):
    gauge = Gauge()

    def write(n):
        # The snapshot is older than what becomes of the others meanwhile.
        assert TaskModel.objects.values_list(Isolation(), flat=True)[0] == "repeatable-read"
        gauge.run(seconds=0.01)
        Effect.objects.create(task_key=f"e-{n}", value=n)

    with repeatable_reads(), mock.patch.object(admission, "sweep", return_value=""):
        rows = [schedule(write, n, concurrency=2) for n in range(30)]
        with (
            consuming(threads=2, group_commit=group_commit),
            consuming(threads=2, group_commit=group_commit),
        ):
            run_until_ended(*rows, threads=2, group_commit=group_commit, timeout_seconds=60)

    assert gauge.most["all"] <= 2
    assert Effect.objects.count() == 30


@pytest.mark.postgresql
@pytest.mark.mysql
def test_with_repeatable_reads_who_was_blocked_after_the_snapshot_goes_once_it_has_committed():
    with repeatable_reads():
        held, _ = running_and_blocked(1)
        with transaction.atomic():
            assert TaskModel.objects.count() == 1
            waits = outside(one.schedule)
            assert outside(claim) == []
            lifecycle.complete(completion(held), using="default")

        assert stands(waits) == ("created", line_of(waits))


# --- the line


def test_who_waits_is_let_go_by_priority_and_then_by_the_time_it_became_due():
    (held, _) = running_and_blocked(1)
    due = {seconds: ago(seconds) for seconds in (10, 20, 30)}
    late, early = (one.schedule(eta=due[seconds]) for seconds in (10, 30))
    high, middle = one.using(priority=5).schedule(), one.schedule(eta=due[20])
    low = one.using(priority=-5).schedule(eta=due[30])
    assert claim() == []

    order = []
    for _ in range(5):
        lifecycle.complete_many([completion(held)], using="default")
        (held,) = claim()
        order.append(held.id)

    assert order == [high.pk, early.pk, middle.pk, late.pk, low.pk]


def test_a_place_is_kept_for_who_was_let_go():
    held, (first, second) = running_and_blocked(3)
    lifecycle.complete_many([completion(held)], using="default")
    assert stands(first) == ("created", line_of(first))

    late = one.using(priority=100).schedule()
    claims = claim()

    assert ids(claims) == [first.pk]
    assert statuses(second, late) == ["blocked", "blocked"]


@pytest.mark.parametrize("limit", [1, 100])
def test_a_place_is_kept_for_who_was_let_go_though_nobody_stands_behind(limit):
    held, (first,) = running_and_blocked(2)
    lifecycle.complete_many([completion(held)], using="default")

    late = one.using(priority=100).schedule()
    claims = claim(limit=limit)

    assert ids(claims) == [first.pk]
    assert statuses(late) == ["blocked"]


def test_no_more_are_let_go_than_places_are_neither_taken_nor_kept():
    two = tasks.nothing.using(concurrency=2)
    rows = [two.schedule() for _ in range(6)]

    for held in claim():
        lifecycle.complete_many([completion(held)], using="default")

    assert statuses(*rows[2:]) == ["created", "created", "blocked", "blocked"]


def test_rows_that_permit_different_numbers_go_by_their_own():
    wide, narrow = (
        tasks.nothing.using(concurrency=Concurrency(n, key=lambda: "shared")) for n in (3, 1)
    )
    rows = [wide.schedule(), wide.schedule(), narrow.schedule(), wide.schedule()]

    first, second = claim()

    assert (first.id, second.id) == (rows[0].pk, rows[1].pk)
    assert statuses(*rows[2:]) == ["blocked", "blocked"]
    lifecycle.complete_many([completion(first)], using="default")
    assert statuses(*rows[2:]) == ["blocked", "blocked"]
    lifecycle.complete_many([completion(second)], using="default")
    assert ids(claim()) == [rows[2].pk, rows[3].pk]


def test_two_tasks_share_a_limit_if_their_callables_return_the_same():
    shared = Concurrency(1, key=lambda: "shared")
    first = tasks.nothing.using(concurrency=shared).schedule()
    second = tasks.anothing.using(concurrency=shared)

    waits = async_to_sync(second.schedule)()

    assert ids(claim()) == [first.pk]
    assert stands(waits) == ("blocked", "c:shared")


def test_blocked_calls_occupy_no_slot():
    gate = threading.Event()
    holder = schedule(lambda: gate.wait(30), concurrency=1)
    waiting = [schedule(lambda: None, concurrency=1) for _ in range(30)]
    others = [tasks.nothing.schedule() for _ in range(10)]

    with consuming(threads=2):
        try:
            eventually(lambda: assert_all("completed", others), timeout_seconds=30)
            eventually(lambda: assert_all("blocked", waiting), timeout_seconds=30)
            assert statuses(holder) == ["running"]
        finally:
            gate.set()
        eventually(lambda: assert_all("completed", [holder, *waiting]), timeout_seconds=30)


def assert_all(status, rows):
    assert set(statuses(*rows)) == {status}


# --- whoever stops running lets the next one go


def raising(error):
    def end():
        raise error

    return end


ENDS = {
    "untouched": lambda: None,
    "touched": lambda: Effect.objects.create(task_key="x", value=1),
    "failed": raising(ValueError("x")),
    "retried": raising(Retry(delay=60)),
    "snoozed": raising(Snooze(delay=60)),
    "cancelled": raising(Cancel("no")),
}


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_the_next_one_goes_however_a_call_ends(end, is_async):
    waits: list[TaskModel] = []

    def is_blocked():
        assert statuses(*waits) == ["blocked"]

    def look():
        outside(lambda: eventually(is_blocked, timeout_seconds=20))

    def body():
        look()
        return ENDS[end]()

    async def abody():
        await asyncio.to_thread(look)
        return await sync_to_async(ENDS[end])() if end == "touched" else ENDS[end]()

    first = schedule(abody if is_async else body, concurrency=shared_key(), max_retries=1)
    waits.append(schedule(lambda: None, concurrency=shared_key()))

    with consuming(threads=2):
        eventually(lambda: assert_all("completed", waits), timeout_seconds=30)

    assert TaskModel.objects.get(pk=first.pk).limit_key is None
    ended = {"untouched": "completed", "touched": "completed", "failed": "created"}
    ended |= {"retried": "created", "snoozed": "created", "cancelled": "cancelled"}
    assert statuses(first) == [ended[end]]


def shared_key():
    return Concurrency(1, key=lambda: "shared")


def test_the_next_one_goes_when_a_group_commits(monkeypatch):
    # However busy the machine is: known to be short after a few calls.
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 1.0)
    # After so many quick calls a consumer claims more at once than the limit permits.
    for _ in range(80):
        tasks.insert_in_groups.schedule()
    rows = [tasks.insert_in_groups.using(concurrency=2).schedule() for _ in range(9)]
    limited: list[int] = []
    settle = lifecycle.complete_group

    def collect(completions, **words):
        limited.extend(item.id for item in completions if item.is_limited)
        settle(completions, **words)

    with mock.patch.object(lifecycle, "complete_group", collect):
        run_until_ended(*rows)

    assert limited
    assert Effect.objects.count() == 89
    assert {row.status for row in rows} == {"completed"}


def committed_together(claims):
    with transaction.atomic():
        lifecycle.complete_group([completion(held) for held in claims], using="default")


def failed_together(claims):
    settlements = [
        decide(Outcome(claim=held, duration=0.1, error=ValueError("x")), max_rescues=3)
        for held in claims
    ]
    held = lifecycle.settle_many(settlements, using="default", consumer=None)
    assert len(held) == len(claims)


@pytest.mark.parametrize("settle", [committed_together, failed_together])
def test_the_next_ones_go_when_several_are_settled_together(settle):
    two = tasks.nothing.using(concurrency=2)
    rows = [two.schedule() for _ in range(5)]

    settle(claim())

    assert statuses(*rows[2:]) == ["created", "created", "blocked"]


def test_the_next_one_goes_when_the_shutdown_interrupts_a_call():
    has_begun = threading.Event()

    def endless():
        has_begun.set()
        while True:
            threading.Event().wait(0.01)

    first = schedule(endless, concurrency=1)
    second = schedule(lambda: None, concurrency=1)
    with consuming(threads=2, shutdown_timeout=0.0):
        assert has_begun.wait(10)
        eventually(lambda: assert_all("blocked", [second]))

    assert stands(first) == ("created", None)
    assert stands(second) == ("created", line_of(second))


def released(held):
    assert lifecycle.release([held], using="default") == 1


def expired(held):
    outcome = Outcome(claim=held, duration=0.0, error=Withdrawn("expired"), has_started=False)
    lifecycle.settle(decide(outcome, max_rescues=3), using="default", consumer=1)


def buried(held):
    settlements, are_all = leases.bury(1, using="default")
    assert (len(settlements), are_all) == (1, True)


def rescued(held):
    dead = dead_consumer()
    TaskModel.objects.filter(pk=held.id).update(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    assert len(leases.rescue(suspect, using="default") or []) == 1


def orphaned(held):
    found = fencing.orphans(using="default")
    assert ids(leases.rescue_orphans(found, using="default")) == [held.id]


@pytest.mark.parametrize("end", [released, expired, buried, rescued, orphaned])
def test_the_next_one_goes_when_a_claim_comes_to_nothing(end):
    held, (first, second) = running_and_blocked(3)

    end(held)

    assert stands(first) == ("created", line_of(first))
    assert statuses(second) == ["blocked"]
    assert TaskModel.objects.get(pk=held.id).limit_key is None


def test_a_claim_that_was_never_admitted_is_taken_back_and_forgets_nobody():
    held, (waits, later) = running_and_blocked(3)
    lifecycle.complete_many([completion(held)], using="default")
    raw = claimed_only(consumer=7)
    assert (raw.id, stands(waits)) == (waits.pk, ("running", line_of(waits)))

    leases.bury(7, using="default")

    assert stands(waits) == ("created", None)
    assert stands(later) == ("created", line_of(later))


def test_a_call_that_is_too_late_to_start_takes_no_place():
    held, (waits,) = running_and_blocked()
    late = one.using(priority=1).schedule()
    TaskModel.objects.filter(pk=late.pk).update(expires_at=ago(60))

    (found,) = claim()

    assert found.id == late.pk
    assert statuses(waits) == ["blocked"]
    expired(found)
    assert stands(late) == ("cancelled", None)
    assert statuses(waits) == ["blocked"]
    released(held)
    assert statuses(waits) == ["created"]


def test_who_was_let_go_and_expired_lets_the_next_one_go():
    held, (late, next_one) = running_and_blocked(3)
    lifecycle.complete_many([completion(held)], using="default")
    TaskModel.objects.filter(pk=late.pk).update(expires_at=ago(60))

    run_burst()

    assert statuses(late, next_one) == ["cancelled", "completed"]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_slot_that_somebody_keeps_locked_holds_up_the_rescue_of_its_own_rows_only():
    held, (waits,) = running_and_blocked()
    other = tasks.nothing.using(priority=9).schedule()
    assert ids(claim()) == [other.pk]

    def bury_impatiently():
        connection.ensure_connection()
        databases.of("default").prepare_dispatcher(connection, 2)
        return leases.bury(1, using="default")

    with transaction.atomic():
        lifecycle.complete(completion(held), using="default")
        settlements, are_all = outside(bury_impatiently)

    assert [item.claim.id for item in settlements] == [other.pk]
    assert not are_all
    assert statuses(waits, other) == ["created", "created"]


# --- cancelling and replacing


def test_cancelling_who_was_let_go_passes_the_place_on():
    held, (first, second, third) = running_and_blocked(4)
    lifecycle.complete_many([completion(held)], using="default")

    assert first.cancel()

    assert stands(first) == ("cancelled", None)
    assert stands(second) == ("created", line_of(second))
    assert statuses(third) == ["blocked"]


def test_cancelling_who_waits_lets_nobody_go():
    held, (first, second) = running_and_blocked(3)

    assert lifecycle.cancel([first.pk, held.id, -1], using="default") == 1

    assert stands(first) == ("cancelled", None)
    assert statuses(second) == ["blocked"]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_cancelling_in_a_long_transaction_holds_nobody_up():
    held, (first, second, third) = running_and_blocked(4)
    lifecycle.complete_many([completion(held)], using="default")

    with transaction.atomic():
        assert lifecycle.cancel([first.pk, second.pk], using="default") == 2
        # Nobody sees it yet, so the place is the first one's.
        outside(lambda: lifecycle.release([held], using="default"))
        late = outside(one.schedule)
        assert outside(claim) == []
        assert outside(lambda: statuses(third, late)) == ["blocked", "blocked"]

    assert stands(third) == ("created", line_of(third))
    assert ids(claim()) == [third.pk]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_call_ends_though_the_next_one_is_being_cancelled():
    held, (first, second) = running_and_blocked(3)

    with transaction.atomic():
        assert first.cancel()
        outside(lambda: lifecycle.complete_many([completion(held)], using="default"))

    assert stands(second) == ("created", line_of(second))


def test_a_cancelled_row_that_is_made_due_again_stands_in_no_line():
    held, (waits,) = running_and_blocked()
    waits.cancel()

    assert waits.retry_now()

    assert stands(waits) == ("created", None)
    assert claim() == []
    assert statuses(waits) == ["blocked"]
    released(held)


def keyed(key):
    return tasks.insert.using(unique_key="u", on_conflict="replace", concurrency=key)


@pytest.mark.parametrize("key", [Concurrency(1, key=lambda: "other"), None])
def test_replacing_who_was_let_go_passes_the_place_on(key):
    held, _ = running_and_blocked(1)
    keyed(Concurrency(1, key=lambda: tasks.nothing.name)).schedule("a")
    second = one.schedule()
    assert claim() == []
    lifecycle.complete_many([completion(held)], using="default")

    replaced = keyed(key).schedule("b")

    assert stands(replaced) == ("created", None)
    assert stands(second) == ("created", line_of(second))
    assert sorted(ids(claim())) == [replaced.pk, second.pk]


@pytest.mark.server
@pytest.mark.parametrize("count", [1, 5, 20])
def test_those_behind_many_who_are_being_cancelled_are_not_forgotten(count):
    held, rest = running_and_blocked(count + 3)
    first, second = rest[count:]
    are_cancelled, may_commit = threading.Event(), threading.Event()

    def person():
        with transaction.atomic():
            cancelled = lifecycle.cancel([row.pk for row in rest[:count]], using="default")
            are_cancelled.set()
            may_commit.wait(10)
        return cancelled

    cancelling = Concurrent(person)
    assert are_cancelled.wait(10)
    lifecycle.complete_many([completion(held)], using="default")
    may_commit.set()

    assert cancelling.result(timeout_seconds=10) == count
    assert statuses(first, second) == ["created", "blocked"]
    assert ids(claim()) == [first.pk]


def test_replacing_who_waits_takes_it_out_of_the_line():
    held, _ = running_and_blocked(1)
    waits = keyed(Concurrency(1, key=lambda: tasks.nothing.name)).schedule("a")
    assert claim() == []
    assert stands(waits) == ("blocked", f"c:{tasks.nothing.name}")

    replaced = keyed(None).schedule("b", eta=ago(-3600))

    assert replaced.pk == waits.pk
    assert (replaced.status, replaced.limit_key, replaced.concurrency_key) == (
        "created",
        None,
        None,
    )
    released(held)


# --- what is lost all the same


def test_a_sweep_lets_go_whom_everybody_has_forgotten_and_says_so(caplog):
    held, (waits,) = running_and_blocked()
    TaskModel.objects.filter(pk=held.id).delete()

    assert admission.sweep("", using="default") == ""

    assert statuses(waits) == ["created"]
    assert "Let 1 tasks go that a limit held back although there was room" in caplog.text


def test_a_sweep_that_finds_nothing_changes_nothing_and_says_nothing(caplog):
    held, rest = running_and_blocked(4)

    admission.sweep("", using="default")

    assert statuses(*rest) == ["blocked"] * 3
    assert ConcurrencySlot.objects.count() == 1
    assert not caplog.records
    released(held)


def test_a_sweep_goes_on_where_the_last_one_ended():
    for n in range(5):
        plant(1, status="blocked")
        row = TaskModel.objects.latest("id")
        TaskModel.objects.filter(pk=row.pk).update(limit_key=f"c:{n}", max_concurrent=1)

    with mock.patch.object(admission, "SWEEP_MAX", 2):
        ends = [after := ""] + [after := admission.sweep(after, using="default") for _ in range(3)]

    assert ends == ["", "c:1", "c:3", ""]
    assert set(TaskModel.objects.values_list("status", flat=True)) == {"created"}


def test_a_sweep_deletes_the_slots_that_nobody_stands_at():
    held, _ = running_and_blocked(1)
    ConcurrencySlot.objects.bulk_create([ConcurrencySlot(key=f"old-{n}") for n in range(3)])

    admission.sweep("", using="default")

    assert [slot.key for slot in ConcurrencySlot.objects.all()] == [tasks.nothing.name]
    released(held)


def test_a_new_call_lets_those_go_that_wait_in_vain():
    held, (waits,) = running_and_blocked()
    TaskModel.objects.filter(pk=held.id).delete()
    one.schedule()

    assert ids(claim()) == [waits.pk]


def test_consumers_sweep_from_time_to_time(jobs):
    jobs(LEASE_SECONDS=0.3)
    held, (waits,) = running_and_blocked()
    TaskModel.objects.filter(pk=held.id).delete()

    with consuming():
        eventually(lambda: assert_all("completed", [waits]), timeout_seconds=30)


# --- what it costs


def test_without_limits_no_statement_is_sent_for_them():
    row, other = tasks.nothing.schedule(), tasks.insert.schedule("x")

    with captured_statements() as statements:
        claims = claim()
        lifecycle.complete_many([completion(claims[0])], using="default")
        with transaction.atomic():
            lifecycle.complete(completion(claims[1]), using="default")

    assert not any("slot" in sql or "bucket" in sql for sql, _ in statements)
    reads = [sql for sql, _ in about_tasks(statements) if sql.startswith("SELECT")]
    assert not any("limit_key" in sql for sql in reads if "FOR UPDATE" not in sql)
    assert statuses(row, other) == ["completed", "completed"]


def test_a_thousand_blocked_calls_do_not_slow_the_claim_of_others():
    plant(1_000, status="blocked")
    TaskModel.objects.update(limit_key="c:full", concurrency_key="full", max_concurrent=1)
    plant(100)
    analyze()

    with captured_statements() as statements:
        claims = claim(limit=10)

    assert len(claims) == 10
    lifecycle.release(claims, using="default")
    for sql, params in about_tasks(statements):
        if "MAX(" not in sql and "WHERE id IN (%s" not in sql:
            assert CLAIM_INDEX in indexes_used(sql, params), sql
        assert rows_read(sql, params) <= 12 * 10 + 120, sql


def test_freeing_a_place_and_taking_it_cost_the_same_before_a_thousand_waiting_calls():
    held, _ = running_and_blocked(1)
    plant(5_000, status="blocked")
    blocked = TaskModel.objects.filter(status="blocked")
    blocked.update(limit_key=f"c:{one_key}", concurrency_key=one_key, max_concurrent=1)
    plant(5_000, status="completed")
    analyze()

    with captured_statements() as statements:
        lifecycle.complete_many([completion(held)], using="default")
        (held,) = claim()

    assert blocked.count() == 4_999
    reads = [item for item in about_tasks(statements) if item[0].startswith("SELECT")]
    waits = [item for item in reads if "blocked" in item[1]]
    assert waits
    for sql, params in waits:
        assert LIMIT_INDEX in indexes_used(sql, params), sql
    for sql, params in reads:
        assert rows_read(sql, params) <= 200, sql
