"""The thread that watches bounded calls; what its exceptions do is in ``tests/conformance``."""

import asyncio
import threading

import pytest
from django.db import OperationalError

from firefly_jobs.attempts import Claim
from firefly_jobs.exceptions import MemoryLimitExceeded, StopRequested, TimeLimitExceeded
from firefly_jobs.executors import allowances
from firefly_jobs.executors.allowances import Allowances
from firefly_jobs.executors.interrupts import Interrupt
from firefly_jobs.memory import MEGABYTE
from tests.support.threads import Concurrent
from tests.support.waiting import eventually

CLAIM = Claim(7, 3, "shop.f", "default", 0, None, "", 0, 0, 0, None, 0, 0)


@pytest.fixture
def outgrown():
    """Return a list that grows when a call has exceeded its memory."""
    return []


@pytest.fixture
def watched(outgrown):
    """Return the allowances of a consumer."""
    watched = Allowances(on_outgrown=lambda: outgrown.append(True))
    yield watched
    watched.stop(timeout_seconds=10)


class Stops(list[tuple[int, type[Exception]]]):
    """What calls were stopped with, in order."""

    def of(self, name):
        """Return what stops one call."""
        return lambda error: self.append((name, error))

    def wait_for(self, *expected):
        """Wait until exactly these have been stopped."""

        def are_stopped():
            assert self == list(expected)

        eventually(are_stopped)


def limit(number, **limits):
    return CLAIM._replace(id=number, **limits)


def test_calls_are_stopped_in_the_order_in_which_their_time_passes(watched):
    stops = Stops()
    for number, seconds in [(1, 60.0), (2, 0.2), (3, 0.1)]:
        watched.begin(limit(number, time_limit=seconds), stops.of(number))

    stops.wait_for((3, TimeLimitExceeded), (2, TimeLimitExceeded))


def test_call_that_has_ended_is_left_alone(watched):
    stops = Stops()
    first = watched.begin(limit(1, time_limit=0.1), stops.of(1))
    first.end()
    first.end()
    watched.begin(limit(2, time_limit=0.2), stops.of(2))

    stops.wait_for((2, TimeLimitExceeded))


def test_call_that_goes_on_is_stopped_again(watched, monkeypatch):
    monkeypatch.setattr(allowances, "PAUSE_SECONDS_MIN", 0.01)
    watched._grace_seconds = 0
    stops = Stops()
    watched.begin(limit(1, time_limit=0.01), stops.of(1))

    stops.wait_for(*[(1, TimeLimitExceeded)] * 3)


def test_call_that_cannot_be_stopped_does_not_keep_others_from_it(watched, caplog):
    stops = Stops()

    def refuse(error):
        raise LookupError

    watched.begin(limit(1, time_limit=0.05), refuse)
    watched.begin(limit(2, time_limit=0.1), stops.of(2))

    stops.wait_for((2, TimeLimitExceeded))
    assert "A call could not be interrupted" in caplog.text


def test_one_call_at_a_time_is_stopped_because_of_memory(watched, outgrown, monkeypatch):
    size = 50 * MEGABYTE
    monkeypatch.setattr(allowances, "MEMORY_POLL_SECONDS", 0.01)
    monkeypatch.setattr(allowances, "resident_bytes", lambda pid: size)
    stops = Stops()
    calls = [watched.begin(limit(n, memory_limit=100 * MEGABYTE), stops.of(n)) for n in range(1, 3)]
    size = 120 * MEGABYTE

    stops.wait_for((1, MemoryLimitExceeded))
    assert str(calls[0].error) == "Its process kept 125829120 bytes, and it may have 104857600."
    calls[0].end()
    stops.wait_for((1, MemoryLimitExceeded), (2, MemoryLimitExceeded))
    assert outgrown == [True, True]


def test_time_of_a_call_with_a_memory_limit_passes_as_well(watched):
    stops = Stops()
    watched.begin(limit(1, memory_limit=2**60, time_limit=0.3), stops.of(1))

    stops.wait_for((1, TimeLimitExceeded))


def test_watching_ends_with_its_consumer(watched):
    watched.begin(limit(1, time_limit=60), Stops().of(1))
    thread = watched._thread

    watched.stop(timeout_seconds=10)

    assert not thread.is_alive()


def test_watching_that_never_began_can_be_ended(watched):
    watched.stop(timeout_seconds=10)


# --- what a call failed with


@pytest.fixture
def exceeded(watched):
    """Return the allowance of a call that has been stopped."""
    stops = Stops()
    allowance = watched.begin(limit(1, time_limit=0.01), stops.of(1))
    stops.wait_for((1, TimeLimitExceeded))
    return allowance


def test_exception_from_another_thread_gets_its_text(exceeded):
    raised = TimeLimitExceeded()

    assert exceeded.blame(raised) is raised
    assert str(raised) == "It ran for more than 0.01s."


@pytest.mark.parametrize("raised", [asyncio.CancelledError(), OperationalError("interrupted")])
def test_what_the_interruption_broke_is_blamed_on_the_limit(exceeded, raised):
    error = exceeded.blame(raised)

    assert isinstance(error, TimeLimitExceeded)
    assert error.__cause__ is raised


@pytest.mark.parametrize("raised", [LookupError(), StopRequested(), SystemExit()])
def test_what_a_call_raises_by_itself_is_left_alone(exceeded, raised):
    assert exceeded.blame(raised) is raised


def test_call_within_its_limit_is_blamed_for_what_it_raised(watched):
    allowance = watched.begin(limit(1, time_limit=60), Stops().of(1))
    raised = asyncio.CancelledError()

    assert allowance.blame(raised) is raised


# --- interrupts


def test_interrupt_of_a_call_that_is_over_does_not_reach_the_next_one():
    interrupt, is_running, may_end = Interrupt(), threading.Event(), threading.Event()
    first, second = object(), object()

    def call():
        is_running.set()
        assert may_end.wait(10)
        return "undisturbed"

    def thread():
        interrupt.run(lambda: None, of=first)
        return interrupt.run(call, of=second)

    running = Concurrent(thread)
    assert is_running.wait(10)

    assert not interrupt.interrupt(TimeLimitExceeded, of=first, also=pytest.fail)
    may_end.set()
    assert running.result() == "undisturbed"


def test_interrupt_looks_first_then_raises_and_does_the_rest_before_the_call_ends():
    interrupt, is_running, order = Interrupt(), threading.Event(), []

    def spin():
        is_running.set()
        while True:
            pass

    def thread():
        try:
            interrupt.run(spin, of=thread)
        finally:
            order.append("ended")

    running = Concurrent(thread)
    assert is_running.wait(10)

    def look():
        order.append("looked")
        return lambda: order.append("done")

    assert interrupt.interrupt(TimeLimitExceeded, of=thread, also=look)
    with pytest.raises(TimeLimitExceeded):
        running.result()
    assert order == ["looked", "done", "ended"]


def test_nothing_to_interrupt_is_no_mistake():
    assert not Interrupt().interrupt(TimeLimitExceeded)
