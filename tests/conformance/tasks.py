"""The tasks of the conformance tests: each calls a function that its test defines.

A consumer finds a task by its registered name, so a test cannot schedule a function of
its own.  It schedules one of these with the key of that function instead, which works
because these consumers run in the process of the test; see ``support.schedule``.
"""

import enum
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

from firefly_jobs import FailedStep, TaskHooks, atask, task
from firefly_jobs.contexts import TaskContext
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


@task(aliases=["shop.old.report"])
def moved() -> None:
    """Have had another name before."""


@task(unique_key=lambda key: f"key of {key}")
def keyed_by_function(key: str) -> str:
    """Touch no database; no other call with the same argument beside it."""
    return key


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


# For each key what the hooks of its call do: by the name of the method.
HOOKS: dict[str, dict[str, Callable[..., Any]]] = {}


def _hook(event: str, run: TaskContext, *values: Any) -> Any:
    return HOOKS[run.args[0]].get(event, lambda *_: None)(run, *values)


class PlainHooks(TaskHooks):
    """Hooks that a test defines."""

    def before_start(self, run: TaskContext) -> None:
        """See above."""
        _hook("before_start", run)

    def on_success(self, run: TaskContext, returned: Any) -> None:
        """See above."""
        _hook("on_success", run, returned)

    def on_failure(self, run: TaskContext, error: BaseException) -> None:
        """See above."""
        _hook("on_failure", run, error)

    def on_retry(self, run: TaskContext, error: BaseException, delay: float) -> None:
        """See above."""
        _hook("on_retry", run, error, delay)

    def on_prerequisite_failure(self, run: TaskContext, failed: FailedStep) -> Any:
        """See above."""
        return _hook("on_prerequisite_failure", run, failed)

    def after_return(self, run: TaskContext, status: str) -> None:
        """See above."""
        _hook("after_return", run, status)


class AsyncHooks(TaskHooks):
    """Hooks that a test defines as coroutine functions."""

    async def before_start(self, run: TaskContext) -> None:
        """See above."""
        await self._await("before_start", run)

    async def on_success(self, run: TaskContext, returned: Any) -> None:
        """See above."""
        await self._await("on_success", run, returned)

    async def on_failure(self, run: TaskContext, error: BaseException) -> None:
        """See above."""
        await self._await("on_failure", run, error)

    async def on_retry(self, run: TaskContext, error: BaseException, delay: float) -> None:
        """See above."""
        await self._await("on_retry", run, error, delay)

    async def on_prerequisite_failure(self, run: TaskContext, failed: FailedStep) -> Any:
        """See above."""
        return await self._await("on_prerequisite_failure", run, failed)

    async def after_return(self, run: TaskContext, status: str) -> None:
        """See above."""
        await self._await("after_return", run, status)

    async def _await(self, event: str, run: TaskContext, *values: Any) -> Any:
        if event in HOOKS[run.args[0]]:
            return await _hook(event, run, *values)
        return None


@task(hooks=PlainHooks)
def hooked(key: str) -> Any:
    """Call a test's function, with its hooks."""
    return BODIES[key]()


@task(hooks=PlainHooks, atomic=False)
def hooked_in_autocommit(key: str) -> Any:
    """Call a test's function without a transaction, with its hooks."""
    return BODIES[key]()


@atask(hooks=AsyncHooks)
async def ahooked(key: str) -> Any:
    """Await a test's coroutine function, with its hooks."""
    return await BODIES[key]()


@atask(hooks=PlainHooks)
async def ahooked_plainly(key: str) -> Any:
    """Await a test's coroutine function, with hooks that are plain methods."""
    return await BODIES[key]()


class Colour(enum.Enum):
    """What to paint with."""

    RED = "red"
    BLUE = "blue"


@task(check_types=True)
def paint(
    datafile_pks: list[int],
    day: date,
    colour: Colour = Colour.RED,
    price: Decimal = Decimal("9.90"),
    pause: timedelta = timedelta(minutes=2),
    *,
    is_dry: bool | None = None,
    note: str = "none",
    number: int | None = 4,
) -> None:
    """Take arguments that JSON has no words for."""


@task(kwargs={"number": 7})
def tag(datafile_pks: list[int], words: Any = (), number: int = 1) -> None:
    """Have defaults of the task, and others of the function."""


@task
def loose(
    datafile_pks: Any,
    words="Hello",
    days: list[date] = [date(2026, 11, 26)],  # noqa: B006 - nobody changes it
    either: int | str = "x",
) -> None:
    """Take arguments that a form shows in several ways."""
