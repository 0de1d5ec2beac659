from datetime import timedelta
from typing import Any

import pytest

from firefly_jobs import Limit
from firefly_jobs.options import TaskOptions
from firefly_jobs.resources import memory_bytes, time_seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("200MB", 200 * 1024**2),
        ("1.5 GiB", 1536 * 1024**2),
        ("10k", 10 * 1024),
        ("7", 7),
        ("7B", 7),
        (2**40, 2**40),
    ],
)
def test_memory_is_bytes_or_text(text, size):
    assert memory_bytes(text) == size


@pytest.mark.parametrize(
    "value", ["", "many", "-5MB", 0, -1, 2**63, "0", "5 MB/s", "9" * 400 + "MB"]
)
def test_what_is_no_amount_of_memory_is_refused(value):
    with pytest.raises(ValueError, match="memory_limit must be"):
        memory_bytes(value)


@pytest.mark.parametrize("value", [1.5, True, None, [1]])
def test_memory_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match="memory_limit must be whole bytes or text"):
        memory_bytes(value)


def test_time_is_seconds_or_a_timedelta():
    assert (time_seconds(60), time_seconds(timedelta(minutes=1)), time_seconds(0.5)) == (
        60,
        60,
        0.5,
    )
    for wrong in (0, -1, float("nan"), timedelta(0)):
        with pytest.raises(ValueError, match="time_limit must be more than zero"):
            time_seconds(wrong)
    with pytest.raises(TypeError, match="time_limit must be seconds or a timedelta"):
        time_seconds("60")


def test_limits_are_another_way_to_write_both():
    limits: Any = [Limit(Limit.Type.TIME, timedelta(minutes=1)), Limit(Limit.Type.MEMORY, 1024**3)]

    options = TaskOptions(limits=limits)

    size: Any = "1GB"
    assert options == TaskOptions(time_limit=60, memory_limit=size)
    assert (options.time_limit, options.memory_limit, options.limits) == (60.0, 1024**3, ())
    assert options.using(limits=[Limit(Limit.Type.TIME, 5)]) == TaskOptions(time_limit=5)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ({"limits": [Limit(Limit.Type.TIME, 1)], "time_limit": 5}, ValueError, "limited twice"),
        ({"limits": Limit(Limit.Type.TIME, 1)}, TypeError, "limits must be a list"),
        ({"limits": [60]}, TypeError, "limits must contain Limit values"),
        ({"limits": 60}, TypeError, "limits must be a list"),
    ],
)
def test_wrong_limits_are_refused(words, error, message):
    with pytest.raises(error, match=message):
        TaskOptions(**words)


def test_a_limit_says_what_it_limits():
    with pytest.raises(TypeError, match=r"Limit\.Type\.TIME or Limit\.Type\.MEMORY, got 'time'"):
        Limit("time", 60)  # type: ignore[arg-type]  # the mistake
