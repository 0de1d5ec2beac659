"""Edited code is picked up between two tasks, and nothing is lost over it."""

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from firefly_jobs import registry
from firefly_jobs.models import ConsumerModel
from tests.crash.conftest import (
    consumer_id,
    effects,
    nothing_was_spent,
    rows_ended,
    schedule,
    statuses,
    stops_in_order,
)
from tests.crash.processes import LONG_LEASE, nothing_is_left
from tests.support.waiting import eventually

pytestmark = pytest.mark.once

MODULE = "edited_by_a_test"
SOURCE = """
from firefly_jobs import task
from tests.crash.tasks import call_made, wait_at
from tests.testapp.models import Effect

@task(name="edited.write")
def write(key):
    Effect.objects.create(task_key=f"{key} by WORD")

@task(name="edited.wait_then_write")
def wait_then_write(calls, key, gate):
    call_made(calls, key)
    wait_at(gate)
    Effect.objects.create(task_key=f"{key} by WORD")
"""


@dataclass
class EditedModule:
    """A module of tasks outside of this project, and its file."""

    path: Path
    edits: int = 0
    module: Any = None

    def edit(self, source: str) -> None:
        """Save the file; its time moves on however coarse the file system's clock is."""
        self.path.write_text(source, encoding="utf-8")
        self.edits += 1
        at = self.path.stat().st_mtime + 2 * self.edits
        os.utime(self.path, (at, at))


@pytest.fixture
def edited(tmp_path, monkeypatch) -> Iterator[EditedModule]:
    """Return the module, imported here as well, so that its tasks can be scheduled."""
    directory = tmp_path / "code"
    directory.mkdir()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(directory)
    known = dict(registry._tasks)
    edited = EditedModule(directory / f"{MODULE}.py")
    edited.edit(SOURCE.replace("WORD", "one"))
    edited.module = importlib.import_module(MODULE)
    yield edited
    sys.modules.pop(MODULE, None)
    registry._tasks.clear()
    registry._tasks.update(known)


@pytest.fixture
def develop(consume, edited):
    """Return a function that starts a consumer with ``--reload``."""

    def start(*arguments):
        return consume(
            "--reload",
            *arguments,
            jobs_settings=LONG_LEASE | {"IMPORTS": ["tests.crash.tasks", MODULE]},
            environment={"PYTHONPATH": str(edited.path.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        )

    return start


def effects_are(*keys: str) -> None:
    def are() -> None:
        assert set(effects()) == set(keys)

    eventually(are, timeout_seconds=20.0)


def is_watching(consumer, *, after: int = 0) -> None:
    """Wait until the consumer's process has looked at the files once."""
    consumer.wait_for_line("Watching for changes of code", after=after)


def test_edited_task_runs_with_its_new_code(develop, edited):
    schedule(edited.module.write, "first")
    consumer = develop()
    effects_are("first by one")
    is_watching(consumer)

    edited.edit(SOURCE.replace("WORD", "two"))

    seen = len(consumer.lines)
    consumer.wait_for_line("stops")
    consumer_id(consumer, after=seen)
    schedule(edited.module.write, "second")
    effects_are("first by one", "second by two")
    nothing_was_spent()
    stops_in_order(consumer)
    assert not ConsumerModel.objects.exists()
    nothing_is_left(consumer)


def test_running_call_finishes_with_its_old_code_before_the_restart(develop, edited, gate, calls):
    schedule(edited.module.wait_then_write, str(calls), "slow", str(gate))
    consumer = develop()
    gate.wait_until_reached()
    is_watching(consumer)

    edited.edit(SOURCE.replace("WORD", "two"))

    consumer.wait_for_line("stops")
    schedule(edited.module.write, "later")
    assert statuses() == {"running": 1, "created": 1}
    gate.open()
    effects_are("slow by one", "later by two")
    assert calls.count() == {"slow": 1}
    nothing_was_spent()
    stops_in_order(consumer)


def test_code_that_cannot_be_imported_is_shown_and_mended_without_a_restart_by_hand(
    develop, edited
):
    consumer = develop()
    is_watching(consumer)

    seen = len(consumer.lines)
    edited.edit("this is no Python")
    consumer.wait_for_line("SyntaxError")
    is_watching(consumer, after=seen)
    schedule(edited.module.write, "key")
    seen = len(consumer.lines)
    edited.edit(SOURCE.replace("WORD", "two"))

    consumer_id(consumer, after=seen)
    effects_are("key by two")
    stops_in_order(consumer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_group_lets_the_running_call_finish(develop, edited, gate, calls, number):
    schedule(edited.module.wait_then_write, str(calls), "slow", str(gate))
    consumer = develop()
    gate.wait_until_reached()

    os.killpg(consumer.pid, number)

    consumer.wait_for_line("stops")
    gate.open()
    assert consumer.wait() == 0, consumer.output
    rows_ended()
    nothing_was_spent()
    assert "Traceback" not in consumer.output
    nothing_is_left(consumer)


def test_signal_ends_a_consumer_whose_code_is_broken(develop, edited):
    consumer = develop()
    is_watching(consumer)
    edited.edit("this is no Python")
    consumer.wait_for_line("SyntaxError")

    consumer.terminate()

    assert consumer.wait() == 0, consumer.output
    nothing_is_left(consumer)


def test_burst_ends_with_nothing_due(develop, edited):
    schedule(edited.module.write, "key")

    consumer = develop("--burst")

    assert consumer.wait() == 0, consumer.output
    effects_are("key by one")


def test_reload_with_several_processes_is_refused(consume):
    consumer = consume("--reload", "--processes", "2")

    assert consumer.wait() == 2
    consumer.wait_for_line("--reload runs one process, and --processes asks for 2")
