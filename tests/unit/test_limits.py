"""Limits as values: what they mean, what their keys are, when a token is there."""

from datetime import date
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs import Concurrency, RateLimit
from firefly_jobs.limits import (
    CONCURRENT_MAX,
    LINE_LENGTH_MAX,
    RATE_COUNT_MAX,
    RATE_LENGTH_MAX,
    SECOND,
    Rate,
    as_concurrency,
    as_rate_limit,
    bucket_line,
    key_of,
    moments,
    places,
    slot_line,
)
from firefly_jobs.options import KEY_LENGTH_MAX, TaskOptions

NOW = 1_800_000_000 * SECOND
rates = st.builds(
    Rate, st.integers(min_value=1, max_value=500), st.integers(min_value=1, max_value=86_400)
)
small_rates = st.builds(
    Rate, st.integers(min_value=1, max_value=7), st.integers(min_value=1, max_value=100)
)


def no_arguments():
    raise AssertionError


# --- options


@pytest.mark.parametrize("value", [0, -1, CONCURRENT_MAX + 1])
def test_a_number_of_calls_that_is_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"max_concurrent must be between 1 and .*, got {value}"):
        Concurrency(value)


@pytest.mark.parametrize("value", [True, 1.0, "3"])
def test_a_number_of_calls_is_a_whole_number(value):
    with pytest.raises(TypeError, match="max_concurrent must be a whole number"):
        Concurrency(value)


@pytest.mark.parametrize("value", ["3", 2.5, True])
def test_the_option_concurrency_is_a_number_or_a_value(value):
    with pytest.raises(TypeError, match="concurrency must be a whole number or a value such as"):
        TaskOptions(concurrency=value)


@pytest.mark.parametrize(
    "kind", [lambda key: Concurrency(1, key), lambda key: RateLimit("1/s", key)]
)
def test_a_key_is_a_name_a_callable_or_none(kind):
    with pytest.raises(TypeError, match=r"The key of \w+ must be a parameter's name, .* got a int"):
        kind(5)
    with pytest.raises(TypeError, match=r"The key of \w+ takes arguments by position"):
        kind(lambda *key: "k")


def test_short_forms_stand_for_all_calls_of_the_task():
    words: dict[str, Any] = {"concurrency": 3, "rate_limit": "100/m"}

    options = TaskOptions(**words)

    assert options.concurrency == Concurrency(3) == as_concurrency(Concurrency(3))
    assert options.rate_limit == RateLimit("100/m") == as_rate_limit(RateLimit("100/m"))
    assert (TaskOptions().concurrency, TaskOptions().rate_limit) == (None, None)


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("5/s", "5/1"),
        ("100/m", "100/60"),
        ("1000/h", "1000/3600"),
        ("10/d", "10/86400"),
        ("3/10s", "3/10"),
        (" 3 / 2 m ", "3/120"),
    ],
)
def test_rates_are_read_and_stored_in_seconds(text, stored):
    rate = RateLimit(text).parsed

    assert str(rate) == stored
    assert Rate.from_text(stored) == rate


@pytest.mark.parametrize(
    "text", ["", "5", "5/", "/s", "5/x", "5/week", "5/60", "-5/s", "1.5/s", "5/s/s"]
)
def test_a_malformed_rate_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=r"rate_limit must be calls per second, .* '100/m'"):
        RateLimit(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/s", "must permit 1 to"),
        (f"{RATE_COUNT_MAX + 1}/s", "must permit 1 to"),
        ("1/0s", "The period of rate_limit must be 1 to"),
        ("1/99999d", "The period of rate_limit must be 1 to"),
    ],
)
def test_a_rate_out_of_range_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RateLimit(text)


@pytest.mark.parametrize("value", [5, 1.5, b"5/s", ("5", "s")])
def test_a_rate_is_text(value):
    with pytest.raises(TypeError, match="rate_limit must be text such as '100/m'"):
        TaskOptions(rate_limit=value)


def test_what_rows_carry_fits_their_columns():
    assert len(slot_line("x" * KEY_LENGTH_MAX)) == len(bucket_line("x" * KEY_LENGTH_MAX))
    assert len(slot_line("x" * KEY_LENGTH_MAX)) == LINE_LENGTH_MAX
    assert len(str(Rate(RATE_COUNT_MAX, 2**31 - 1))) <= RATE_LENGTH_MAX
    assert slot_line("x") < bucket_line("a")  # slots are locked before buckets


# --- keys


def test_without_a_key_all_calls_of_the_task_count_together():
    assert key_of("concurrency", None, task="shop.sync", arguments=no_arguments) == "shop.sync"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (5, "5"),
        ("a b ", "a b "),
        (None, "None"),
        (True, "True"),
        ("5", "5"),  # the same as the number, as in a URL
        (5.0, "5.0"),
        (Decimal("1.50"), "1.50"),
        (date(2026, 1, 2), "2026-01-02"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ],
)
def test_a_parameters_value_is_part_of_the_key_behind_the_tasks_name(value, text):
    key = key_of("concurrency", "user", task="shop.sync", arguments=lambda: {"user": value})

    assert key == f"shop.sync[user={text}]"


def test_the_text_of_a_callable_is_the_key_itself():
    key = key_of(
        "rate_limit",
        lambda user: f"api-{user}",
        task="shop.sync",
        arguments=lambda: {"user": 5, "depth": 1},
    )

    assert key == "api-5"


def test_a_value_without_a_text_of_its_own_is_refused_and_not_quoted():
    with pytest.raises(
        TypeError, match=r"'user', a list, which has no text .* key=lambda user"
    ) as caught:
        key_of("concurrency", "user", task="shop.sync", arguments=lambda: {"user": ["secret"]})

    assert "secret" not in str(caught.value)


def test_a_callable_that_raises_says_for_which_option():
    with pytest.raises(ZeroDivisionError) as caught:
        key_of("rate_limit", lambda user: user / 0, task="shop.sync", arguments=lambda: {"user": 1})

    assert caught.value.__notes__ == [
        "Raised by the key of rate_limit, so the call of 'shop.sync' was not scheduled."
    ]


def test_an_argument_that_the_call_does_not_have_is_refused():
    with pytest.raises(ValueError, match="the argument 'user', which this call of 'f' does not"):
        key_of("concurrency", "user", task="f", arguments=dict)


# --- tokens


@given(rate=small_rates, data=st.data())
def test_no_window_has_more_starts_than_a_full_bucket_and_what_drips_into_it(rate, data):
    # None: until the very moment at which the next token is there.
    gap = st.none() | st.integers(min_value=0, max_value=3 * rate.interval)
    bucket, now, starts = 0, NOW, []
    for pause in data.draw(st.lists(gap, min_size=1, max_size=50)):
        now = rate.permitted_at(bucket, now=now) if pause is None else now + pause
        for _ in range(rate.count + 1):
            if rate.permitted_at(bucket, now=now) > now:
                break
            bucket = rate.taken(bucket, now=now)
            starts.append(now)

    for first, start in enumerate(starts):
        for count, end in enumerate(starts[first:], 1):
            most = rate.count + Fraction(end - start, SECOND) * rate.count / rate.period_seconds
            assert count <= most


@given(rate=rates)
def test_a_full_bucket_has_as_many_tokens_as_the_rate_says_and_no_more(rate):
    bucket, taken = 0, 0
    while taken <= rate.count and rate.permitted_at(bucket, now=NOW) <= NOW:
        bucket = rate.taken(bucket, now=NOW)
        taken += 1

    assert taken == rate.count
    assert rate.reined(bucket, now=NOW) == bucket


@given(rate=rates, ahead=st.integers(min_value=0, max_value=100), spent=st.integers(-10, 10**9))
def test_who_starts_at_the_moment_that_it_was_told_finds_its_token(rate, ahead, spent):
    bucket = rate.reined(NOW + spent, now=NOW)
    told = rate.permitted_at(bucket, now=NOW, ahead=ahead)
    for _ in range(ahead):
        bucket = rate.taken(bucket, now=rate.permitted_at(bucket, now=NOW))

    assert rate.permitted_at(bucket, now=told) == told


def test_a_bucket_too_far_ahead_is_as_an_empty_one():
    rate = Rate(10, 60)

    bucket = rate.reined(NOW + 86_400 * SECOND, now=NOW)

    assert rate.permitted_at(bucket, now=NOW) == NOW + 6 * SECOND


def test_moments_come_one_interval_after_the_other():
    rate = Rate(10, 1)

    found = moments([rate] * 15, 0, now=NOW, ahead=0, most=50, within=SECOND)

    assert [moment - NOW for moment in found] == [*[0] * 10, *range(100_000, 600_000, 100_000)]


def test_moments_lie_within_a_second_but_for_the_first():
    slow, fast, empty = Rate(1, 60), Rate(20, 1), NOW + 60 * SECOND

    assert moments([slow] * 3, empty, now=NOW, ahead=0, most=50, within=SECOND) == [empty]
    assert moments([slow] * 3, empty, now=NOW, ahead=1, most=50, within=SECOND) == []
    spent = NOW + SECOND
    assert len(moments([fast] * 99, spent, now=NOW, ahead=0, most=50, within=SECOND)) == 20
    assert len(moments([fast] * 99, spent, now=NOW, ahead=45, most=50, within=9 * SECOND)) == 5


# --- places


@given(
    maxima=st.lists(st.integers(min_value=1, max_value=9), max_size=20),
    occupied=st.integers(min_value=0, max_value=20),
)
def test_nobody_is_let_go_beyond_what_he_himself_permits(maxima, occupied):
    count = places(maxima, occupied=occupied)

    assert all(occupied + place < most for place, most in enumerate(maxima[:count]))
    assert count == len(maxima) or occupied + count >= maxima[count]
