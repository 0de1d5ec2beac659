"""Tasks and accidents of consumers that run in several processes.

Imported through ``FIREFLY_JOBS["IMPORTS"]`` by the supervisor, and by each of its
processes, in which two variables provoke what a test is about:

- ``ARMED_ONCE``: a file; only the process that makes it keeps its checkpoints.
- ``DIES_AT_IMPORT``: end at once.
"""

import os
import time
from contextlib import suppress
from multiprocessing import parent_process
from pathlib import Path

from firefly_jobs import atask, checkpoints, task
from tests.crash.tasks import ENDLESS_SECONDS, call_made, wait_at
from tests.testapp.models import Effect

MEGABYTE = 1024 * 1024
_kept: list[bytes] = []

if parent_process() is not None:
    if "DIES_AT_IMPORT" in os.environ:
        os._exit(3)
    if "ARMED_ONCE" in os.environ:
        try:
            Path(os.environ["ARMED_ONCE"]).touch(exist_ok=False)
        except FileExistsError:
            checkpoints._armed.clear()


@task
def end_the_process(calls: str, key: str) -> None:
    """End the process, but not the second time."""
    call_made(calls, key)
    Effect.objects.create(task_key=key)
    if Path(calls).read_text(encoding="utf-8").split().count(key) == 1:
        os._exit(0)


@task
def always_end_the_process() -> None:
    """End the process, each time."""
    os._exit(0)


@task
def keep_memory(megabytes: int, key: str) -> None:
    """Take memory and never give it back."""
    _kept.append(b"x" * (megabytes * MEGABYTE))
    Effect.objects.create(task_key=key)


@task
def keep_memory_and_wait(megabytes: int, calls: str, key: str, gate: str) -> None:
    """Take memory, never give it back, and wait at a gate with a row written."""
    call_made(calls, key)
    _kept.append(b"x" * (megabytes * MEGABYTE))
    Effect.objects.create(task_key=key)
    wait_at(gate)


@task
def stick(calls: str, key: str) -> None:
    """Write a row, and block in C code where no exception arrives."""
    call_made(calls, key)
    Effect.objects.create(task_key=key)
    time.sleep(ENDLESS_SECONDS)  # noqa: TID251 - the point of it


@atask
async def block_the_loop(calls: str, key: str) -> None:
    """Block the event loop, so that not even a cancellation arrives."""
    call_made(calls, key)
    time.sleep(ENDLESS_SECONDS)  # noqa: ASYNC251, TID251 - the point of it


@task
def swallow(calls: str, key: str, megabytes: int = 0) -> None:
    """Take memory in one step, and go on, whatever is raised."""
    call_made(calls, key)
    with suppress(Exception):
        _kept.append(b"x" * (megabytes * MEGABYTE))
        # Here the first exception arrives, and not between two blocks.
        spin()
    while True:
        with suppress(Exception):
            spin()


@task
def spin() -> None:
    """Never end."""
    while True:
        pass


@task
def take_memory_at_once(calls: str, key: str, megabytes: int) -> None:
    """Take memory in one step, and block in C code."""
    call_made(calls, key)
    _kept.append(b"x" * (megabytes * MEGABYTE))
    time.sleep(ENDLESS_SECONDS)  # noqa: TID251 - the point of it


@task
def take_memory_bit_by_bit(calls: str, key: str, megabytes: int) -> None:
    """Take memory in small steps, keep it, and go on until an exception arrives."""
    call_made(calls, key)
    _kept.extend(b"x" * MEGABYTE for _ in range(megabytes))
    while True:
        pass


@task
def be_over_in_time(calls: str, key: str) -> None:
    """Return at once."""
    call_made(calls, key)
