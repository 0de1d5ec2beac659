"""What the crash tests share: consumers with short leases, and what is left to see."""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
from asgiref.sync import async_to_sync

from firefly_jobs.decorators import AsyncTask, BaseTask, Task
from firefly_jobs.models import ConsumerModel, TaskModel
from tests.conftest import StartConsumer
from tests.support.consumer_process import ConsumerProcess
from tests.support.waiting import eventually
from tests.testapp.models import Effect

LEASE_SECONDS = 1.0

# The tasks of one test that it is repeated with, by the words in its id.
Kinds = dict[str, BaseTask[Any, Any]]


class Consume(Protocol):
    """Starts a consumer that knows the tasks of this folder."""

    def __call__(self, *arguments: str, **options: Any) -> ConsumerProcess: ...


@pytest.fixture
def consume(start_consumer: StartConsumer) -> Consume:
    """Return a function that starts a consumer with a lease of ``LEASE_SECONDS``."""

    def start(*arguments: str, **options: Any) -> ConsumerProcess:
        settings = {
            "LEASE_SECONDS": LEASE_SECONDS,
            "CONSUMER_NAP_TIME": 0.2,
            "IMPORTS": ["tests.crash.tasks"],
        }
        options["jobs_settings"] = settings | options.get("jobs_settings", {})
        return start_consumer(*arguments, **options)

    return start


@dataclass(frozen=True, slots=True)
class Gate:
    """A place where a call waits for its test."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def wait_until_reached(self) -> None:
        """Wait until a call is there."""

        def is_reached() -> None:
            assert Path(f"{self.path}.reached").exists()

        eventually(is_reached, timeout_seconds=20.0)

    def open(self) -> None:
        """Let every call pass, also those that come later."""
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Return a closed gate."""
    return Gate(tmp_path / "gate")


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls that were made, whether their effects were committed or not."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def count(self) -> Counter[str]:
        """Return how often each key was called."""
        if not self.path.exists():
            return Counter()
        return Counter(self.path.read_text(encoding="utf-8").split())


@pytest.fixture
def calls(tmp_path: Path) -> Calls:
    """Return the record of calls, empty."""
    return Calls(tmp_path / "calls")


@pytest.fixture
def announced(tmp_path: Path) -> Calls:
    """Return the record of ``on_commit`` callbacks, empty."""
    return Calls(tmp_path / "announced")


def schedule(task: BaseTask[Any, Any], *arguments: Any, **keywords: Any) -> TaskModel:
    """Schedule a call of a sync or an async task."""
    if isinstance(task, AsyncTask):
        return async_to_sync(task.schedule)(*arguments, **keywords)
    assert isinstance(task, Task)
    row: TaskModel = task.schedule(*arguments, **keywords)
    return row


def effects(*, using: str = "default") -> Counter[str]:
    """Return how often each effect was committed."""
    return Counter(Effect.objects.using(using).values_list("task_key", flat=True))


def statuses(*, using: str = "default") -> Counter[str]:
    """Return how many rows have each status."""
    return Counter(TaskModel.objects.using(using).values_list("status", flat=True))


def rows_ended(
    *, using: str = "default", timeout_seconds: float = 20.0, status: str = "completed"
) -> None:
    """Wait until every row has ended with ``status``."""

    def are_ended() -> None:
        assert set(statuses(using=using)) == {status}, describe_rows(using=using)

    eventually(are_ended, timeout_seconds=timeout_seconds)


def describe_rows(*, using: str = "default") -> str:
    """Return what a failure has to show."""
    tasks = TaskModel.objects.using(using).exclude(status="completed").order_by("id")[:20]
    columns = ("id", "func_name", "status", "fence", "consumer", "rescues", "lost_alone", "error")
    lines = [repr(row) for row in tasks.values(*columns)]
    lines += [repr(row) for row in ConsumerModel.objects.using(using).values()]
    return "\n".join(["not completed, and the consumers:", *lines])


def nothing_was_spent(*, using: str = "default") -> None:
    """Assert that no row has used a retry, or has been rescued."""
    spent = TaskModel.objects.using(using).exclude(retry_attempts=0, rescues=0, lost_alone=0)
    assert not list(spent.values("id", "status", "retry_attempts", "rescues", "error"))


def consumer_id(consumer: ConsumerProcess, *, after: int = 0) -> int:
    """Return the id under which ``consumer`` has registered, waiting for it."""
    return int(consumer.wait_for_line(r"Consumer (\d+) consumes", after=after).group(1))


def time_passes(seconds: float) -> None:
    """Let ``seconds`` pass: the span itself is what the test is about."""
    end = time.monotonic() + seconds

    def has_passed() -> None:
        assert time.monotonic() >= end

    eventually(has_passed, timeout_seconds=seconds + 10)


def stops_in_order(consumer: ConsumerProcess) -> None:
    """Assert that ``consumer`` still answers a SIGTERM and ends well."""
    # One that was started a moment ago may not answer yet.
    consumer.wait_for_line(r"Consumer \d+ consumes")
    consumer.terminate()
    assert consumer.wait() == 0, consumer.output
