"""Rate limits: no more start than there are tokens, in order, and none is forgotten."""

import threading
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise

import pytest
from django.db.models import Max, Min

from firefly_jobs import Concurrency, RateLimit, admission, fencing, leases, lifecycle, lines, task
from firefly_jobs.databases import Completion
from firefly_jobs.databases.functions import DatabaseMicroseconds, DatabaseNow
from firefly_jobs.limits import Rate
from firefly_jobs.models import RateBucket, TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    ago,
    captured_statements,
    claim,
    consuming,
    dead_consumer,
    run_burst,
    run_until_ended,
    schedule,
)
from tests.support.threads import Concurrent
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)

# So slow that no test sees a second token, unless it moves the bucket.
slow = tasks.nothing.using(rate_limit="1/h")
NAME = tasks.nothing.name


@task(rate_limit=RateLimit("2/h", key="user_id"))
def sync(user_id, *, depth=1):
    return user_id


def by(key):
    return RateLimit("1/s", key)


def stands(row):
    return TaskModel.objects.values_list("status", "limit_key").get(pk=row.pk)


def statuses(*rows):
    found = dict(TaskModel.objects.values_list("pk", "status"))
    return [found[row.pk] for row in rows]


def ids(claims):
    return [item.id for item in claims]


def moment_of(moment):
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=moment)


def time_passes(**much):
    """Let the tokens of ``much`` time drip into all buckets, and what waits for them be due."""
    for bucket in RateBucket.objects.all():
        bucket.spent_until -= round(timedelta(**much) / timedelta(microseconds=1))
        bucket.save()
    for row in TaskModel.objects.filter(status="created", not_before__isnull=False):
        moment = row.run_at - timedelta(**much)
        TaskModel.objects.filter(pk=row.pk).update(not_before=moment)


def assert_within(rate, moments):
    """Assert that no window of ``moments`` has more than the bucket gives."""
    ordered = sorted(moments)
    for first, start in enumerate(ordered):
        for count, end in enumerate(ordered[first:], 1):
            drips = Fraction((end - start) // timedelta(microseconds=1), rate.interval)
            assert count <= rate.count + drips, (first, count, end - start)


def complete(held):
    done = Completion(held.id, held.fence, 0.1, "x", is_limited=held.is_limited)
    assert lifecycle.complete_many([done], using="default") == []


# --- what the row carries


def test_rows_carry_the_rate_in_seconds_and_the_key():
    rows = [
        slow.schedule(),
        sync.schedule(5),
        tasks.nothing.job.with_rate_limit("3/10s").schedule(),
    ]

    for row in rows:
        row.refresh_from_db()
    assert [(row.rate_key, row.rate_limit) for row in rows] == [
        (NAME, "1/3600"), (f"{sync.name}[user_id=5]", "2/3600"), (NAME, "3/10"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        ("fast", ValueError, "rate_limit must be calls per second"),
        (by(lambda key: 5), TypeError, "The key of rate_limit must be text or"),
        (by(lambda key: "x" * 256), ValueError, "must have 1 to 255 characters"),
        (by(lambda key: 1 / 0), ZeroDivisionError, "division by zero"),
        (by("keys"), ValueError, r"is 'keys', .* Did you mean 'key'\?"),
    ],
)
def test_a_bad_rate_or_key_is_refused_and_nothing_is_written(limit, error, message):
    with pytest.raises(error, match=message):
        tasks.insert.using(rate_limit=limit).schedule("a")

    assert not TaskModel.objects.exists()


def test_the_clock_of_buckets_is_that_of_rows():
    slow.schedule()

    ((now, moment),) = TaskModel.objects.values_list(DatabaseNow(), DatabaseMicroseconds())

    assert abs(moment_of(moment) - now) <= timedelta(milliseconds=2)


# --- tokens


def test_as_many_start_at_once_as_the_bucket_holds_and_the_next_at_the_next_permitted_moment():
    rows = [tasks.nothing.using(rate_limit="3/h").schedule() for _ in range(6)]

    claims = claim()

    assert ids(claims) == [row.pk for row in rows[:3]]
    bucket = RateBucket.objects.get()
    told = TaskModel.objects.get(pk=rows[3].pk)
    permitted = moment_of(bucket.spent_until) - timedelta(minutes=40)
    assert stands(rows[3]) == ("created", f"r:{NAME}")
    assert timedelta(0) <= told.run_at - permitted <= timedelta(milliseconds=2)
    assert told.not_before == told.run_at
    assert told.run_at - told.created > timedelta(minutes=19)
    # Those behind it are not told yet: whoever has a higher priority may overtake them.
    assert [stands(row) for row in rows[4:]] == [("blocked", f"r:{NAME}")] * 2


def test_keys_have_buckets_of_their_own():
    rows = [sync.schedule(n % 2) for n in range(6)]

    assert sorted(ids(claim())) == [row.pk for row in rows[:4]]


def test_each_that_starts_lets_the_next_one_go_in_order_of_priority():
    first, low, high, middle = (
        slow.using(priority=priority).schedule() for priority in (9, -5, 5, 0)
    )
    order = ids(claim())
    assert order == [first.pk]

    for _ in range(3):
        time_passes(hours=1, seconds=1)
        order += ids(claim())

    assert order == [first.pk, high.pk, middle.pk, low.pk]
    assert RateBucket.objects.count() == 1


def test_who_comes_later_stands_behind_those_who_wait():
    second, third = waiting_for_tokens(2)
    time_passes(hours=3)
    late = slow.schedule()

    assert ids(claim()) == [second.pk]

    assert statuses(third, late) == ["created", "blocked"]


def test_after_a_pause_no_more_start_than_the_bucket_holds():
    rows = [tasks.nothing.using(rate_limit="2/h").schedule() for _ in range(8)]
    assert len(claim()) == 2
    time_passes(days=2)

    started = 0
    while claims := claim():
        started += len(claims)

    assert started == 2
    assert statuses(*rows).count("running") == 4


def test_a_bucket_that_a_slower_version_left_far_ahead_is_reined_in():
    RateBucket.objects.create(key=NAME, spent_until=10**16)
    row = tasks.nothing.using(rate_limit="10/s").schedule()

    run_until_ended(row)

    assert row.status == "completed"


@pytest.mark.parametrize("touches", [False, True])
def test_thirty_calls_on_two_consumers_stay_within_the_bucket_by_the_databases_clock(touches):
    limited = tasks.insert.using(rate_limit="10/s") if touches else None
    rows = [
        limited.schedule("x") if limited else schedule(lambda: None, rate_limit="10/s")
        for _ in range(30)
    ]

    with consuming(threads=2):
        run_until_ended(*rows, threads=2, timeout_seconds=60)

    started = list(TaskModel.objects.values_list("started", flat=True))
    assert_within(Rate(10, 1), started)
    assert set(TaskModel.objects.values_list("status", "limit_key")) == {("completed", None)}
    # Claimed, told its moment, claimed again: each row is touched a few times only.
    assert max(TaskModel.objects.values_list("fence", flat=True)) <= 4


def test_four_connections_that_claim_at_the_same_time_share_the_tokens():
    rows = [tasks.nothing.using(rate_limit="7/h").schedule() for _ in range(40)]
    start = threading.Barrier(4)

    def race(consumer):
        start.wait(10)
        return ids(claim(limit=10, consumer=consumer))

    racers = [Concurrent(race, n) for n in range(1, 5)]
    admitted = [pk for racer in racers for pk in racer.result(timeout_seconds=30)]

    assert len(set(admitted)) == len(admitted) == 7
    assert statuses(*rows).count("running") == 7
    assert statuses(*rows).count("created") == 1


def test_replacing_who_was_let_go_passes_its_own_moment_on_and_not_the_new_one():
    debounced = tasks.nothing.using(rate_limit="1/h", on_conflict="replace")
    rows = [debounced.using(unique_key=f"key-{n}").schedule() for n in range(4)]
    claim()
    RateBucket.objects.update(spent_until=DatabaseMicroseconds() + 500_000)
    lines.free([f"r:{NAME}"], using="default")
    let_go = TaskModel.objects.get(status="created", limit_key__isnull=False)

    replaced = debounced.using(unique_key=let_go.unique_key).schedule(eta=ago(-86_400))

    assert (replaced.pk, replaced.limit_key) == (let_go.pk, None)
    successor = TaskModel.objects.get(status="created", limit_key__isnull=False)
    assert successor.pk in {row.pk for row in rows} - {let_go.pk}
    assert successor.not_before == let_go.not_before


def test_a_retry_takes_another_token():
    row = schedule(lambda: 1 / 0, rate_limit="1/h", max_retries=1, retry_delay=0)
    run_burst()

    assert stands(row) == ("created", f"r:{tasks.call.name}")
    row.refresh_from_db()
    assert (row.retry_attempts, row.fence) == (1, 2)
    assert row.run_at - row.created > timedelta(minutes=59)


def test_a_call_that_is_too_late_takes_no_token():
    late = slow.schedule()
    TaskModel.objects.filter(pk=late.pk).update(expires_at=ago(60))

    run_burst()

    assert statuses(late) == ["cancelled"]
    assert not RateBucket.objects.exists()


# --- who was let go and does not start


def waiting_for_tokens(count):
    """Let one start; return the others, of which the first is let go."""
    first, *rest = [slow.schedule() for _ in range(count + 1)]
    assert ids(claim(consumer=10**6)) == [first.pk]
    assert statuses(*rest) == ["created"] + ["blocked"] * (count - 1)
    return rest


def test_cancelling_who_was_told_a_moment_passes_it_on():
    first, second, third = waiting_for_tokens(3)
    first.refresh_from_db()

    assert first.cancel()

    assert stands(first) == ("cancelled", None)
    assert stands(second) == ("created", f"r:{NAME}")
    second.refresh_from_db()
    assert second.not_before == first.not_before
    assert statuses(third) == ["blocked"]


@pytest.mark.parametrize("end", ["release", "bury", "rescue"])
def test_a_claim_that_was_never_admitted_takes_no_token_and_lets_the_next_one_go(end):
    first, second = waiting_for_tokens(2)
    time_passes(hours=1, seconds=1)
    dead = dead_consumer()
    (raw,) = lifecycle.claim(
        using="default", consumer=dead.pk, queue="default", priority=0, limit=1
    )
    assert raw.id == first.pk
    before = RateBucket.objects.get().spent_until

    if end == "release":
        strays = fencing.strays_of(dead.pk, held=set(), using="default")
        assert lifecycle.release(strays, using="default") == 1
    elif end == "bury":
        leases.bury(dead.pk, using="default")
    else:
        (suspect,) = leases.suspects(using="default", besides=0)
        leases.rescue(suspect, using="default")

    assert stands(first) == ("created", None)
    assert stands(second) == ("created", f"r:{NAME}")
    assert RateBucket.objects.get().spent_until == before


def test_a_sweep_finds_who_waits_for_tokens_in_vain_and_deletes_full_buckets(caplog):
    first, second = waiting_for_tokens(2)
    TaskModel.objects.filter(pk=first.pk).delete()
    RateBucket.objects.create(key="full", spent_until=0)

    admission.sweep("", using="default")

    assert stands(second) == ("created", f"r:{NAME}")
    assert "Let 1 tasks go that a limit held back" in caplog.text
    assert [bucket.key for bucket in RateBucket.objects.all()] == [NAME]


def test_a_sweep_says_nothing_while_tokens_are_what_is_missing(caplog):
    waiting_for_tokens(3)

    admission.sweep("", using="default")

    assert not caplog.records


# --- both limits


both = tasks.nothing.using(concurrency=1, rate_limit="2/h")


def test_without_a_free_slot_no_token_is_taken():
    _, second, third = (both.schedule() for _ in range(3))
    (held,) = claim()
    interval = Rate(2, 3600).interval
    before = RateBucket.objects.get().spent_until

    assert [stands(row) for row in (second, third)] == [("blocked", f"c:{NAME}")] * 2
    complete(held)
    (held,) = claim()
    assert (held.id, stands(second)) == (second.pk, ("running", f"c:{NAME}"))
    assert RateBucket.objects.get().spent_until == before + interval
    complete(held)
    assert claim() == []
    assert stands(third) == ("created", f"r:{NAME}")
    time_passes(hours=1)
    assert ids(claim()) == [third.pk]
    assert stands(third) == ("running", f"c:{NAME}")


def test_calls_with_both_limits_all_run_within_both():
    running, most, lock = 0, 0, threading.Lock()

    def body():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1

    rows = [schedule(body, concurrency=Concurrency(2), rate_limit="20/s") for _ in range(50)]

    with consuming(threads=3):
        run_until_ended(*rows, threads=3, timeout_seconds=60)

    assert most <= 2
    assert_within(Rate(20, 1), TaskModel.objects.values_list("started", flat=True))


# --- what it costs


def test_rows_with_concurrency_only_ask_no_bucket_and_the_other_way_round():
    tasks.nothing.using(concurrency=1).schedule()
    with captured_statements() as statements:
        assert len(claim()) == 1
    assert not any("ratebucket" in sql for sql, _ in statements)

    slow.schedule()
    with captured_statements() as statements:
        assert len(claim()) == 1
    assert not any("concurrencyslot" in sql for sql, _ in statements)


def test_as_many_as_start_within_a_second_are_told_their_moment_at_once():
    rows = [tasks.nothing.using(rate_limit="20/s").schedule() for _ in range(60)]

    claims = claim(limit=100)

    assert len(claims) >= 20
    told = TaskModel.objects.filter(status="created", limit_key__isnull=False)
    assert 15 <= told.count() <= lines.LET_GO_MAX
    assert statuses(*rows).count("blocked") > 0
    moments = list(told.order_by("id").values_list("run_at", flat=True))
    assert moments == sorted(moments)
    pauses = {later - earlier for earlier, later in pairwise(moments)}
    assert pauses == {timedelta(milliseconds=50)}


def test_consumers_start_who_was_told_a_moment_without_being_called():
    rows = [schedule(lambda: None, rate_limit="2/s") for _ in range(4)]

    with consuming():
        eventually(lambda: assert_completed(rows), timeout_seconds=20)

    bounds = TaskModel.objects.aggregate(first=Min("started"), last=Max("started"))
    assert timedelta(seconds=0.99) <= bounds["last"] - bounds["first"] < timedelta(seconds=6)


def assert_completed(rows):
    assert set(statuses(*rows)) == {"completed"}
