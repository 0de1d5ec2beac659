"""``@task`` and ``@atask``: make a function schedulable.

A decorated function stays callable as it was; beside that it has ``schedule``,
``aschedule`` and ``using``.  :class:`Task` is immutable: ``using`` returns a copy.

Follow one call from here: ``decorators → enqueue → models → consumer → lifecycle →
executors → transactions``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from typing import Any, Generic, ParamSpec, Self, TypeVar, overload

from asgiref.sync import sync_to_async

from . import enqueue, registry
from .exceptions import (
    AsyncFuncNotSupportedException,
    SyncFuncNotSupportedException,
    TaskDefinitionError,
)
from .models import TaskModel
from .options import TaskOptions, check_words
from .retries import RetryStrategy

P = ParamSpec("P")
R = TypeVar("R")

RetryOn = tuple[type[BaseException] | str, ...] | type[BaseException]


class BaseTask(Generic[P, R]):
    """What sync and async tasks share: a function, a name and options.

    Attributes:
        func: The decorated function.
        name: What rows call it: ``module.qualname``, or the ``name`` option.
        options: See :class:`~firefly_jobs.options.TaskOptions`.
        is_async: Whether ``func`` is a coroutine function.
    """

    is_async = False

    def __init__(self, func: Callable[P, R], options: TaskOptions) -> None:
        functools.update_wrapper(self, func)
        self.func = func
        self.options = options
        self.name = options.name or f"{func.__module__}.{func.__qualname__}"
        self._signature = _signature(func, takes_context=options.takes_context)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, here and now."""
        return self.func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return registry.find, (self.name,)

    def using(self, **options: Any) -> Self:
        """Return a copy of this task with other options for its calls.

        Args:
            options: Any of ``queue``, ``priority``, ``eta``, ``max_retries``,
                ``retry_delay``, ``retry``, ``retry_on``, ``serializer``, ``database``.

        Raises:
            TypeError: If a word is no option, or belongs to the function itself.
            ValueError: If a value is out of range.
        """
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.options = self.options.using(**options)
        return copy

    def row(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskModel:
        """Return the unwritten row of one call; ``eta`` in ``kwargs`` is the call's option.

        Raises:
            TypeError: If the arguments do not fit the function's signature.
            PayloadError: If they cannot be stored.
        """
        options = self.options
        if "eta" in kwargs:
            kwargs = dict(kwargs)
            options = options.using(eta=kwargs.pop("eta"))
        try:
            if options.takes_context:
                self._refuse_context(kwargs)
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            message = f"{self.name}{self._signature} cannot be called like this: {error}."
            raise TypeError(message) from None
        return enqueue.build(self.name, options, args, kwargs)

    def _refuse_context(self, kwargs: dict[str, Any]) -> None:
        first = next(iter(inspect.signature(self.func).parameters.values()))
        if first.name in kwargs and first.kind is first.POSITIONAL_OR_KEYWORD:
            message = f"the consumer passes {first.name!r} itself (takes_context=True)"
            raise TypeError(message)

    async def _aschedule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskModel:
        # Thread-sensitive, like every query of Django's: the row joins the transaction
        # that is open on the calling context's connection.
        return await sync_to_async(self._schedule, thread_sensitive=True)(args, kwargs)

    def _schedule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TaskModel:
        return enqueue.insert(self.row(args, kwargs), using=self.options.database)

    @overload
    async def aschedule(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskModel: ...
    @overload
    async def aschedule(self, /, *args: Any, eta: datetime | None, **kwargs: Any) -> TaskModel: ...
    async def aschedule(self, /, *args: Any, **kwargs: Any) -> TaskModel:
        """Schedule a call from a coroutine; like ``schedule`` otherwise."""
        return await self._aschedule(args, kwargs)


class Task(BaseTask[P, R]):
    """A plain function that can be scheduled."""

    @overload
    def schedule(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskModel: ...
    @overload
    def schedule(self, /, *args: Any, eta: datetime | None, **kwargs: Any) -> TaskModel: ...
    def schedule(self, /, *args: Any, **kwargs: Any) -> TaskModel:
        """Write one row for a call with these arguments, in the caller's transaction.

        Args:
            args: As the function takes them.
            kwargs: As the function takes them; ``eta``, an aware datetime, is when the
                call is due (a type checker sees the function's own parameters only
                without it: ``using(eta=...)`` keeps them).

        Returns:
            The row, with its id.

        Raises:
            TypeError: If the arguments do not fit the signature, or ``eta`` is no datetime.
            ValueError: If ``eta`` is naive.
            PayloadError: If an argument cannot be stored, or all are too large.
        """
        return self._schedule(args, kwargs)


class AsyncTask(BaseTask[P, Coroutine[Any, Any, R]]):
    """A coroutine function that can be scheduled."""

    is_async = True

    @overload
    async def schedule(self, /, *args: P.args, **kwargs: P.kwargs) -> TaskModel: ...
    @overload
    async def schedule(self, /, *args: Any, eta: datetime | None, **kwargs: Any) -> TaskModel: ...
    async def schedule(self, /, *args: Any, **kwargs: Any) -> TaskModel:
        """Schedule a call; awaitable, and like :meth:`Task.schedule` otherwise."""
        return await self._aschedule(args, kwargs)


@overload
def task(func: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(
    *,
    queue: str | None = None,
    max_retries: int | None = None,
    retry_delay: float | timedelta | None = None,
    priority: int = 0,
    atomic: bool = True,
    database: str | None = None,
    name: str | None = None,
    aliases: tuple[str, ...] | list[str] = (),
    takes_context: bool = False,
    serializer: str | None = None,
    retry: RetryStrategy | None = None,
    retry_on: RetryOn = (),
) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(func: Any = None, /, **options: Any) -> Any:
    """Make a function schedulable; bare or with options.

    Args:
        func: The function, when used bare.
        options: ``queue`` (name; default ``DEFAULT_QUEUE``), ``priority`` (-100..100, higher
            first), ``max_retries`` and ``retry_delay`` (seconds or ``timedelta``), or ``retry``
            (a strategy) instead, ``retry_on`` (exception classes), ``atomic`` (False: no
            transaction, at-least-once), ``database`` (alias of rows and effects), ``name``,
            ``aliases`` (former names), ``takes_context`` (pass the context as first argument),
            ``serializer`` (``"pickle"`` or ``"json"``).

    Raises:
        AsyncFuncNotSupportedException: On an ``async def``.
        TaskDefinitionError: On a lambda, closure or method, or one with a parameter ``eta``.
        TypeError, ValueError: If an option is unknown or out of range.
    """
    return _decorate(Task, func, options)


@overload
def atask(func: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
@overload
def atask(
    *,
    queue: str | None = None,
    max_retries: int | None = None,
    retry_delay: float | timedelta | None = None,
    priority: int = 0,
    atomic: bool = True,
    database: str | None = None,
    name: str | None = None,
    aliases: tuple[str, ...] | list[str] = (),
    takes_context: bool = False,
    serializer: str | None = None,
    retry: RetryStrategy | None = None,
    retry_on: RetryOn = (),
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], AsyncTask[P, R]]: ...
def atask(func: Any = None, /, **options: Any) -> Any:
    """Make a coroutine function schedulable; options and errors as for :func:`task`.

    Raises:
        SyncFuncNotSupportedException: On a plain function.
    """
    return _decorate(AsyncTask, func, options)


def _decorate(kind: type[BaseTask[Any, Any]], func: Any, words: dict[str, Any]) -> Any:
    words.pop("eta", None) if words.get("eta") is None else _refuse_eta()
    check_words(words)
    options = TaskOptions(**words)
    if func is None:
        return functools.partial(_define, kind, options)
    return _define(kind, options, func)


def _refuse_eta() -> None:
    message = "eta belongs to a call: use schedule(..., eta=...) or using(eta=...)."
    raise TypeError(message)


def _define(kind: type[BaseTask[Any, Any]], options: TaskOptions, func: Any) -> Any:
    _check_function(kind, func)
    made = kind(func, options)
    registry.register(made)
    return made


def _check_function(kind: type[BaseTask[Any, Any]], func: Any) -> None:
    if isinstance(func, BaseTask):
        message = f"{func.name} is already a task; decorate it once."
        raise TaskDefinitionError(message)
    name = getattr(func, "__qualname__", None)
    if name is None or not callable(func) or inspect.isclass(func):
        message = f"Only a function can be a task, got {func!r}."
        raise TaskDefinitionError(message)
    reason = _unfindable(func)
    if reason:
        message = f"{name} cannot be a task: {reason}. Define a function at the top of a module."
        raise TaskDefinitionError(message)
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        message = f"{name} cannot be a task: it is a generator, and calling it runs nothing."
        raise TaskDefinitionError(message)
    if inspect.iscoroutinefunction(func) and not kind.is_async:
        message = f"{name} is an async function; use @atask instead of @task."
        raise AsyncFuncNotSupportedException(message)
    if kind.is_async and not inspect.iscoroutinefunction(func):
        message = f"{name} is a plain function; use @task instead of @atask."
        raise SyncFuncNotSupportedException(message)


def _unfindable(func: Any) -> str | None:
    """Return why a consumer could not find ``func`` by its name, or ``None``."""
    name = func.__qualname__
    if "<lambda>" in name:
        return "a lambda has no name that a consumer could find it by"
    if "<locals>" in name:
        return "it is defined inside another function, where a consumer cannot find it"
    if "." in name:
        return "it is a method, and a row stores a call without its object"
    if func.__module__ == "__main__":
        return "a consumer cannot import the module __main__"
    return None


def _signature(func: Callable[..., Any], *, takes_context: bool) -> inspect.Signature:
    signature = inspect.signature(func)
    parameters = list(signature.parameters.values())
    if "eta" in signature.parameters:
        message = (
            f"{func.__qualname__} cannot be a task: schedule() keeps the word 'eta' for the time "
            f"a call is due, so no parameter may have that name."
        )
        raise TaskDefinitionError(message)
    if takes_context:
        if not parameters or parameters[0].kind not in {
            inspect.Parameter.POSITIONAL_ONLY,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.VAR_POSITIONAL,
        }:
            message = (
                f"{func.__qualname__} has takes_context=True, so it needs a first positional "
                f"parameter that receives the context."
            )
            raise TaskDefinitionError(message)
        if parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
            parameters = parameters[1:]
    return signature.replace(parameters=parameters)
