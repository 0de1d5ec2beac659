"""Whether another process of this machine has ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firefly_jobs import neighbours
from tests.support.waiting import eventually

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells of other processes"
)


@pytest.fixture
def child():
    """Return a process that lives until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    )
    yield process
    process.kill()
    process.communicate()


def mark_of(process):
    return (
        f"{neighbours.this_machine(os.getpid())}/{process.pid}/{neighbours._started(process.pid)}"
    )


def test_this_process_has_not_ended():
    mark = neighbours.mark_of_this_process()

    assert mark is not None
    assert len(mark) <= neighbours.MARK_LENGTH_MAX
    assert mark.split("/")[2] == str(os.getpid())
    assert not neighbours.has_ended(mark)


def test_a_process_has_ended_once_it_was_killed_whether_anybody_asked_for_it_or_not(child):
    mark = mark_of(child)
    assert not neighbours.has_ended(mark)

    child.kill()

    # A zombie first: nobody has waited for it.
    eventually(lambda: ended(mark))
    child.wait()
    assert neighbours.has_ended(mark)


def ended(mark):
    assert neighbours.has_ended(mark)


def test_a_process_that_proc_hides_has_ended_only_once_it_is_gone(child, monkeypatch):
    mark = mark_of(child)

    def hide(path, **_):
        raise FileNotFoundError(path)

    # As with hidepid=2, for a process of another user.
    monkeypatch.setattr(Path, "read_text", hide)

    assert not neighbours.has_ended(mark)
    child.kill()
    child.wait()
    assert neighbours.has_ended(mark)
    assert neighbours.mark_of_this_process() is None


def test_another_process_with_the_same_number_is_another_process(child):
    assert neighbours.has_ended(mark_of(child)[:-1] + "x")


def test_nothing_is_known_of_other_machines_and_namespaces(child):
    boot, namespace, rest = mark_of(child).split("/", 2)
    child.kill()
    child.wait()

    assert neighbours.has_ended(f"{boot}/{namespace}/{rest}")
    assert not neighbours.has_ended(f"another/{namespace}/{rest}")
    assert not neighbours.has_ended(f"{boot}/1/{rest}")


@pytest.mark.parametrize("mark", ["", "x", "a/b", "a/b/c/d", "//1/2"])
def test_what_is_no_mark_says_nothing(mark):
    assert not neighbours.has_ended(mark)


def test_without_proc_nothing_is_known(monkeypatch):
    def refuse(*_):
        raise FileNotFoundError

    monkeypatch.setattr(os, "readlink", refuse)
    neighbours.this_machine.cache_clear()
    try:
        assert neighbours.mark_of_this_process() is None
    finally:
        neighbours.this_machine.cache_clear()
