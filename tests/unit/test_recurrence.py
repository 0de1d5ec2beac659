from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly_jobs.cron import parse
from firefly_jobs.recurrence import Interval, due, jitter_seconds

START = datetime(2026, 3, 28, 22, tzinfo=UTC)
moments = st.integers(0, 40 * 60).map(lambda minutes: START + timedelta(minutes=minutes))
recurrences = st.one_of(
    st.integers(60, 7_000).map(lambda seconds: Interval(seconds, START)),
    st.sampled_from(["*/7 * * * *", "0 * * * *", "30 2 * * *", "15 1-4 * * *"]).map(
        lambda expression: parse(expression, timezone="Europe/Oslo")
    ),
)


def all_between(recurrence, first, last):
    found = []
    while first <= last:
        found.append(first)
        first = recurrence.next_after(first)
    return found


@given(
    recurrences,
    moments,
    moments,
    st.sampled_from(["all", "once", "skip"]),
    st.none() | moments,
    st.integers(1, 50),
    st.sampled_from([0, 60, 600]),
)
@settings(max_examples=500, deadline=None)
def test_what_is_due(recurrence, planned, now, misfire, ends, limit, grace):  # noqa: PLR0917
    first = recurrence.next_after(planned)
    last = now if ends is None else min(now, ends)
    missed = all_between(recurrence, first, last)
    if misfire == "all":
        wanted = missed[:limit]
    elif misfire == "once":
        wanted = missed[-1:]
    else:
        wanted = [one for one in missed[-1:] if now - one <= timedelta(seconds=grace)]
    following = first
    if missed:
        following = recurrence.next_after(wanted[-1] if misfire == "all" else now)
    if ends is not None and following > ends:
        following = None

    found = due(
        recurrence,
        next_run=first,
        now=now,
        misfire=misfire,
        ends=ends,
        limit=limit,
        grace_seconds=grace,
    )

    assert (list(found.occurrences), found.next_run) == (wanted, following)


def test_one_that_was_moved_by_hand_fires_when_it_was_moved_to():
    moved = START + timedelta(seconds=90)
    found = due(Interval(60, START), next_run=moved, now=moved, misfire="once")
    assert found == ((moved,), START + timedelta(seconds=120))


@pytest.mark.parametrize("seconds", [1, 1.5, 0.1 + 0.9, 3_600, 86_400 * 30])
def test_intervals_do_not_drift(seconds):
    interval = Interval(seconds, START)
    far = START + 10_000 * timedelta(seconds=seconds)
    assert interval.latest_until(far) == far
    assert interval.next_after(far - timedelta(microseconds=1)) == far
    assert interval.next_after(far) == far + timedelta(seconds=seconds)


def test_an_interval_takes_no_notice_of_clocks_that_are_set():
    interval = Interval(3_600, START)
    assert interval.upcoming(START, 4) == [START + timedelta(hours=n) for n in range(1, 5)]


@pytest.mark.parametrize(
    "seconds", [0, -1, 0.5, 2**31, float("nan"), float("inf"), True, "60", None]
)
def test_intervals_that_are_refused(seconds):
    with pytest.raises(ValueError, match="An interval must be 1 to 2147483647 seconds"):
        Interval(seconds, START)


def test_jitter_is_the_same_everywhere_and_spread():
    found = [jitter_seconds(f"{n}", START, 10) for n in range(200)]
    assert all(0 <= one < 10 for one in found)
    assert len(set(found)) == 200
    assert 4 < sum(found) / 200 < 6
    assert jitter_seconds("1", START, 10) == jitter_seconds("1", START, 10)
    assert jitter_seconds("1", START, 0) == 0
