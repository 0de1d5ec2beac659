import os
import subprocess
import sys
import threading
from multiprocessing import Pipe

import pytest

from firefly_jobs import memory
from firefly_jobs import supervisor as supervising
from firefly_jobs.attempts import Claim
from firefly_jobs.burials import Death
from firefly_jobs.control import (
    Began,
    Finished,
    Over,
    PipeLink,
    Registered,
    Stop,
    Watch,
    current_watch,
)
from firefly_jobs.management.arguments import process_count
from firefly_jobs.memory import MEGABYTE, MemoryGuard, resident_bytes
from firefly_jobs.supervised import Orders
from firefly_jobs.supervisor import PAUSE_SECONDS_MAX, QUICK_SECONDS, BackOff, Supervisor

CLAIM = Claim(7, 3, "shop.f", "default", 0, None, "", 0, 0, 0, None, 0, 0)


# --- back-off


def test_first_quick_death_costs_no_pause_and_every_further_one_twice_as_much():
    back_off = BackOff()

    pauses = [back_off.pause_seconds(1.0) for _ in range(10)]

    assert pauses == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_longer_life_starts_the_pauses_anew():
    back_off = BackOff()
    for _ in range(5):
        back_off.pause_seconds(QUICK_SECONDS - 0.1)

    assert back_off.pause_seconds(QUICK_SECONDS) == 0.0
    assert [back_off.pause_seconds(1.0) for _ in range(2)] == [0.0, 0.5]


def test_pauses_are_bounded_however_often_a_process_dies():
    back_off = BackOff()

    assert max(back_off.pause_seconds(0.0) for _ in range(5_000)) == PAUSE_SECONDS_MAX


# --- the number of processes


def test_auto_stands_for_the_processors_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)

    assert process_count("auto") == 3


def test_auto_counts_all_processors_where_nobody_tells_which_may_be_used(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)

    assert process_count("auto") == 1


# --- memory


def test_resident_size_of_this_process_is_known():
    assert 5 * MEGABYTE < (resident_bytes(os.getpid()) or 0) < 5_000 * MEGABYTE


def test_resident_size_of_a_process_that_has_ended_is_unknown():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    assert resident_bytes(ended.pid) is None


def test_guard_calls_once_beyond_its_bound(monkeypatch):
    monkeypatch.setattr(memory, "CHECK_SECONDS", 0.01)
    called = threading.Event()

    with MemoryGuard(1, on_exceeded=called.set) as guard:
        assert called.wait(10)
        guard.join(10)

    assert not guard.is_alive()


def test_guard_without_a_bound_starts_no_thread():
    with MemoryGuard(None, on_exceeded=lambda: None) as guard:
        assert not guard.is_alive()


# --- reports


@pytest.fixture
def pipe():
    """Return both ends of a control pipe."""
    ours, theirs = Pipe()
    with ours, theirs:
        yield ours, theirs


def received(end):
    """Return what has arrived at one end."""
    found = []
    while end.poll():
        found.append(end.recv())
    return found


def test_link_reports_in_order(pipe):
    ours, theirs = pipe
    link = PipeLink(theirs)

    link.registered(4)
    link.finished(0)

    assert received(ours) == [Registered(4), Finished(0, wants_restart=False)]


def test_report_to_a_supervisor_that_is_gone_is_dropped(pipe):
    ours, theirs = pipe
    ours.close()

    PipeLink(theirs).registered(4)


def test_link_tells_a_request_to_stop_from_the_end_of_its_supervisor(pipe):
    ours, theirs = pipe
    ours.send(Stop())

    assert PipeLink(theirs).await_stop()
    ours.close()
    assert not PipeLink(theirs).await_stop()


def test_watch_tells_which_call_and_its_limits_but_no_arguments(pipe):
    ours, theirs = pipe
    watch = Watch(PipeLink(theirs).send)

    watch.begin(CLAIM, deadline=12.5, memory_bytes=100)
    watch.end(CLAIM)

    assert watch.is_enforced
    assert received(ours) == [Began(7, 3, 12.5, 100), Over(7, 3)]


def test_watch_without_a_supervisor_enforces_nothing():
    watch = current_watch()

    watch.begin(CLAIM, deadline=0.0)
    watch.end(CLAIM)

    assert not watch.is_enforced


# --- its own turn and end


class BusyChild:
    """A process that goes on with a long call, as a supervisor sees it."""

    retires_because = "max-tasks"
    has_ended = has_memory_limit = False
    kill_at = next_deadline = verdict = finished = None

    def __init__(self, pipe):
        self.pipe = pipe

    def receive(self):
        pass

    def judge(self, now):
        return None

    def ask_to_stop(self):
        pass


def test_supervisor_leaves_no_thread_and_no_socket_behind():
    orders = Orders(using="default", consumer={}, shutdown_timeout=1.0)
    supervisor = Supervisor(orders, processes=1)
    supervisor.stop()

    assert supervisor.run() == 0

    assert not supervisor._burials.is_alive()
    assert supervisor._alarm.fileno() == supervisor._bell.fileno() == -1
    supervisor.stop()


@pytest.fixture
def supervisor():
    """Return one of two processes, none of which is started yet."""
    orders = Orders(using="default", consumer={}, shutdown_timeout=1.0)
    supervisor = Supervisor(orders, processes=2)
    with supervisor._alarm, supervisor._bell:
        yield supervisor


def too_many_have_retired(supervisor, child):
    supervisor._retired = [child] * (supervisor._processes + 1)


def dead_is_not_buried_in_a_burst(supervisor, child):
    supervisor._burst = True
    supervisor._places[0].child = child
    child.retires_because = None
    supervisor._burials.add(Death(consumers=(1,)))


def all_are_asked_to_stop(supervisor, child):
    supervisor._retired = [child]
    supervisor._is_stopping = True


@pytest.mark.parametrize(
    "refuse", [too_many_have_retired, dead_is_not_buried_in_a_burst, all_are_asked_to_stop]
)
def test_supervisor_sleeps_while_a_start_is_due_but_refused(monkeypatch, pipe, supervisor, refuse):
    pauses = []
    monkeypatch.setattr(supervising, "wait", lambda pipes, timeout: pauses.append(timeout))
    refuse(supervisor, BusyChild(pipe[0]))

    supervisor._turn()

    assert pauses == [pytest.approx(supervising.TURN_SECONDS, abs=0.1)]
