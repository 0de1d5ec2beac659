"""``@task`` and ``@atask``: make a function schedulable.

A decorated function stays callable as it was; beside that it has ``schedule``,
``aschedule`` and ``using``.  :class:`Task` is immutable: ``using`` returns a copy.

Follow one call from here: ``decorators → enqueue → models → consumer → lifecycle →
executors → transactions``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Generic, ParamSpec, Self, TypedDict, TypeVar, Unpack, overload

from asgiref.sync import sync_to_async

from . import enqueue, registry
from .exceptions import (
    AsyncFuncNotSupportedException,
    SyncFuncNotSupportedException,
    TaskDefinitionError,
)
from .hooks import TaskHooks, refuse_async
from .jobs import Job
from .limits import Concurrency, RateLimit, answer_of, key_of
from .models import TaskModel
from .options import OnConflict, TaskOptions, UniqueKey, check_key, check_words
from .placeholders import has_placeholders
from .priorities import PriorityName
from .resources import Limit
from .retries import RetryStrategy
from .signatures import CallSignature, by_name, call_with

P = ParamSpec("P")
R = TypeVar("R")

# Raises if a call's arguments are wrong; gets those that it names.
Validate = Callable[..., Any]
Hooks = TaskHooks | type[TaskHooks]
RetryOn = tuple[type[BaseException] | str, ...] | type[BaseException]


class BaseTask(Generic[P, R]):
    """What sync and async tasks share: a function, a name and options.

    Attributes:
        func: The decorated function.
        name: What rows call it: ``module.qualname``, or the ``name`` option.
        options: See :class:`~firefly_jobs.options.TaskOptions`.
        signature: What its callers may pass.
        is_async: Whether ``func`` is a coroutine function.
    """

    is_async = False
    # Why limits would do nothing for these calls; empty: they do.
    no_limits = ""

    # Of a job type that validates: returns its ``validate`` for one call.
    _validation: Callable[[TaskOptions, tuple[Any, ...], dict[str, Any]], Validate] | None = None

    def __init__(self, func: Callable[P, R], options: TaskOptions) -> None:
        functools.update_wrapper(self, func)
        self.func = func
        self.options = options
        self.name = options.name or f"{func.__module__}.{func.__qualname__}"
        self.signature = CallSignature(func, name=self.name, takes_context=options.takes_context)
        self.signature.check_defaults(options.kwargs)
        self.check_options(options)
        if not self.is_async:
            refuse_async(options.hooks, task=self.name)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself, here and now."""
        return self.func(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return registry.find, (self.name,)

    @property
    def job(self) -> Job:
        """A call of this task as a value, without arguments yet; see :class:`Job`."""
        return Job(self)

    def using(self, **options: Any) -> Self:
        """Return a copy of this task with other options for its calls.

        Args:
            options: Any option that ``docs/reference/tasks.md`` does not reserve for the
                decorator, and ``eta``.

        Raises:
            TypeError: If a word is no option, or belongs to the function itself.
            ValueError: If a value is out of range.
        """
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.options = self.options.using(**options)
        self.check_options(copy.options)
        return copy

    def check_options(self, options: TaskOptions) -> None:
        """Raise ``ValueError`` if a limit names no parameter, or would do nothing."""
        for word in ("concurrency", "rate_limit"):
            if (limit := getattr(options, word)) is not None:
                if self.no_limits:
                    message = f"{word} would do nothing for {self.name}: {self.no_limits}"
                    raise ValueError(message)
                self.signature.check_key(word, limit.key)

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
        return self.row_of(options, args, kwargs)

    def row_of(
        self,
        options: TaskOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        validate: Validate | None = None,
    ) -> TaskModel:
        """Return the unwritten row of one call with ``options``; errors as for :meth:`row`.

        Args:
            options: In place of the task's own.
            args: Positional arguments.
            kwargs: Keyword arguments.
            validate: Looks at the arguments; without it the job type does, if it is one's task.
        """
        if options.kwargs:
            kwargs = self.signature.complete(args, kwargs, options.kwargs)
        bound = self.signature.bind(args, kwargs)
        if options.check_types:
            self.signature.check_types(bound)
        if validate is None and self._validation is not None:
            validate = self._validation(options, args, kwargs)
        if validate is not None and not has_placeholders(bound.arguments):
            call_with(validate, by_name(bound))
        key = options.unique_key
        if callable(key):
            key = answer_of(key, by_name(bound), word="unique_key", task=self.name)
            key = None if key is None else check_key(key)
        row = enqueue.build(self.name, options, args, kwargs, unique_key=key)
        if options.concurrency is not None or options.rate_limit is not None:
            self._limit(row, options, lambda: by_name(bound))
        return row

    def _limit(
        self, row: TaskModel, options: TaskOptions, arguments: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write into ``row`` what it counts together with others under."""
        if (concurrency := options.concurrency) is not None:
            key = key_of("concurrency", concurrency.key, task=self.name, arguments=arguments)
            if key is not None:
                row.concurrency_key = check_key(key, word="The key of concurrency")
                row.max_concurrent = concurrency.max_concurrent
        if (limit := options.rate_limit) is not None:
            key = key_of("rate_limit", limit.key, task=self.name, arguments=arguments)
            if key is not None:
                row.rate_key = check_key(key, word="The key of rate_limit")
                row.rate_limit = str(limit.parsed)

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


class TaskWords(TypedDict, total=False):
    """The options of ``@task`` and ``@atask``, as type checkers see them."""

    queue: str | None
    max_retries: int | None
    retry_delay: float | timedelta | None
    priority: int | PriorityName
    atomic: bool
    group_commit: bool | None
    database: str | None
    name: str | None
    aliases: tuple[str, ...] | list[str]
    takes_context: bool
    hooks: Hooks | Iterable[Hooks]
    serializer: str | None
    retry: RetryStrategy | None
    retry_on: RetryOn
    max_attempts: int | None
    kwargs: Mapping[str, Any]
    check_types: bool
    expires: float | timedelta | datetime | None
    unique_key: UniqueKey
    on_conflict: OnConflict
    time_limit: float | timedelta | None
    memory_limit: int | str | None
    limits: Iterable[Limit]
    concurrency: Concurrency | int | None
    rate_limit: RateLimit | str | None
    label: str
    description: str
    metadata: Mapping[str, Any]
    tags: Iterable[str]


@overload
def task(func: Callable[P, R], /) -> Task[P, R]: ...
@overload
def task(
    **options: Unpack[TaskWords],
) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def task(func: Any = None, /, **options: Any) -> Any:
    """Make a function schedulable; bare or with options.

    Args:
        func: The function, when used bare.
        options: ``queue`` (name; default ``DEFAULT_QUEUE``), ``priority`` (-100..100, higher
            first, or a name), ``max_retries`` (or ``max_attempts``, one more) and
            ``retry_delay`` (seconds or ``timedelta``), or ``retry`` (a strategy) instead,
            ``retry_on`` (exception classes), ``atomic`` (False: no
            transaction, at-least-once), ``group_commit`` (short calls share a transaction and
            its COMMIT), ``database`` (alias of rows and effects), ``name``,
            ``aliases`` (former names), ``takes_context`` (pass the context as first argument),
            ``hooks`` (what happens around attempts: ``TaskHooks``, or a list),
            ``serializer`` (``"pickle"`` or ``"json"``), ``kwargs`` (defaults for keyword
            arguments), ``check_types`` (compare arguments with simple annotations),
            ``expires`` (seconds, ``timedelta`` or moment: not started by then is cancelled),
            ``unique_key`` (text, or a callable of the call's arguments) and ``on_conflict``
            (``"return"``, ``"raise"``, ``"replace"``), ``time_limit`` and ``memory_limit``, or
            ``limits``, ``concurrency`` (how many calls run at the same time: a number, or
            ``Concurrency``) and ``rate_limit`` (how many start in a period: ``"100/m"``, or
            ``RateLimit``), ``label``, ``description``, ``metadata``, ``tags``.

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
    **options: Unpack[TaskWords],
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], AsyncTask[P, R]]: ...
def atask(func: Any = None, /, **options: Any) -> Any:
    """Make a coroutine function schedulable; options and errors as for :func:`task`.

    Raises:
        SyncFuncNotSupportedException: On a plain function.
    """
    return _decorate(AsyncTask, func, options)


def define_job_type(kind: type[Job], options: TaskOptions) -> BaseTask[Any, Any]:
    """Register a job type as the task that runs it; for ``Job``'s own use.

    Raises:
        TaskDefinitionError: If a consumer could not find the class by its name.
    """
    run: Any = kind.run  # type: ignore[attr-defined]  # why it is called
    is_async = inspect.iscoroutinefunction(run)

    def job_of(options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Not through the constructor, which may compute these arguments from others.
        job = kind.__new__(kind)
        job._fill(made, args, kwargs, options)  # noqa: SLF001 - what else a job is made of
        return job

    def called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return job_of(made.options, args, kwargs).run(*args, **kwargs)

    def func(*args: Any, **kwargs: Any) -> Any:
        return called(args, kwargs)

    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        return await called(args, kwargs)

    stand_in: Any = coroutine if is_async else func
    signature = inspect.signature(run)
    functools.update_wrapper(stand_in, run)
    del stand_in.__wrapped__
    stand_in.__module__, stand_in.__doc__ = kind.__module__, kind.__doc__
    stand_in.__name__, stand_in.__qualname__ = kind.__name__, kind.__qualname__
    stand_in.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])
    if reason := _unfindable(stand_in):
        message = f"{kind.__qualname__} cannot be a job type: {reason}. Define it in a module."
        raise TaskDefinitionError(message)
    made: BaseTask[Any, Any] = (AsyncTask if is_async else Task)(stand_in, options)
    if kind.validate is not None:
        made._validation = lambda *call: job_of(*call).validate  # noqa: SLF001 - the other half of it
    made.no_limits = kind.no_limits
    made.check_options(options)
    registry.register(made)
    return made


def _decorate(kind: type[BaseTask[Any, Any]], func: Any, words: dict[str, Any]) -> Any:
    if words.pop("eta", None) is not None:
        message = "eta belongs to a call: use schedule(..., eta=...) or using(eta=...)."
        raise TypeError(message)
    check_words(words)
    options = TaskOptions(**words)
    if func is None:
        return functools.partial(_define, kind, options)
    return _define(kind, options, func)


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
