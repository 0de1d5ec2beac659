import itertools
import threading

import pytest

from tests.support.threads import Concurrent
from tests.support.waiting import eventually


def test_eventually_returns_what_the_assertion_returns_once_it_passes():
    numbers = itertools.count()

    def third_time() -> str:
        assert next(numbers) == 2
        return "passed"

    assert eventually(third_time) == "passed"


def test_eventually_raises_the_last_failure_when_the_time_is_over():
    def never() -> None:
        message = "still not"
        raise AssertionError(message)

    with pytest.raises(AssertionError, match="still not"):
        eventually(never, timeout_seconds=0.05)


def test_eventually_does_not_hide_other_errors():
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 // 0)


def test_concurrent_call_returns_its_result_and_raises_its_error():
    go_on = threading.Event()
    waiting = Concurrent(go_on.wait, 5)
    failing = Concurrent(int, "no number")

    assert waiting.is_running
    go_on.set()
    assert waiting.result() is True
    with pytest.raises(ValueError, match="no number"):
        failing.result()
