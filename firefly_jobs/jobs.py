"""``Job``: an immutable call that has not been scheduled, and job types of one's own.

A job is a task, its arguments and its options, as a value: each ``with_*`` returns a new
one.  Nothing is written before :meth:`Job.schedule`.

A *job type* is a subclass with a method ``run``.  It is a task like any other, registered
under the dotted name of its class; what its constructor is given are the arguments of
``run``.

To add a word that jobs take: add the option to :class:`~firefly_jobs.options.TaskOptions`;
only a word that means another option stands here, in :data:`_SYNONYMS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Self, overload

from . import registry
from .conf import get_settings, suggestion
from .exceptions import TaskDefinitionError
from .limits import Concurrency, LimitKey, RateLimit
from .options import FIXED, OPTION_WORDS, OnConflict, TaskOptions
from .placeholders import has_placeholders
from .priorities import Priority, PriorityName
from .retries import RetryStrategy
from .signatures import by_name, call_with

if TYPE_CHECKING:
    from .decorators import BaseTask
    from .models import TaskModel

__all__ = ["Job", "Priority", "aschedule_many", "schedule_many"]

# What a job calls otherwise than a task does: a job's name is for people.
_SYNONYMS = {"name": "label", "timeout": "time_limit"}
# What a job is made of.
_PARTS = ("task", "args", "kwargs", "options")
_WORDS = (*_SYNONYMS, *(word for word in OPTION_WORDS if word not in FIXED))


class _JobType(type):
    """Makes what a constructor has set final, however many constructors there were."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        job = super().__call__(*args, **kwargs)
        job._seal()  # noqa: SLF001 - the other half of this class
        return job


class Job(metaclass=_JobType):
    """A call of a task with its options, not yet scheduled.

    Args:
        task: The task; not for subclasses, which are their own.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        options: Options of the task, and ``name`` (a label for people) and ``timeout``
            (``time_limit``).

    Raises:
        TypeError, ValueError: If an option is unknown or out of range.
    """

    task: BaseTask[Any, Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    options: TaskOptions
    # A job type's method: raises if the arguments are wrong, of which it takes some by name.
    validate: Any = None

    # For job types whose work goes on elsewhere: why limits would do nothing for it.
    no_limits: ClassVar[str] = ""

    # The option words among a subclass's attributes.
    _defaults: ClassVar[tuple[str, ...]] = ()
    # What a constructor had set for other arguments than these.
    _outdated: tuple[str, ...] = ()
    _is_sealed = False

    if TYPE_CHECKING:
        # A job type's own signature is that of its ``run``.
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    else:

        def __init__(self, *args, **kwargs):
            if type(self) is Job:
                self._fill(*_of_any_task(*args, **kwargs))
            else:
                self._fill(*_of_own_task(type(self), args, kwargs))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "run", None) is None:
            return
        from .decorators import define_job_type  # noqa: PLC0415 - see ARCHITECTURE layers

        words = {
            word: value
            for base in reversed(cls.__mro__[: cls.__mro__.index(Job)])
            for word, value in vars(base).items()
            if word in (*_SYNONYMS, *OPTION_WORDS) and word not in {"kwargs", "eta"}
        }
        # Former names are those of one class.
        words["aliases"] = cls.__dict__.get("aliases", ())
        cls._defaults = tuple(words)
        cls.task = define_job_type(cls, _options(words))

    def _fill(
        self,
        task: BaseTask[Any, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: TaskOptions,
    ) -> None:
        task.check_options(options)
        self.task, self.args, self.options = task, args, options
        self.kwargs = MappingProxyType(dict(kwargs))
        for word in self._defaults:
            # Reading a type's default from a job tells what holds for this one.
            setattr(self, word, getattr(options, _SYNONYMS.get(word, word)))

    def _seal(self) -> None:
        if "options" not in self.__dict__:
            message = f"{type(self).__name__}.__init__ must call super().__init__()."
            raise TypeError(message)
        if type(self) is not Job:
            self._check_arguments()
        self._is_sealed = True

    def _check_arguments(self) -> None:
        """Refuse what ``run`` can never be called with; validate it if all of it is there."""
        signature = self.task.signature
        for word in self.kwargs:
            if not signature.takes(word):
                _refuse_argument(word, self.task)
        kwargs = signature.complete(self.args, self.kwargs, self.options.kwargs)
        bound = signature.bind_partial(self.args, kwargs)
        if self.validate is not None and signature.is_complete(bound):
            if has_placeholders(bound.arguments):
                return
            call_with(self.validate, by_name(bound))

    def _copy(self, **changes: Any) -> Self:
        job = object.__new__(type(self))
        job.__dict__.update(self.__dict__)
        job.__dict__.pop("_is_sealed", None)
        values = {name: getattr(self, name) for name in _PARTS}
        if not changes.keys().isdisjoint({"args", "kwargs"}):
            job._forget_attributes()
        job._fill(**{**values, **changes})
        job._seal()
        return job

    def _forget_attributes(self) -> None:
        """Drop what a constructor has set: it was worked out from other arguments."""
        own = [
            word for word in self.__dict__ if word not in (*_PARTS, *self._defaults, "_outdated")
        ]
        for word in own:
            del self.__dict__[word]
        self._outdated = (*self._outdated, *own)

    # --- what it is

    if not TYPE_CHECKING:
        # A type checker would take every attribute for one that there is.
        def __getattr__(self, name):
            # Not by self._outdated: while a copy is made there is nothing yet.
            if name not in self.__dict__.get("_outdated", ()):
                # Raises as usual; what a property raises, too.
                return object.__getattribute__(self, name)
            kind = type(self).__name__
            message = (
                f"{name} was set by {kind}.__init__ for the arguments it was given, and "
                f"this job has others. Make a new {kind}, or let {name} be a property."
            )
            raise AttributeError(message)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_sealed:
            message = f"A job is immutable, so {name} cannot be set; use a with_... method."
            raise AttributeError(message)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        message = f"A job is immutable, so {name} cannot be deleted."
        raise AttributeError(message)

    def __getstate__(self) -> dict[str, Any]:
        # A read-only view cannot be pickled.  Of the options only what differs from the code's:
        # that may have functions, and may be another when the job is read.
        changed = self.options.differences(registry.find(self.task.name).options)
        return {**self.__dict__, "kwargs": dict(self.kwargs), "options": changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state["task"].options.with_differences(state["options"])
        kwargs = MappingProxyType(state["kwargs"])
        self.__dict__.update(state, kwargs=kwargs, options=options)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Job) or type(other) is not type(self):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        # Arguments need not be hashable; equal jobs have this in common.
        return hash((type(self), self.task.name, len(self.args)))

    def _identity(self) -> tuple[Any, ...]:
        return self.task.name, self.args, self.kwargs, self.options

    def __repr__(self) -> str:
        # Arguments may be secret.
        count = len(self.args) + len(self.kwargs)
        return f"<{type(self).__name__} {self.task.name}: {count} arguments>"

    @property
    def default_name(self) -> str:
        """What a step of a workflow is called that nobody names."""
        return self.options.label.strip() or self.task.name.rpartition(".")[2]

    @property
    def alias(self) -> str:
        """The alias of the database that its row belongs to."""
        return self.options.database or get_settings().DATABASE

    # --- other jobs like it

    def with_args(self, *args: Any) -> Self:
        """Return a job with these positional arguments in place of its own."""
        return self._copy(args=args)

    def with_kwargs(self, **kwargs: Any) -> Self:
        """Return a job with these keyword arguments beside its own, or in their place."""
        return self._copy(kwargs={**self.kwargs, **kwargs})

    def with_options(self, **options: Any) -> Self:
        """Return a job with other options; words as for :class:`Job`.

        Raises:
            TypeError, ValueError: If one is unknown or out of range.
        """
        return self._copy(options=self.options.using(**_translated(options)))

    def with_queue(self, queue: str) -> Self:
        """Return a job for another queue."""
        return self.with_options(queue=queue)

    def with_priority(self, priority: int | PriorityName) -> Self:
        """Return a job with a priority: a number, a name or a ``Priority``."""
        return self.with_options(priority=priority)

    def with_max_retries(self, max_retries: int) -> Self:
        """Return a job that is retried so often after its first attempt."""
        return self.with_options(max_retries=max_retries)

    def with_max_attempts(self, max_attempts: int) -> Self:
        """Return a job that is attempted so often at most."""
        return self.with_options(max_attempts=max_attempts)

    def with_retry(self, retry: RetryStrategy) -> Self:
        """Return a job with a retry strategy."""
        return self.with_options(retry=retry)

    def with_eta(self, eta: datetime | None) -> Self:
        """Return a job that is due at an aware datetime; ``None``: at once."""
        return self.with_options(eta=eta)

    with_scheduled_at = with_eta

    def with_unique_key(
        self, key: str | Callable[..., str | None] | None, *, on_conflict: OnConflict | None = None
    ) -> Self:
        """Return a job of which only one waits or runs at a time; see ``unique_key``."""
        changes = {} if on_conflict is None else {"on_conflict": on_conflict}
        return self.with_options(unique_key=key, **changes)

    def with_limits(
        self, *, time: float | timedelta | None = None, memory: int | str | None = None
    ) -> Self:
        """Return a job that may take so much; what is not given stays as it is."""
        given = {"time_limit": time, "memory_limit": memory}
        return self.with_options(**{k: v for k, v in given.items() if v is not None})

    def with_concurrency(self, max_concurrent: int, key: LimitKey = None) -> Self:
        """Return a job of which so many run at the same time, on all consumers.

        Args:
            max_concurrent: How many.
            key: What they have in common: a parameter's name, a callable of the call's
                arguments, or ``None`` for all calls of the task.
        """
        return self.with_options(concurrency=Concurrency(max_concurrent, key))

    def with_rate_limit(self, rate: str, key: LimitKey = None) -> Self:
        """Return a job of which so many start in a period, such as ``"100/m"``; key as above."""
        return self.with_options(rate_limit=RateLimit(rate, key))

    def with_tags(self, *tags: str | Iterable[str]) -> Self:
        """Return a job with these tags in place of its own."""
        words = [w for tag in tags for w in ((tag,) if isinstance(tag, str) else tag)]
        return self.with_options(tags=words)

    def with_name(self, name: str) -> Self:
        """Return a job with a label for people."""
        return self.with_options(label=name)

    def with_description(self, description: str) -> Self:
        """Return a job with a text for people."""
        return self.with_options(description=description)

    def with_metadata(self, metadata: Mapping[str, Any] | None = None, /, **entries: Any) -> Self:
        """Return a job with these entries beside its own, or in their place."""
        return self.with_options(metadata={**self.options.metadata, **(metadata or {}), **entries})

    # --- scheduling

    def row(self) -> TaskModel:
        """Return the unwritten row of this call.

        Raises:
            TypeError: If the arguments do not fit the function's signature.
            PayloadError: If they cannot be stored.

        What a job type's ``validate`` raises comes from here, too.
        """
        return self.task.row_of(self.options, self.args, dict(self.kwargs), validate=self.validate)

    def schedule(self) -> TaskModel:
        """Write one row for this call, in the caller's transaction; errors as :meth:`row`."""
        from . import enqueue  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return enqueue.insert(self.row(), using=self.options.database)

    async def aschedule(self) -> TaskModel:
        """Schedule from a coroutine."""
        from asgiref.sync import sync_to_async  # noqa: PLC0415 - as above

        return await sync_to_async(self.schedule, thread_sensitive=True)()

    def apply_async(self) -> TaskModel:
        """Do the same as :meth:`schedule`."""
        return self.schedule()


def _translated(words: dict[str, Any]) -> dict[str, Any]:
    """Return options of a task for the words that a job takes."""
    found: dict[str, Any] = {}
    for word, value in words.items():
        if word not in _WORDS:
            if word in FIXED:
                message = f"{word} belongs to the task itself; a job cannot change it."
            else:
                message = f"There is no option {word!r} of a job.{suggestion(word, _WORDS)}"
            raise TypeError(message)
        meant = _SYNONYMS.get(word, word)
        if meant in found or (meant != word and meant in words):
            message = f"Give either {word}= or {meant}=, which mean the same."
            raise TypeError(message)
        found[meant] = value
    return found


def _options(words: dict[str, Any]) -> TaskOptions:
    """Return the options that a job type's attributes stand for."""
    fixed = {word: words[word] for word in words if word in FIXED and word not in _SYNONYMS}
    return TaskOptions(
        **fixed, **_translated({word: v for word, v in words.items() if word not in fixed})
    )


def _of_any_task(
    task: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Any, tuple[Any, ...], dict[str, Any], TaskOptions]:
    if not hasattr(task, "row_of"):
        message = f"A job is made of a task, got {task!r}. Decorate the function with @task."
        raise TypeError(message)
    if isinstance(args, str | bytes):
        message = "args must be a tuple of arguments, got text."
        raise TypeError(message)
    return task, tuple(args), dict(kwargs or {}), task.options.using(**_translated(options))


def _of_own_task(
    kind: type[Job], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any], TaskOptions]:
    task = getattr(kind, "task", None)
    if task is None:
        message = f"{kind.__name__} defines no method run, so there is nothing to schedule."
        raise TaskDefinitionError(message)
    words = {k: v for k, v in kwargs.items() if k in _WORDS and not task.signature.takes(k)}
    own = {k: v for k, v in kwargs.items() if k not in words}
    return task, args, own, task.options.using(**_translated(words))


def _refuse_argument(word: str, task: BaseTask[Any, Any]) -> NoReturn:
    """Raise ``TypeError`` for a word that is neither an argument nor an option of a job type."""
    parameters = task.signature.plain.parameters
    if word in parameters:
        reason = f"takes {word!r} by its position only."
    elif word in _WORDS:
        reason = f"takes no argument {word!r}. It is an option: use with_options({word}=...)."
    elif word in FIXED:
        reason = f"takes no argument {word!r}. It is an option of the type: set it in the class."
    else:
        hint = suggestion(word, (*parameters, *_WORDS))
        reason = f"takes no argument and no option {word!r}.{hint}"
    message = f"{task.name} {reason}"
    raise TypeError(message)


_Jobs = Iterable["Job | BaseTask[Any, Any]"]


@overload
def schedule_many(jobs: _Jobs, *, returns: Literal["rows"] = "rows") -> list[TaskModel]: ...
@overload
def schedule_many(jobs: _Jobs, *, returns: Literal["ids"]) -> list[int]: ...
def schedule_many(jobs: _Jobs, *, returns: Literal["rows", "ids"] = "rows") -> list[Any]:
    """Write one row for each of many calls, all of them or none.

    Args:
        jobs: Jobs, or tasks that are called without arguments; an iterator is read batch
            by batch.
        returns: ``"rows"``, or ``"ids"``: then no more rows than those of a batch, and those
            with a unique key, are held in memory.

    Returns:
        The rows in order, with their ids; or the ids.

    Raises:
        TypeError, ValueError, PayloadError: As :meth:`Job.schedule`; nothing is written then.
        ValueError: Also if they belong to different databases, which cannot commit together.
    """
    from . import enqueue  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

    if returns not in {"rows", "ids"}:
        message = f"returns must be 'rows' or 'ids', got {returns!r}."
        raise ValueError(message)
    return enqueue.insert_calls(map(_as_job, jobs), keeps_rows=returns == "rows")


@overload
async def aschedule_many(jobs: _Jobs, *, returns: Literal["rows"] = "rows") -> list[TaskModel]: ...
@overload
async def aschedule_many(jobs: _Jobs, *, returns: Literal["ids"]) -> list[int]: ...
async def aschedule_many(jobs: _Jobs, *, returns: Any = "rows") -> list[Any]:
    """Schedule many calls from a coroutine; see :func:`schedule_many`."""
    from asgiref.sync import sync_to_async  # noqa: PLC0415 - as above

    return await sync_to_async(schedule_many, thread_sensitive=True)(jobs, returns=returns)


def _as_job(item: Any) -> Job:
    return item if isinstance(item, Job) else Job(item)
