"""The tasks of the conformance tests: each calls a function that its test defines.

A consumer finds a task by its registered name, so a test cannot schedule a function of
its own.  It schedules one of these with the key of that function instead, which works
because these consumers run in the process of the test; see ``support.schedule``.
"""

from collections.abc import Callable
from typing import Any

from firefly_jobs import atask, task
from tests.testapp.models import Effect

BODIES: dict[str, Callable[..., Any]] = {}


@task
def call(key: str, *args: Any) -> Any:
    """Call a test's function inside the task's transaction."""
    return BODIES[key](*args)


@task(atomic=False)
def call_in_autocommit(key: str, *args: Any) -> Any:
    """Call a test's function without a transaction."""
    return BODIES[key](*args)


@atask
async def acall(key: str, *args: Any) -> Any:
    """Await a test's coroutine function inside the task's transaction."""
    return await BODIES[key](*args)


@atask(atomic=False)
async def acall_in_autocommit(key: str, *args: Any) -> Any:
    """Await a test's coroutine function without a transaction."""
    return await BODIES[key](*args)


@task
def nothing() -> None:
    """Touch no database."""


@atask
async def anothing() -> None:
    """Touch no database, in a coroutine."""


@task
def insert(key: str, value: int = 1) -> int:
    """Leave one row and return its id."""
    return Effect.objects.create(task_key=key, value=value).pk


@task(group_commit=False)
def insert_by_itself(key: str) -> None:
    """Leave one row, in a transaction of its own whatever the consumer does."""
    Effect.objects.create(task_key=key, value=1)


@task(group_commit=True)
def insert_in_groups() -> None:
    """Leave one row, committed with those of others."""
    Effect.objects.create(task_key="grouped", value=1)
