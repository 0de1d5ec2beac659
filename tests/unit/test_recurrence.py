"""Intervals, and what is due, against somebody who lists every occurrence."""

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from itertools import islice, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly_jobs.conf import DURATION_SECONDS_MAX
from firefly_jobs.cron import parse
from firefly_jobs.recurrence import MISFIRES, Interval, due, interval_in_words, jitter_seconds

INSTANT = timedelta(microseconds=1)
# The night in which Oslo sets its clocks forward.
START = datetime(2026, 3, 28, 22, tzinfo=UTC)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

moments = st.integers(0, 40 * 60).map(lambda minutes: START + timedelta(minutes=minutes))
instants = st.integers(-(10**15), 10**16).map(lambda number: EPOCH + number * INSTANT)
steps = st.integers(10**6, 10**11) | st.sampled_from([10**6, 10**6 + 1, 3_600 * 10**6])
recurrences = st.one_of(
    st.integers(60, 7_000).map(lambda seconds: Interval(seconds, START)),
    st.sampled_from(["*/7 * * * *", "0 * * * *", "30 2 * * *", "15 1-4 * * *"]).map(
        lambda expression: parse(expression, timezone="Europe/Oslo")
    ),
)


def microseconds(moment):
    return (moment - EPOCH) // INSTANT


# --- intervals


@given(steps, instants, instants)
@settings(max_examples=200, deadline=None)
def test_an_interval_counts_whole_steps_from_its_anchor(step, anchor, moment):
    interval = Interval(timedelta(microseconds=step), anchor)
    first, second = interval.upcoming(moment, 2)

    assert first == interval.next_after(moment)
    assert moment < first <= moment + step * INSTANT
    assert (microseconds(first) - microseconds(anchor)) % step == 0
    assert second - first == step * INSTANT
    assert interval.latest_until(moment) == first - step * INSTANT
    assert interval.latest_until(first) == first


@pytest.mark.parametrize("seconds", [1, 1.5, 0.1 + 0.9, 3_600, 86_400 * 30, DURATION_SECONDS_MAX])
def test_intervals_do_not_drift(seconds):
    interval = Interval(seconds, START)
    far = START + 100 * timedelta(seconds=seconds)

    assert interval.latest_until(far) == far
    assert interval.next_after(far - INSTANT) == far
    assert interval.next_after(far) == far + timedelta(seconds=seconds)


def test_an_interval_takes_no_notice_of_clocks_that_are_set():
    interval = Interval(3_600, START)

    assert interval.upcoming(START, 4) == [START + timedelta(hours=n) for n in range(1, 5)]


def test_moments_of_any_zone_are_understood_and_returned_in_utc():
    tokyo = timezone(timedelta(hours=9))
    interval = Interval(timedelta(hours=1), START.astimezone(tokyo))

    found = interval.next_after(START.astimezone(tokyo))

    assert (interval.seconds, interval) == (3_600.0, Interval(3_600, START))
    assert (found, found.tzinfo) == (START + timedelta(hours=1), UTC)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "1 s"),
        (1.5, "1.5 s"),
        (59.000001, "59.000001 s"),
        (90, "1 min 30 s"),
        (5400, "1 h 30 min"),
        (86400, "1 d"),
        (30 * 86400, "30 d"),
        (90061.25, "1 d 1 h 1 min 1.25 s"),
    ],
)
def test_an_interval_in_words_is_exact(seconds, words):
    assert interval_in_words(seconds) == words


def test_an_interval_ends_with_the_calendar():
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
    interval = Interval(86_400, START)

    assert interval.latest_until(first) is None
    assert len(interval.upcoming(last - timedelta(days=3), 9)) == 3
    with pytest.raises(ValueError, match=r"Nothing fires after .*: the calendar ends"):
        interval.next_after(last)


@pytest.mark.parametrize(
    "seconds",
    [
        *(0, -1, 0.5, 0.999_999, 2**31, float("nan"), float("inf"), True, "60", None, Decimal(60)),
        *(timedelta(0), timedelta(milliseconds=999), timedelta.max),
    ],
)
def test_intervals_that_are_refused(seconds):
    with pytest.raises(ValueError, match="An interval must be 1 to 2147483647 seconds") as caught:
        Interval(seconds, START)
    assert repr(seconds) in str(caught.value)


def test_an_interval_without_a_time_zone_is_refused():
    naive = START.replace(tzinfo=None)
    with pytest.raises(ValueError, match="The anchor of an interval must be an aware datetime"):
        Interval(60, naive)
    interval = Interval(60, START)
    for call in (interval.next_after, interval.latest_until, interval.following):
        with pytest.raises(ValueError, match="moment must be an aware datetime"):
            call(naive)


# --- what is due


def listed(recurrence, first, last):
    """Return the occurrences after ``first``, until one is later than ``last``."""
    found = []
    for moment in recurrence.following(first):
        found.append(moment)
        if moment > last:
            return found
    raise AssertionError(last)


@given(
    recurrence=recurrences,
    planned=moments,
    off_beat=st.sampled_from([timedelta(0), timedelta(0), timedelta(seconds=30)]),
    now=moments,
    misfire=st.sampled_from(MISFIRES),
    ends=st.none() | moments,
    limit=st.integers(1, 50),
    grace=st.sampled_from([0, 59, 60, 600, 3_600]),
)
@settings(max_examples=400, deadline=None)
def test_what_is_due_is_what_a_list_of_all_says(
    *, recurrence, planned, off_beat, now, misfire, ends, limit, grace
):
    next_run = recurrence.next_after(planned) + off_beat
    every = [next_run, *listed(recurrence, next_run, max(now, next_run))]
    allowed = [one for one in every if ends is None or one <= ends]
    missed = [one for one in allowed if one <= now]
    if misfire == "all":
        wanted = missed[:limit]
        rest = allowed[len(wanted) :]
    else:
        is_fresh = missed and now - missed[-1] <= timedelta(seconds=grace)
        wanted = missed[-1:] if misfire == "once" or is_fresh else []
        rest = [one for one in allowed if one > now]

    found = due(
        recurrence,
        next_run=next_run,
        now=now,
        misfire=misfire,
        ends=ends,
        limit=limit,
        grace_seconds=grace,
    )

    assert list(found.occurrences) == wanted
    assert found.next_run == (rest[0] if rest else None)


@given(recurrences, st.lists(moments, min_size=1, max_size=8).map(sorted), st.none() | moments)
@settings(max_examples=100, deadline=None)
def test_whoever_looks_again_and_again_fires_each_occurrence_once(recurrence, looks, ends):
    first = next_run = recurrence.next_after(START)
    fired: list[datetime] = []
    for now in looks:
        for _ in range(2_500):  # as many minutes as there are, and more
            found = due(recurrence, next_run=next_run, now=now, misfire="all", ends=ends, limit=3)
            fired += found.occurrences
            next_run = found.next_run
            if next_run is None or next_run > now:
                break
        if next_run is None:
            break

    last = looks[-1] if ends is None else min(looks[-1], ends)
    wanted = takewhile(lambda one: one <= last, recurrence.following(first - INSTANT))
    assert fired == list(wanted)


@pytest.mark.parametrize(
    ("misfire", "late", "fires"),
    [
        ("skip", timedelta(seconds=60), True),
        ("skip", timedelta(seconds=60) + INSTANT, False),
        ("once", timedelta(seconds=3_599), True),
    ],
)
def test_how_late_is_missed(misfire, late, fires):
    found = due(Interval(3_600, START), next_run=START, now=START + late, misfire=misfire)

    assert found == ((START,) if fires else (), START + timedelta(hours=1))


@pytest.mark.parametrize("misfire", MISFIRES)
def test_an_occurrence_at_the_very_end_fires_and_is_the_last(misfire):
    found = due(Interval(60, START), next_run=START, now=START, misfire=misfire, ends=START)

    assert found == ((START,), None)


@pytest.mark.parametrize("misfire", MISFIRES)
def test_one_that_is_to_come_at_the_very_end_is_planned(misfire):
    interval, end = Interval(60, START), START + timedelta(seconds=60)

    assert due(interval, next_run=START, now=START, misfire=misfire, ends=end) == ((START,), end)
    assert due(interval, next_run=end, now=START, misfire=misfire, ends=end) == ((), end)


@pytest.mark.parametrize("misfire", MISFIRES)
def test_nothing_is_due_before_its_time(misfire):
    early = START - INSTANT
    interval = Interval(60, START)

    assert due(interval, next_run=START, now=early, misfire=misfire) == ((), START)
    assert due(interval, next_run=START, now=early, misfire=misfire, ends=early) == ((), None)


@pytest.mark.parametrize("text", ["* * * * *", "0-59 0-23 * * *"])
def test_what_is_made_up_for_after_years_is_found_in_one_walk(text):
    rule = parse(text, timezone="Europe/Oslo")
    walks = 0

    class Walking:
        def following(self, moment):
            nonlocal walks
            walks += 1
            return rule.following(moment)

    now = START + timedelta(days=3_650)
    found = due(Walking(), next_run=START, now=now, misfire="all")  # type: ignore[arg-type]

    assert len(found.occurrences) == 1_000
    assert found.occurrences == (START, *islice(rule.following(START), 999))
    assert (found.next_run, walks) == (rule.next_after(found.occurrences[-1]), 1)


def test_one_that_was_moved_by_hand_fires_when_it_was_moved_to():
    moved = START + timedelta(seconds=90)

    found = due(Interval(60, START), next_run=moved, now=moved, misfire="once")

    assert found == ((moved,), START + timedelta(seconds=120))


@pytest.mark.parametrize("misfire", MISFIRES)
def test_nothing_comes_after_the_end_of_the_calendar(misfire):
    interval = Interval(86_400, datetime(9999, 12, 31, tzinfo=UTC))
    last = interval.anchor

    assert due(interval, next_run=last, now=last, misfire=misfire) == ((last,), None)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"misfire": "none"}, r"misfire must be one of 'all', 'once', 'skip'.* got 'none'"),
        ({"limit": 0}, "limit 1 or more, got 'all' and 0"),
        ({"next_run": START.replace(tzinfo=None)}, "next_run must be an aware datetime"),
        ({"now": START.replace(tzinfo=None)}, "now must be an aware datetime"),
        ({"ends": START.replace(tzinfo=None)}, "ends must be an aware datetime"),
    ],
)
def test_questions_that_are_refused(words, reason):
    asked = {"next_run": START, "now": START, "misfire": "all"} | words
    with pytest.raises(ValueError, match=reason):
        due(Interval(60, START), **asked)


# --- jitter


@given(
    st.text(max_size=5),
    moments,
    st.floats(0, 10**6, allow_subnormal=False) | st.sampled_from([0.1, 1.0, 1 + 2**-52]),
)
@settings(max_examples=200, deadline=None)
def test_jitter_is_less_than_its_bound_and_the_same_in_any_zone(key, moment, jitter):
    found = jitter_seconds(key, moment, jitter)

    assert 0 <= found < jitter or found == jitter == 0
    assert jitter_seconds(key, moment.astimezone(timezone(timedelta(hours=5))), jitter) == found


def test_jitter_never_reaches_its_bound(monkeypatch):
    class Highest:
        def __init__(self, *_, **__):
            pass

        def digest(self):
            return b"\xff" * 8

    monkeypatch.setattr("firefly_jobs.recurrence.hashlib.blake2b", Highest)

    for jitter in (1.0, 1 + 2**-52, 1.5, 2 - 2**-52, 3.0, 600.0, 1e300):
        assert jitter_seconds("1", START, jitter) < jitter


def test_jitter_is_the_same_for_ever():
    # As a literal: another number would move what has been planned by another version.
    assert jitter_seconds("1", START, 10) == pytest.approx(8.984896294227, abs=1e-12)


def test_jitter_is_spread_over_keys_and_occurrences():
    keys = [jitter_seconds(f"{n}", START, 10) for n in range(200)]
    times = [jitter_seconds("1", START + timedelta(minutes=n), 10) for n in range(200)]

    for found in (keys, times):
        assert len(set(found)) == 200
        assert 4 < sum(found) / 200 < 6
