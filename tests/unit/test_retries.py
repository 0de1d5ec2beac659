import json
import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs import retries
from firefly_jobs.retries import Exponential, Fixed, RandomDelay, RetryStrategy, fraction

ERROR = ValueError("no")

task_ids = st.integers(1, 2**63 - 1)
attempts = st.integers(1, 2_000)
durations = st.floats(0, 86_400) | st.integers(0, 86_400)
bounds = st.tuples(durations, durations).map(sorted)

strategies = st.one_of(
    st.builds(Fixed, st.integers(0, 50), durations, retry_on=st.sampled_from([(), (OSError,)])),
    st.builds(
        Exponential,
        st.integers(0, 50),
        durations,
        st.floats(1, 1_000),
        durations,
        st.floats(0, 1),
        retry_on=st.sampled_from([(), (OSError, "shop.errors.Sold")]),
    ),
    st.builds(lambda n, low_high: RandomDelay(n, *low_high), st.integers(0, 50), bounds),
)


class Mixin:
    """A base of an exception that is none itself, as in grpc's and many SDKs' errors."""


class MixedError(Mixin, ConnectionError):
    """An exception with a base that is no exception."""


@pytest.fixture
def kinds(monkeypatch):
    """Let a test define strategies that no other test sees."""
    found: dict[str, Any] = dict(retries._KINDS)
    monkeypatch.setattr(retries, "_KINDS", found)
    return found


def delays(strategy: RetryStrategy, *, attempts: int, task_id: int = 1) -> list[float | None]:
    return [
        strategy.delay_seconds(task_id=task_id, attempt=attempt, error=ERROR)
        for attempt in range(1, attempts + 1)
    ]


# --- the strategies


def test_fixed_waits_the_same_time_before_each_retry_and_then_gives_up():
    assert delays(Fixed(3, 2.5), attempts=5) == [2.5, 2.5, 2.5, None, None]


def test_exponential_doubles_up_to_its_longest_pause():
    strategy = Exponential(6, base_delay=1, max_delay=10)

    assert delays(strategy, attempts=7) == [1, 2, 4, 8, 10, 10, None]


def test_exponential_grows_by_its_factor():
    assert delays(Exponential(3, base_delay=2, factor=3), attempts=3) == [2, 6, 18]


def test_exponential_with_factor_one_does_not_grow():
    assert delays(Exponential(3, base_delay=5, factor=1), attempts=3) == [5, 5, 5]


@pytest.mark.parametrize("factor", [2, 2.0, 1e300])
def test_exponential_stays_at_its_longest_pause_where_floats_end(factor):
    strategy = Exponential(32_767, base_delay=1, factor=factor, max_delay=60)

    assert strategy.pause_seconds(task_id=1, attempt=32_767) == 60


def test_exponential_without_a_base_never_waits():
    assert delays(Exponential(2, base_delay=0), attempts=2) == [0, 0]


def test_jitter_adds_at_most_its_share_of_the_pause():
    strategy = Exponential(3, base_delay=10, factor=1, jitter_ratio=0.5)

    pauses = [strategy.pause_seconds(task_id=n, attempt=1) for n in range(200)]

    assert 10 <= min(pauses) < 10.5
    assert 14.5 < max(pauses) < 15
    assert len(set(pauses)) == 200


def test_jitter_of_a_task_differs_between_its_attempts():
    strategy = Exponential(9, base_delay=10, factor=1, jitter_ratio=1)

    assert len(set(delays(strategy, attempts=9))) == 9


@given(strategies, task_ids, attempts)
def test_the_same_question_gets_the_same_answer(strategy, task_id, attempt):
    first = strategy.delay_seconds(task_id=task_id, attempt=attempt, error=ERROR)
    again = RetryStrategy.from_json(strategy.to_json())

    assert again.delay_seconds(task_id=task_id, attempt=attempt, error=ERROR) == first


@given(strategies, task_ids, attempts)
def test_a_delay_is_given_exactly_while_retries_are_left(strategy, task_id, attempt):
    delay = strategy.delay_seconds(task_id=task_id, attempt=attempt, error=OSError())

    assert (delay is None) == (attempt > strategy.retries_max)
    assert delay is None or 0 <= delay < math.inf


@given(bounds, task_ids, attempts)
def test_random_delay_stays_between_its_bounds(low_high, task_id, attempt):
    low, high = low_high

    pause = RandomDelay(3, low, high).pause_seconds(task_id=task_id, attempt=attempt)

    assert low <= pause <= high or pause == pytest.approx(high)


def test_random_delay_spreads_tasks_over_the_whole_range():
    pauses = [RandomDelay(1, 1, 3).pause_seconds(task_id=n, attempt=1) for n in range(300)]

    assert 1 <= min(pauses) < 1.1
    assert 2.9 < max(pauses) < 3


@given(task_ids, attempts)
def test_fraction_lies_between_zero_and_one_and_never_changes(task_id, attempt):
    assert 0 <= fraction(task_id, attempt) < 1
    assert fraction(task_id, attempt) == fraction(task_id, attempt)


def test_fraction_is_the_same_in_every_process_and_release():
    assert fraction(1, 1) == pytest.approx(0.5623, abs=5e-5)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (Fixed(), 1),
        (Fixed(0), 0),
        (Exponential(32_767), 1),
    ],
)
def test_the_first_attempt_is_retried_unless_no_retry_is_allowed(strategy, expected):
    delay = strategy.delay_seconds(task_id=1, attempt=1, error=ERROR)

    assert delay == (expected or None)


@pytest.mark.parametrize("attempt", [0, -1])
def test_an_attempt_below_one_is_a_mistake_of_the_caller(attempt):
    with pytest.raises(ValueError, match=f"attempt is counted from 1, got {attempt}"):
        Fixed(3).delay_seconds(task_id=1, attempt=attempt, error=ERROR)


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [
        (Fixed(1, timedelta(minutes=2)), 120),
        (Exponential(1, base_delay=timedelta(milliseconds=1500)), 1.5),
        (Exponential(1, base_delay=90, max_delay=timedelta(minutes=1)), 60),
        (RandomDelay(1, timedelta(seconds=5), timedelta(seconds=5)), 5),
    ],
)
def test_a_timedelta_is_as_good_as_seconds(strategy, seconds):
    assert strategy.pause_seconds(task_id=1, attempt=1) == seconds


# --- which errors


@pytest.mark.parametrize(
    "retry_on",
    [
        (ConnectionError,),
        ("builtins.ConnectionError",),
        (OSError,),
        (KeyError, ConnectionError),
        ("shop.errors.Sold", "builtins.OSError"),
    ],
)
def test_listed_errors_and_their_subclasses_are_retried(retry_on):
    strategy = Fixed(1, 5, retry_on=retry_on)

    assert strategy.delay_seconds(task_id=1, attempt=1, error=ConnectionResetError()) == 5


@pytest.mark.parametrize("error", [ValueError(), OSError(), KeyboardInterrupt()])
def test_other_errors_are_not_retried(error):
    strategy = Fixed(1, 5, retry_on=(ConnectionError,))

    assert strategy.delay_seconds(task_id=1, attempt=1, error=error) is None


def test_every_error_is_retried_where_none_is_listed():
    assert Fixed(1, 5).delay_seconds(task_id=1, attempt=1, error=SystemExit(1)) == 5


@pytest.mark.parametrize("retry_on", [(), (ConnectionError,)])
def test_an_error_with_a_base_that_is_no_exception_is_retried_like_any_other(retry_on):
    strategy = Fixed(1, 5, retry_on=retry_on)

    assert strategy.delay_seconds(task_id=1, attempt=1, error=MixedError()) == 5


@pytest.mark.parametrize("retry_on", [(5,), (int,), (ValueError("instance"),), 5])
def test_retry_on_takes_exception_classes_and_names_only(retry_on):
    with pytest.raises(TypeError, match="retry_on takes exception classes, got"):
        Fixed(1, retry_on=retry_on)


def test_one_class_instead_of_a_tuple_of_classes_is_enough():
    assert Fixed(1, retry_on=ConnectionError).matches(ConnectionResetError())  # type: ignore[arg-type]


def test_one_name_instead_of_a_tuple_of_names_is_not_taken_letter_by_letter():
    try:
        strategy = Fixed(1, retry_on="builtins.OSError")  # type: ignore[arg-type]
    except TypeError as error:
        assert "retry_on" in str(error)  # noqa: PT017 - either answer is a good one
    else:
        assert strategy.matches(OSError())


# --- as text in a row


@given(strategies)
def test_a_strategy_survives_its_way_through_a_row(strategy):
    again = RetryStrategy.from_json(strategy.to_json())

    assert again.to_json() == strategy.to_json()
    assert type(again) is type(strategy)
    assert again.retries_max == strategy.retries_max


def test_a_strategy_is_stored_as_plain_json():
    text = Exponential(5, retry_on=(ConnectionError,)).to_json()

    assert json.loads(text) == {
        "kind": "exponential",
        "retries_max": 5,
        "retry_on": ["builtins.ConnectionError"],
        "base_delay": 1.0,
        "factor": 2,
        "max_delay": 60.0,
        "jitter_ratio": 0,
    }


def test_a_stored_strategy_of_unknown_kind_is_named_with_the_remedy():
    with pytest.raises(LookupError, match=r"kind 'moon' is defined.*Import its module"):
        RetryStrategy.from_json('{"kind":"moon","retries_max":3}')


def test_a_strategy_of_ones_own_is_stored_and_read_by_its_kind(kinds):
    @dataclass(frozen=True)
    class Linear(RetryStrategy):
        kind = "linear"
        step: float = 2.0

        def pause_seconds(self, *, task_id: int, attempt: int) -> float:
            return self.step * attempt

    again = RetryStrategy.from_json(Linear(2, 3.0).to_json())

    assert delays(again, attempts=3) == [3, 6, None]


def test_a_strategy_needs_a_kind(kinds):
    with pytest.raises(TypeError, match="Nameless needs a 'kind' of its own, got ''"):

        class Nameless(RetryStrategy):
            pass


def test_a_strategy_cannot_inherit_its_kind(kinds):
    with pytest.raises(TypeError, match="Slower needs a 'kind' of its own, got 'fixed'"):

        class Slower(Fixed):
            pass

    assert kinds["fixed"] is Fixed


def test_a_kind_that_is_taken_by_a_class_of_the_same_name_elsewhere_is_refused(kinds):
    body = {"kind": "fixed", "__module__": "shop.retries", "__qualname__": "Fixed"}

    with pytest.raises(TypeError, match="needs a 'kind' of its own"):
        type("Fixed", (RetryStrategy,), body)

    assert kinds["fixed"] is Fixed


# --- bad values


@pytest.mark.parametrize("retries_max", [-1, "3", 1.5, None, True, 32_768])
@pytest.mark.parametrize("strategy", [Fixed, Exponential, RandomDelay])
def test_retries_max_must_be_a_count_that_a_row_can_hold(strategy, retries_max):
    with pytest.raises((ValueError, TypeError), match="retries_max must be"):
        strategy(retries_max)


@pytest.mark.parametrize("value", [-1, -0.001, "3", None, True, timedelta(seconds=-1)])
@pytest.mark.parametrize(
    ("strategy", "word"),
    [
        (Fixed, "delay"),
        (Exponential, "base_delay"),
        (Exponential, "max_delay"),
        (RandomDelay, "min_delay"),
        (RandomDelay, "max_delay"),
    ],
)
def test_a_pause_must_be_zero_or_more_seconds(strategy, word, value):
    with pytest.raises((ValueError, TypeError), match=f"{word} must be zero or more seconds"):
        strategy(3, **{word: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
@pytest.mark.parametrize(
    ("strategy", "word"),
    [(Fixed, "delay"), (Exponential, "max_delay"), (RandomDelay, "max_delay")],
)
def test_a_pause_must_be_one_that_a_calendar_can_hold(strategy, word, value):
    with pytest.raises((ValueError, TypeError), match=f"{word} must be"):
        strategy(3, **{word: value})


@pytest.mark.parametrize("factor", [0, 0.99, -2, math.nan])
def test_factor_must_be_one_or_more(factor):
    with pytest.raises(ValueError, match="factor must be 1 or more"):
        Exponential(3, factor=factor)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_jitter_ratio_must_be_a_share(ratio):
    with pytest.raises(ValueError, match="jitter_ratio must be between 0 and 1"):
        Exponential(3, jitter_ratio=ratio)


def test_random_delay_refuses_bounds_in_the_wrong_order():
    with pytest.raises(ValueError, match=r"max_delay must not be below min_delay, got 2 and 5"):
        RandomDelay(3, min_delay=5, max_delay=2)


def test_a_strategy_cannot_be_changed():
    strategy = Fixed(3)

    with pytest.raises(AttributeError):
        strategy.delay = 0  # type: ignore[misc]
