"""Jobs that people start by name on a set of objects.

``@register_job`` gives a task a name, the type of the objects it is for, and limits.  A start
names the job, the type and the objects; whatever is wrong with it is a :class:`JobRefused`
with the status code of HTTP that says so.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied, ValidationError

from . import registry
from .autodiscovery import import_tasks
from .conf import suggestion
from .exceptions import JobRefused, TaskDefinitionError
from .job_arguments import Argument, parameters_of
from .job_models import JOB_LENGTH_MAX, TYPE_LENGTH_MAX
from .jobs import Job
from .json_arguments import arguments_from_json
from .named_jobs import NamedJob

__all__ = [
    "Argument",
    "JobRefused",
    "NamedJob",
    "RegisteredJob",
    "get_job_from_name",
    "register_job",
    "registered_jobs",
    "start_job_from_name",
]

MAX_ITEMS = 500
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_KEY_MAX = 2**63
_WORD = re.compile(r"[A-Za-z_]\w*\Z")

CanStart = Callable[[Any, list[Any]], Any]


@dataclass(frozen=True, slots=True, eq=False)
class RegisteredJob:
    """A job that people may start; see :func:`register_job` for the attributes."""

    name: str
    task_name: str
    task_data_type: str
    func: Callable[..., Any]
    task_admin_only: bool = False
    max_items: int = MAX_ITEMS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    can_start: CanStart | None = None
    # What was registered, if that was a task: a ``using()`` copy has options of its own.
    given: Any = None

    @property
    def default_args(self) -> dict[str, Any]:
        """A copy of the arguments that fill what a start does not say."""
        return copy.deepcopy(dict(self.defaults))

    @property
    def pks_word(self) -> str:
        """The argument that the call receives the objects in."""
        return f"{self.task_data_type}_pks"

    @property
    def task(self) -> Any:
        """The task that it calls.

        Raises:
            TaskDefinitionError: If the function was not decorated with ``@task`` or ``@atask``.
        """
        task = self.given or registry.of(self.func)
        if task is None:
            message = (
                f"The registered job {self.task_name!r} is {_label(self.func)}, which is no task. "
                f"Decorate it with @task or @atask as well."
            )
            raise TaskDefinitionError(message)
        return task

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.func) or "").partition("\n")[0]

    @property
    def arguments(self) -> list[Argument]:
        """What a person may say, in order."""
        parameters = self.task.signature.plain.parameters
        hidden = {self.pks_word, "user_pk"}
        defaults = {**self.task.options.kwargs, **self.defaults}
        return parameters_of(self.func, parameters, defaults, hidden=hidden)

    def arguments_from_json(self, given: Any) -> Any:
        """Return arguments that came as JSON as the function's annotations ask for them.

        Raises:
            JobRefused: With 400, if one is of another type.
        """
        if not isinstance(given, Mapping):
            return given
        try:
            return arguments_from_json(self.func, self.task.signature.plain.parameters, given)
        except (ValueError, RecursionError) as error:
            message = f"The arguments do not fit {self.name!r}: {_reason(error)}"
            raise JobRefused(message, 400) from error


# --- registering

_jobs: dict[str, RegisteredJob] = {}


def register_job(  # noqa: PLR0917 - the names of the field, in their order
    name: str,
    task_name: str,
    task_data_type: str,
    task_admin_only: bool = False,
    max_items: int = MAX_ITEMS,
    default_args: Mapping[str, Any] | None = None,
    can_start: CanStart | None = None,
) -> Callable[[Any], Any]:
    """Let people start a task by name; stands above or below ``@task`` or ``@atask``.

    Args:
        name: What people call it.
        task_name: What starts name it by; unique.
        task_data_type: The type of its objects, such as ``"datafile"``: the call receives their
            keys as ``datafile_pks``.
        task_admin_only: Whether only users who are staff may start it.
        max_items: On how many objects at most.
        default_args: Arguments that fill what a start does not say.
        can_start: ``can_start(user, pks)`` says whether this user may start it on these; asked
            whenever there is a user.

    Returns:
        A decorator that returns what it is given.

    Raises:
        TaskDefinitionError: If another function has this ``task_name``, or takes no such keys.
        TypeError, ValueError: If something is of another type, or out of range.
    """
    words: dict[str, Any] = {"name": name, "task_name": task_name}
    for word, value in words.items():
        if not isinstance(value, str) or not value.strip():
            message = f"{word} must be a text that is not empty, got {value!r}."
            raise ValueError(message)
    if len(task_name) > JOB_LENGTH_MAX or not task_name.isprintable() or "/" in task_name:
        message = (
            f"task_name must be {JOB_LENGTH_MAX} printable characters at most and no slash, since "
            f"it is part of a URL, got {task_name!r}."
        )
        raise ValueError(message)
    kind: Any = task_data_type
    if not isinstance(kind, str) or not _WORD.match(kind) or len(kind) > TYPE_LENGTH_MAX:
        message = (
            f"task_data_type must be a word such as 'datafile', of {TYPE_LENGTH_MAX} characters at "
            f"most, got {task_data_type!r}."
        )
        raise ValueError(message)
    number: Any = max_items
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        message = f"max_items must be a whole number, 1 or more, got {number!r}."
        raise ValueError(message)
    asked: Any = can_start
    if asked is not None and not callable(asked):
        message = f"can_start must be callable, got {can_start!r}."
        raise TypeError(message)
    waits = inspect.iscoroutinefunction
    if asked is not None and (waits(asked) or waits(type(asked).__call__)):
        # A coroutine is true whatever it would return, so it would let everybody in.
        message = f"can_start must be a plain function, got the coroutine function {can_start!r}."
        raise TypeError(message)
    defaults = copy.deepcopy(dict(default_args or {}))

    def decorate(what: Any) -> Any:
        given = what if hasattr(what, "row_of") else None
        found = RegisteredJob(
            name,
            task_name,
            task_data_type,
            what if given is None else given.func,
            task_admin_only=task_admin_only,
            max_items=max_items,
            defaults=defaults,
            can_start=can_start,
            given=given,
        )
        _check(found)
        _jobs[task_name] = found
        return what

    return decorate


def _check(job: RegisteredJob) -> None:
    other = _jobs.get(job.task_name)
    if other is not None and _label(other.func) != _label(job.func):
        message = (
            f"{_label(job.func)} cannot be the registered job {job.task_name!r}: "
            f"{_label(other.func)} already is. Give one of them another task_name."
        )
        raise TaskDefinitionError(message)
    parameters = inspect.signature(job.func).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    for word in (job.pks_word, *job.defaults):
        if word not in names and not takes_all:
            message = (
                f"{_label(job.func)} cannot be the registered job {job.task_name!r}: it takes no "
                f"{word}, which a start passes."
            )
            raise TaskDefinitionError(message)
    for word in (job.pks_word, "user_pk"):
        if word in job.defaults:
            message = f"default_args has {word}, which each start says itself."
            raise TaskDefinitionError(message)


def _label(func: Callable[..., Any]) -> str:
    return f"{func.__module__}.{func.__qualname__}"


def registered_jobs(user: Any = None, obj_type: str | None = None) -> list[RegisteredJob]:
    """Return what may be started, by name.

    Args:
        user: Leave out what this user may never start; ``None``: all of it.
        obj_type: Only jobs of this type.
    """
    import_tasks()
    return [
        job
        for job in sorted(_jobs.values(), key=lambda job: (job.name, job.task_name))
        # A function that is no task cannot be started; the system check tells of it.
        if (job.given or registry.of(job.func)) is not None
        and (user is None or is_staff(user) or not job.task_admin_only)
        and (obj_type is None or job.task_data_type == obj_type)
    ]


def not_tasks() -> list[RegisteredJob]:
    """Return what was registered and cannot be started, since it is no task; by ``task_name``."""
    found = [job for job in _jobs.values() if job.given is None and registry.of(job.func) is None]
    return sorted(found, key=lambda job: job.task_name)


def is_staff(user: Any) -> bool:
    """Whether a user is staff; a project's own kind of user may not know the word."""
    return bool(getattr(user, "is_staff", False))


def find(task_name: str) -> RegisteredJob:
    """Return a registered job.

    Raises:
        JobRefused: With 404, if there is none.
    """
    # A web process has imported what its views need.
    import_tasks()
    try:
        return _jobs[task_name]
    except (KeyError, TypeError):
        hint = suggestion(str(task_name), _jobs)
        message = f"There is no registered job {task_name!r}.{hint}"
        raise JobRefused(message, 404) from None


# --- starting


def get_job_from_name(
    job_name: str,
    obj_type: str,
    obj_pks: Iterable[Any],
    job_args: Mapping[str, Any] | None = None,
    user_pk: Any = None,
) -> NamedJob:
    """Return a start of a registered job that is checked; ``apply_async()`` writes it.

    Args:
        job_name: Its ``task_name``.
        obj_type: Its ``task_data_type``.
        obj_pks: Keys of the objects: numbers, texts or UUIDs; each counts once.
        job_args: Arguments, over the defaults.
        user_pk: Who starts it; ``None``: the code itself, which may start everything.

    Raises:
        JobRefused: With the status code that says why: 404 for an unknown job or user, 400 for
            another type, no objects, too many, or arguments that do not fit, 403 for what the
            user may not.
    """
    registered = find(job_name)
    if obj_type != registered.task_data_type:
        message = (
            f"{registered.name!r} is for objects of type {registered.task_data_type!r}, not "
            f"{obj_type!r}."
        )
        raise JobRefused(message, 400)
    pks = check_start(registered, obj_pks, user_pk)
    kwargs = _arguments(registered, job_args)
    kwargs[registered.pks_word] = list(pks)
    task = registered.task
    if user_pk is not None and task.signature.takes("user_pk"):
        kwargs["user_pk"] = user_pk
    try:
        job = Job(task, (), kwargs)
        # Everything that can be wrong with a call is found here.
        job.row()
    except (TypeError, ValueError, RecursionError) as error:
        message = f"The arguments do not fit {registered.name!r}: {_reason(error)}"
        raise JobRefused(message, 400) from error
    return NamedJob(job, registered, pks, user_pk)


def start_job_from_name(
    job_name: str,
    obj_type: str,
    obj_pks: Iterable[Any],
    job_args: Mapping[str, Any] | None = None,
    user_pk: Any = None,
) -> tuple[bool, str, int]:
    """Start a registered job; arguments as for :func:`get_job_from_name`.

    Returns:
        Whether it was started, a message, and a status code of HTTP: 200 with the task's id in
        the message, or that of :class:`JobRefused`.
    """
    try:
        named = get_job_from_name(job_name, obj_type, obj_pks, job_args, user_pk)
        row = named.start()
    except JobRefused as refusal:
        return False, refusal.message, refusal.status_code
    return True, f"Started {named.registered.name!r} as task {row.pk}.", 200


def check_start(
    registered: RegisteredJob, obj_pks: Iterable[Any], user_pk: Any = None
) -> tuple[Any, ...]:
    """Check all of a start but for its arguments; return the keys, each once.

    Raises:
        JobRefused: As :func:`get_job_from_name`.
    """
    pks = _pks(registered, obj_pks)
    if user_pk is not None:
        _check_user(registered, pks, user_pk)
    return pks


def _pks(registered: RegisteredJob, given: Any) -> tuple[Any, ...]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        message = f"The keys of objects are a list, got {type(given).__name__}."
        raise JobRefused(message, 400)
    pks: dict[Any, None] = {}
    for pk in given:
        _check_pk(pk)
        pks[pk] = None
        # Not after all of them were read: a query set may have millions.
        if len(pks) > registered.max_items:
            # The length of a query set would be one more query, and of all its rows.
            number = "more"
            if isinstance(given, list | tuple | set | frozenset | range):
                number = str(len(given))
            message = (
                f"{registered.name!r} is started on {registered.max_items} objects at most, got "
                f"{number}. Start it on fewer."
            )
            raise JobRefused(message, 400)
    if not pks:
        message = f"{registered.name!r} needs at least one {registered.task_data_type}."
        raise JobRefused(message, 400)
    return tuple(pks)


def _check_pk(pk: Any) -> None:
    if isinstance(pk, bool) or not isinstance(pk, int | str | UUID):
        kind = type(pk).__name__
        message = f"The key of an object is a number, a text or a UUID, got a {kind}."
        raise JobRefused(message, 400)
    # Nothing has such a key, and neither PostgreSQL nor MariaDB keeps it as JSON.
    if isinstance(pk, str) and _UNSTORABLE.search(pk):
        message = "The key of an object is a text with a character that databases do not keep."
        raise JobRefused(message, 400)
    if isinstance(pk, int) and abs(pk) >= _KEY_MAX:
        message = "The key of an object is a number that no database has."
        raise JobRefused(message, 400)


def _check_user(registered: RegisteredJob, pks: tuple[Any, ...], user_pk: Any) -> None:
    users: Any = get_user_model()._base_manager
    try:
        # Django would look for user 1 if it were given True or 1.5.
        is_key = not isinstance(user_pk, bool | float)
        user = users.filter(pk=user_pk).first() if is_key else None
    except (TypeError, ValueError, ValidationError):
        user = None
    if user is None:
        message = f"There is no user {user_pk!r}."
        raise JobRefused(message, 404)
    if not user.is_active:
        message = f"User {user_pk} is not active, and may start nothing."
        raise JobRefused(message, 403)
    if registered.task_admin_only and not is_staff(user):
        message = f"Only staff may start {registered.name!r}."
        raise JobRefused(message, 403)
    if registered.can_start is not None:
        message = f"User {user_pk} may not start {registered.name!r} on these objects."
        try:
            may = registered.can_start(user, list(pks))
        except PermissionDenied as error:
            raise JobRefused(str(error) or message, 403) from error
        if inspect.isawaitable(may):
            if inspect.iscoroutine(may):
                may.close()
            message = f"can_start of {registered.task_name!r} must return True or False, not wait."
            raise TypeError(message)
        if not may:
            raise JobRefused(message, 403)


def _arguments(registered: RegisteredJob, given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        kind = "a text" if isinstance(given, str) else f"a {type(given).__name__}"
        message = f'Arguments are given by name, such as {{"days": 7}}, got {kind}.'
        raise JobRefused(message, 400)
    given = dict(given or {})
    signature = registered.task.signature
    for word in given:
        if word in {registered.pks_word, "user_pk"}:
            message = f"{word} is not given as an argument: each start says it itself."
            raise JobRefused(message, 400)
        if not isinstance(word, str) or not signature.takes(word):
            known = [argument.name for argument in registered.arguments]
            hint = suggestion(str(word), known)
            message = f"{registered.name!r} takes no argument {word!r}.{hint}"
            raise JobRefused(message, 400)
    try:
        # Of both: whoever changes what they gave, after the checks, changes nothing here.
        return copy.deepcopy({**registered.defaults, **given})
    except (TypeError, copy.Error, RecursionError) as error:
        reason = _reason(error)
        message = f"The arguments do not fit {registered.name!r}: {reason}. Pass plain values."
        raise JobRefused(message, 400) from error


def _reason(error: Exception) -> str:
    return "they are nested too deeply" if isinstance(error, RecursionError) else str(error)
