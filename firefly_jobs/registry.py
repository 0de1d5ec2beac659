"""Find the task that a name belongs to.

A name is ``module.qualname`` of the decorated function, or what ``name=`` said; aliases
are earlier names of a function that was moved.  Only what stands here is ever called:
a row's ``func_name`` is a key into this table, never an import path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .conf import suggestion
from .exceptions import TaskDefinitionError, TaskNotFoundError

if TYPE_CHECKING:
    from .decorators import BaseTask

_tasks: dict[str, BaseTask[Any, Any]] = {}


def register(task: BaseTask[Any, Any]) -> None:
    """Make ``task`` known under its name and its aliases.

    Raises:
        TaskDefinitionError: If another function holds one of the names.  The same
            function again (a module that is reloaded) replaces what was there.
    """
    for name in (task.name, *task.options.aliases):
        other = _tasks.get(name)
        if other is not None and _origin(other) != _origin(task):
            message = (
                f"{_origin(task)} cannot be the task {name!r}: {_origin(other)} already is. "
                f"Give one of them another name with @task(name=...)."
            )
            raise TaskDefinitionError(message)
    for name in (task.name, *task.options.aliases):
        _tasks[name] = task


def find(name: str) -> BaseTask[Any, Any]:
    """Return the task called ``name``.

    Raises:
        TaskNotFoundError: If no task of this process has that name or alias.
    """
    try:
        return _tasks[name]
    except KeyError:
        module = name.rpartition(".")[0]
        where = f"make sure {module!r}" if module else "make sure the module that defines it"
        message = (
            f"No task named {name!r} is registered in this process.{suggestion(name, _tasks)} "
            f"If it was moved, keep the old name working with @task(aliases=[{name!r}]); if it "
            f"is new, {where} is imported when the consumer starts."
        )
        raise TaskNotFoundError(message) from None


def get(name: str) -> BaseTask[Any, Any] | None:
    """Return the task called ``name``, or ``None``."""
    return _tasks.get(name)


def of(func: Any) -> BaseTask[Any, Any] | None:
    """Return the task that a function was made, or ``None``."""
    wanted = _origin_of(func)
    return next((task for task in _tasks.values() if _origin(task) == wanted), None)


def is_async(name: str) -> bool:
    """Whether ``name`` is an async task; unknown names are not."""
    task = _tasks.get(name)
    return task is not None and task.is_async


def is_looked_at(name: str) -> bool:
    """Whether calls of ``name`` go on elsewhere, and a consumer looks at them now and then."""
    task = _tasks.get(name)
    return task is not None and bool(task.no_limits)


def has_async() -> bool:
    """Whether this process knows any async task."""
    return any(task.is_async for task in _tasks.values())


def count_bounded() -> int:
    """Return how many tasks limit the time or the memory of their calls."""
    options = {task.name: task.options for task in _tasks.values()}
    return sum(o.time_limit is not None or o.memory_limit is not None for o in options.values())


def names() -> list[str]:
    """Return every registered task's own name, sorted."""
    return sorted({task.name for task in _tasks.values()})


def _origin(task: BaseTask[Any, Any]) -> str:
    return _origin_of(task.func)


def _origin_of(func: Any) -> str:
    return f"{func.__module__}.{func.__qualname__}"
