import math
import pickle
from datetime import timedelta

import pytest
from django.core import signing

from firefly_jobs import exceptions
from firefly_jobs.exceptions import (
    DELAY_SECONDS_MAX,
    AsyncFuncNotSupportedException,
    BadSignature,
    Cancel,
    CommitUncertain,
    ConsumerLost,
    LeaseLost,
    PayloadError,
    PayloadTooLargeError,
    Retry,
    Snooze,
    StopRequested,
    SyncFuncNotSupportedException,
    TaskCancelled,
    TaskFailed,
    TaskNotFoundError,
    WaitInsideTransactionError,
)


@pytest.mark.parametrize("verb", [Retry, Snooze])
@pytest.mark.parametrize(
    ("delay", "seconds"),
    [
        (0, 0),
        (5, 5),
        (0.25, 0.25),
        (timedelta(0), 0),
        (timedelta(minutes=2), 120),
        (DELAY_SECONDS_MAX, DELAY_SECONDS_MAX),
    ],
)
def test_a_delay_is_seconds_or_a_timedelta(verb, delay, seconds):
    assert verb(delay).delay_seconds == seconds
    assert verb(delay=delay).delay_seconds == seconds


@pytest.mark.parametrize("verb", [Retry, Snooze])
@pytest.mark.parametrize(
    "delay",
    [
        -1,
        -0.001,
        math.nan,
        math.inf,
        -math.inf,
        DELAY_SECONDS_MAX + 1,
        timedelta(seconds=-1),
        timedelta.max,
        timedelta.min,
    ],
)
def test_a_delay_that_no_calendar_holds_is_refused_where_it_is_raised(verb, delay):
    with pytest.raises(ValueError, match="delay must be zero or more seconds and at most 100"):
        verb(delay)


@pytest.mark.parametrize("verb", [Retry, Snooze])
@pytest.mark.parametrize("delay", ["5", "soon", [5], object()])
def test_a_delay_that_is_no_duration_is_refused_with_its_name(verb, delay):
    with pytest.raises((TypeError, ValueError), match="delay must be"):
        verb(delay)


def test_a_retry_may_leave_the_delay_to_the_strategy_but_a_snooze_may_not():
    assert Retry().delay_seconds is None
    assert Retry(None).delay_seconds is None
    with pytest.raises(TypeError):
        Snooze()  # type: ignore[call-arg]


def test_cancel_carries_its_reason():
    assert str(Cancel("sold out")) == "sold out"
    assert str(Cancel()) == "cancelled by the task"


@pytest.mark.parametrize(
    ("error", "family"),
    [
        (AsyncFuncNotSupportedException, TypeError),
        (SyncFuncNotSupportedException, TypeError),
        (TaskNotFoundError, LookupError),
        (PayloadError, ValueError),
        (PayloadTooLargeError, PayloadError),
        (BadSignature, PayloadError),
        (BadSignature, signing.BadSignature),
        (WaitInsideTransactionError, RuntimeError),
    ],
)
def test_a_mistake_can_be_caught_as_what_python_calls_it(error, family):
    assert issubclass(error, family)


def test_a_task_that_catches_exception_lets_our_stop_request_pass():
    assert not issubclass(StopRequested, Exception)


@pytest.mark.parametrize(
    "event",
    [LeaseLost, ConsumerLost, CommitUncertain, Retry, Snooze, Cancel, TaskFailed, TaskCancelled],
)
def test_an_event_is_an_exception_and_no_mistake(event):
    assert issubclass(event, Exception)
    assert not event.__name__.endswith("Error")


def test_an_uncertain_commit_keeps_the_callbacks():
    assert CommitUncertain(["callback"]).callbacks == ["callback"]


@pytest.mark.parametrize("event", [TaskFailed, TaskCancelled])
def test_what_became_of_a_task_can_be_pickled_and_says_what_is_known(event):
    error = event(7, "shop.tasks.send", "ValueError: no such order")
    copied = pickle.loads(pickle.dumps(error))

    assert str(copied) == str(error)
    assert vars(copied) == vars(error)
    assert "Task 7 (shop.tasks.send)" in str(error)
    assert "ValueError: no such order" in str(error)
    assert "no reason given" in str(event(7, "shop.tasks.send", ""))


def test_every_exception_is_documented():
    classes = [
        value
        for value in vars(exceptions).values()
        if isinstance(value, type)
        and issubclass(value, BaseException)
        and value.__module__ == exceptions.__name__
    ]

    assert len(classes) > 15
    assert not [cls.__name__ for cls in classes if not cls.__doc__]
