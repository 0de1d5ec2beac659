"""Hang behaviour on the attempts of a task: before one starts, and after it ended.

A :class:`TaskHooks` belongs to a task (``hooks=``), to a job type (the attribute ``hooks``)
or to every task (``FIREFLY_JOBS["HOOKS"]``), never to one call: nothing about hooks stands
in a row, so a deploy changes them for what is scheduled already.

Executors call hooks (``executors.hooking``).  What a hook raises is logged and changes
nothing; only ``before_start`` may steer, by ``Retry``, ``Snooze`` or ``Cancel``, and
``on_prerequisite_failure`` by what it returns.

To add a moment: a method here with its name in :data:`EVENTS`, its call in
``executors.hooking``, a row in ``docs/reference/hooks.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from .conf import SETTING, get_settings
from .exceptions import AsyncFuncNotSupportedException

if TYPE_CHECKING:
    from .contexts import TaskContext

EVENTS = (
    "before_start",
    "on_success",
    "on_failure",
    "on_retry",
    "on_prerequisite_failure",
    "after_return",
)

# What on_prerequisite_failure may answer, and whether the failure is ignored then.
ANSWERS: dict[str | None, bool | None] = {"stop": False, "continue": True, None: None}


@dataclass(frozen=True, slots=True, eq=False)
class FailedStep:
    """A step of a workflow that has failed for good.

    Attributes:
        name: Its name in the workflow.
        error: What it raised.
    """

    name: str
    error: BaseException


class TaskHooks:
    """What happens around the attempts of a task; override what is needed.

    One object serves all calls, on several threads at once: keep what belongs to an attempt
    in ``run.cache``.  For an async task each method may be ``async def``.  ``run`` is what
    ``current_task()`` returns.
    """

    def before_start(self, run: TaskContext) -> Any:
        """Do something before the function is called, inside the call's transaction.

        Raises:
            Retry, Snooze, Cancel: To end the attempt as if the function had raised it.
        """

    def on_success(self, run: TaskContext, returned: Any) -> Any:
        """Do something once the function has returned, inside the call's transaction.

        Args:
            run: The attempt.
            returned: What the function returned.
        """

    def on_failure(self, run: TaskContext, error: BaseException) -> Any:
        """Do something when the task fails for good, after its effects were undone.

        Args:
            run: The attempt.
            error: What it raised.
        """

    def on_retry(self, run: TaskContext, error: BaseException, delay: float) -> Any:
        """Do something when another attempt will follow, after the effects were undone.

        Args:
            run: The attempt.
            error: What it raised.
            delay: Seconds until the next one is due.
        """

    def on_prerequisite_failure(self, run: TaskContext, failed: FailedStep) -> Any:
        """Decide what the failure of a step means for its workflow, before that stops.

        Asked when the step has failed for good, after ``on_failure``.  The first hook of the
        step that does not answer ``None`` decides.

        Args:
            run: The last attempt of the step.
            failed: The step and its error.

        Returns:
            ``"stop"``, ``"continue"``, as if it had ``ignore_result``; ``None``: as it has.
        """

    def after_return(self, run: TaskContext, status: str) -> Any:
        """Do something at the end of every attempt, as the last of its hooks.

        Args:
            run: The attempt.
            status: How it ended: ``completed``, ``retried``, ``failed``, ``cancelled``,
                ``snoozed``, ``lost`` or ``released``.
        """


def as_hooks(given: Any, *, word: str = "hooks") -> tuple[TaskHooks, ...]:
    """Return hooks as objects that were given as a class, an object, or a list of these.

    Raises:
        TypeError: If one is something else, or cannot be made without arguments.
    """
    if given is None:
        return ()
    items = (given,) if isinstance(given, TaskHooks | type) else given
    if isinstance(items, str) or not isinstance(items, Iterable):
        raise TypeError(_not_hooks(word, given))
    return tuple(_as_object(item, word) for item in items)


def _as_object(item: Any, word: str) -> TaskHooks:
    if isinstance(item, TaskHooks):
        return item
    if not (isinstance(item, type) and issubclass(item, TaskHooks)):
        raise TypeError(_not_hooks(word, item))
    try:
        return item()
    except TypeError as error:
        message = (
            f"{word} names the class {item.__qualname__}, which cannot be made without arguments "
            f"({error}). Give an object of it instead."
        )
        raise TypeError(message) from error


def _not_hooks(word: str, item: Any) -> str:
    return (
        f"{word} must be a subclass of TaskHooks, an object of one, or a list of these, got "
        f"{item!r}."
    )


def methods_of(
    hooks: Iterable[TaskHooks], event: str
) -> list[tuple[TaskHooks, Callable[..., Any]]]:
    """Return the methods to call for ``event``: those that were overridden, in order."""
    default = getattr(TaskHooks, event)
    found = ((hook, getattr(hook, event)) for hook in hooks)
    return [
        (hook, method) for hook, method in found if getattr(method, "__func__", None) is not default
    ]


def async_methods(hooks: Iterable[TaskHooks]) -> list[str]:
    """Return the names of methods that only a coroutine can await."""
    return [
        f"{type(hook).__qualname__}.{event}"
        for hook in hooks
        for event in EVENTS
        if inspect.iscoroutinefunction(getattr(hook, event))
    ]


def refuse_async(hooks: Iterable[TaskHooks], *, task: str) -> None:
    """Raise ``AsyncFuncNotSupportedException`` if a plain function would have async hooks."""
    if names := async_methods(hooks):
        message = (
            f"{task} is a plain function, but its hook {names[0]} is async and could not be "
            f"awaited; make it a plain method, or the task an @atask."
        )
        raise AsyncFuncNotSupportedException(message)


@lru_cache(maxsize=1)
def shared_hooks() -> tuple[TaskHooks, ...]:
    """Return the hooks of every task.

    Raises:
        ImproperlyConfigured: If a name in the settings is no plain :class:`TaskHooks`.
    """
    return tuple(load_shared(name) for name in get_settings().HOOKS)


def load_shared(name: str) -> TaskHooks:
    """Return the hooks that ``FIREFLY_JOBS["HOOKS"]`` names; errors as :func:`shared_hooks`."""
    word = f"{SETTING}['HOOKS']"
    try:
        (hook,) = as_hooks([import_string(name)], word=word)
    except (ImportError, TypeError) as error:
        message = f"{word} has {name!r}: {error}"
        raise ImproperlyConfigured(message) from error
    if names := async_methods([hook]):
        message = (
            f"{word} has {name!r}, whose {names[0]} is async. These hooks are for every task, and "
            f"a plain function cannot await them; make it a plain method."
        )
        raise ImproperlyConfigured(message)
    return hook


def _forget(*, setting: str, **_: Any) -> None:
    if setting == SETTING:
        shared_hooks.cache_clear()


setting_changed.connect(_forget, dispatch_uid="firefly_jobs.hooks")
