"""The consumers that are measured: ``consume_tasks`` as a process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from firefly_jobs.models import ConsumerModel
from tests.support.consumer_process import ConsumerProcess

from .servers import environment

START_SECONDS = 60.0
RUN_SECONDS_MAX = 3600.0
POLL_SECONDS = 0.1


def arguments(**wanted: int) -> list[str]:
    """Return the command's options for ``processes=2, threads=4``; one process is the command."""
    if wanted.get("processes") == 1:
        del wanted["processes"]
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in wanted.items()]
    return [word for pair in pairs for word in pair]


def extent(processes: int, threads: int) -> str:
    """Return in words what a consumer runs with."""
    return (
        f"{processes} {'processes' if processes > 1 else 'process'}, "
        f"{threads} {'threads' if threads > 1 else 'thread'}"
    )


@contextmanager
def consumer(url: str, *words: str, **jobs_settings: Any) -> Iterator[ConsumerProcess]:
    """Start a consumer on ``url``; ask it to end afterwards, and insist."""
    with start(url, *words, **jobs_settings) as process:
        yield process
        if process.returncode is None:
            process.terminate()
        finish(process)


def start(url: str, *words: str, **jobs_settings: Any) -> ConsumerProcess:
    """Start a consumer on ``url`` with these options and settings."""
    return ConsumerProcess(
        "-v0",
        *words,
        database_url=url,
        jobs_settings=jobs_settings,
        environment=environment(url),
    )


def finish(process: ConsumerProcess) -> None:
    """Wait for its end.

    Raises:
        RuntimeError: If it did not end well; a rate would mean nothing then.
    """
    code = process.wait(timeout_seconds=RUN_SECONDS_MAX)
    if code:
        message = f"a measured consumer ended with {code}:\n{process.output}"
        raise RuntimeError(message)


def drain(url: str, *words: str) -> None:
    """Run a consumer until nothing is due."""
    with start(url, "--burst", *words) as process:
        finish(process)


def await_registered(process: ConsumerProcess, *, processes: int = 1) -> None:
    """Wait until a consumer claims with all its processes, and had a second to come to rest.

    Raises:
        RuntimeError: If it ended, or did not come.
    """
    deadline = time.monotonic() + START_SECONDS
    while ConsumerModel.objects.count() < processes:
        if process.returncode is not None or time.monotonic() > deadline:
            message = f"the consumer did not register:\n{process.output}"
            raise RuntimeError(message)
        time.sleep(POLL_SECONDS)
    time.sleep(1.0)
