"""The tasks that a crash test kills, pauses or interrupts.

Consumers reach them through ``FIREFLY_JOBS["IMPORTS"]``.  An :class:`Effect` is what
was committed; a line in the file ``calls`` is a call that was made, committed or not.
A call that has to wait for its test waits for a file.
"""

import asyncio
import contextlib
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

from asgiref.sync import sync_to_async
from django.db import OperationalError, connection, transaction

from firefly_jobs import atask, task
from tests.support.waiting import eventually
from tests.testapp.models import Effect

GATE_SECONDS = 60.0
# A call that has to be interrupted; nobody waits for its end.
ENDLESS_SECONDS = 120.0
# A server may go on with a query whose client has gone, and keep what it has locked.
QUERY_SECONDS = 30.0


def call_made(calls: str, key: str) -> None:
    """Append a line to the file ``calls``; lines of several processes do not mix."""
    with Path(calls).open("a", encoding="utf-8") as lines:
        lines.write(f"{key}\n")


def wait_at(gate: str) -> None:
    """Say in a file beside ``gate`` that the call is here, and wait until ``gate`` exists."""
    arrived(gate)

    def is_open() -> None:
        assert Path(gate).exists()

    eventually(is_open, timeout_seconds=GATE_SECONDS)


async def await_at(gate: str) -> None:
    """Wait as :func:`wait_at` does, without holding up the event loop."""
    arrived(gate)
    async with asyncio.timeout(GATE_SECONDS):
        while not Path(gate).exists():  # noqa: ASYNC110, ASYNC240 - another process makes the file
            await asyncio.sleep(0.01)


def arrived(gate: str) -> None:
    """Say in a file beside ``gate`` that the call has come this far."""
    Path(f"{gate}.reached").touch()


# --- short calls


@task
def write(key: str) -> None:
    """Write one row."""
    Effect.objects.create(task_key=key)


@atask
async def awrite(key: str) -> None:
    """Write one row from a coroutine."""
    await Effect.objects.acreate(task_key=key)


@task
def touch_nothing(key: str) -> str:
    """Return without a query."""
    return key


@task
def write_and_fail(key: str) -> None:
    """Write one row and raise."""
    Effect.objects.create(task_key=key)
    raise ValueError(key)


@task
def write_slowly(key: str, seconds: float) -> None:
    """Work for a while with the row written and not committed."""
    Effect.objects.create(task_key=key)
    time.sleep(seconds)  # noqa: TID251 - the work


@task
def write_and_catch_a_lock_time_out(key: str, locked: int) -> None:
    """Write one row, wait for a row that somebody has locked, and go on without it."""
    Effect.objects.create(task_key=key)
    with connection.cursor() as cursor:
        cursor.execute("SET innodb_lock_wait_timeout = 1")
        with contextlib.suppress(OperationalError):
            cursor.execute(
                f"SELECT id FROM {Effect._meta.db_table} WHERE id = %s FOR UPDATE",
                [locked],
            )


@task
def fork_and_end_children(key: str) -> list[int | None]:
    """Write one row beside forked processes that are ended before they end."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=threading.Event().wait, args=(60,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.terminate()
        child.join(20)
    Effect.objects.create(task_key=key)
    return [child.exitcode for child in children]


def _fork(key: str, how: str) -> int | None:
    """Write one row and fork; return the child's exit code, and in the child do as told."""
    Effect.objects.create(task_key=key)
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if how == "exit":
        sys.exit(3)
    if how == "raise":
        raise ValueError("in the child")
    return None


@task
def fork_and_leave(key: str, how: str) -> int | None:
    """Fork a child that leaves the call in a way of its own."""
    return _fork(key, how)


@task
def fork_a_child_that_stays(key: str) -> int:
    """Fork a child that outlives the call; return its process id."""
    Effect.objects.create(task_key=key)
    child = os.fork()
    if child == 0:
        threading.Event().wait(60)
        os._exit(0)
    return child


# --- short calls that are counted


@task
def count(calls: str, key: str) -> None:
    """Make a call that touches no database and can be counted."""
    call_made(calls, key)


@task
def count_and_write(calls: str, key: str) -> None:
    """Make a call that can be counted, and write one row."""
    call_made(calls, key)
    Effect.objects.create(task_key=key)


@atask
async def acount_and_write(calls: str, key: str) -> None:
    """Make a call that can be counted, and write one row from a coroutine."""
    call_made(calls, key)
    await Effect.objects.acreate(task_key=key)


@atask
async def acount(calls: str, key: str) -> None:
    """Make a coroutine that touches no database and can be counted."""
    call_made(calls, key)
    await asyncio.sleep(0)


@task
def count_and_fail(calls: str, key: str) -> None:
    """Make a call that can be counted, and raise."""
    call_made(calls, key)
    raise ValueError(key)


@task(max_retries=1, retry_delay=0)
def count_and_fail_once(calls: str, key: str) -> None:
    """Make a call that can be counted, write one row, and raise the first time."""
    call_made(calls, key)
    Effect.objects.create(task_key=key)
    if Path(calls).read_text(encoding="utf-8").split().count(key) == 1:
        raise ValueError(key)


# --- calls that wait for their test


@task
def wait(calls: str, key: str, gate: str) -> str:
    """Wait at a gate without a query."""
    call_made(calls, key)
    wait_at(gate)
    return key


@atask
async def await_(calls: str, key: str, gate: str) -> str:
    """Wait at a gate in a coroutine without a query."""
    call_made(calls, key)
    await await_at(gate)
    return key


@task
def wait_then_write(calls: str, key: str, gate: str) -> None:
    """Wait at a gate before the first query."""
    call_made(calls, key)
    wait_at(gate)
    Effect.objects.create(task_key=key)


@atask
async def await_then_write(calls: str, key: str, gate: str) -> None:
    """Wait at a gate in a coroutine before the first query."""
    call_made(calls, key)
    await await_at(gate)
    await Effect.objects.acreate(task_key=key)


@task
def write_then_wait(calls: str, key: str, gate: str) -> None:
    """Wait at a gate with a row written and not committed."""
    call_made(calls, key)
    Effect.objects.create(task_key=key)
    wait_at(gate)


@atask
async def write_then_await(calls: str, key: str, gate: str) -> None:
    """Wait at a gate in a coroutine with a row written and not committed."""
    call_made(calls, key)
    await Effect.objects.acreate(task_key=key)
    await await_at(gate)


@task
def write_wait_and_announce(calls: str, key: str, gate: str, announced: str) -> None:
    """Register an ``on_commit`` callback, write, and wait at a gate."""
    call_made(calls, key)
    transaction.on_commit(lambda: call_made(announced, key))
    Effect.objects.create(task_key=key)
    wait_at(gate)


@atask
async def write_await_and_announce(calls: str, key: str, gate: str, announced: str) -> None:
    """Do the same in a coroutine."""
    call_made(calls, key)
    await Effect.objects.acreate(task_key=key, note=announced)
    await sync_to_async(transaction.on_commit)(lambda: call_made(announced, key))
    await await_at(gate)


def _announce_without_end(gate: str, announced: str) -> None:
    Effect.objects.create(task_key="committed")

    def endless() -> None:
        arrived(gate)
        time.sleep(ENDLESS_SECONDS)  # noqa: TID251 - the callback that the process does not wait for

    transaction.on_commit(endless)
    transaction.on_commit(lambda: call_made(announced, "second"))


@task
def write_and_announce_without_end(gate: str, announced: str) -> None:
    """Write, and register two callbacks, the first of which does not end."""
    _announce_without_end(gate, announced)


@atask
async def awrite_and_announce_without_end(gate: str, announced: str) -> None:
    """Do the same in a coroutine."""
    await sync_to_async(_announce_without_end)(gate, announced)


# --- calls that do not end by themselves


@task
def loop(gate: str, *, writes: bool = False) -> None:
    """Keep Python busy."""
    if writes:
        Effect.objects.create(task_key="loop")
    arrived(gate)
    end = time.monotonic() + ENDLESS_SECONDS
    while time.monotonic() < end:
        pass


@task
def sleep(gate: str, *, writes: bool = False) -> None:
    """Sleep in C code."""
    if writes:
        Effect.objects.create(task_key="sleep")
    arrived(gate)
    time.sleep(ENDLESS_SECONDS)  # noqa: TID251 - the call that has to be interrupted


@task
def sleep_in_the_database(gate: str, *, writes: bool = False) -> None:
    """Wait for the server's answer."""
    if writes:
        Effect.objects.create(task_key="sleep_in_the_database")
    arrived(gate)
    function = "pg_sleep" if connection.vendor == "postgresql" else "SLEEP"
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {function}(%s)", [QUERY_SECONDS])


@atask
async def asleep(gate: str, *, writes: bool = False) -> None:
    """Sleep in a coroutine."""
    if writes:
        await Effect.objects.acreate(task_key="asleep")
    arrived(gate)
    await asyncio.sleep(ENDLESS_SECONDS)


@atask
async def asleep_in_a_thread(gate: str, *, writes: bool = False) -> None:
    """Sleep in C code on the thread that holds the coroutine's connection."""
    if writes:
        await Effect.objects.acreate(task_key="asleep_in_a_thread")
    arrived(gate)
    await sync_to_async(time.sleep)(ENDLESS_SECONDS)  # noqa: TID251 - likewise
