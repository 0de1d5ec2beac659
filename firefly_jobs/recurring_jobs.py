"""Declare what is called again and again: ``@recurring`` and :func:`recurring_job`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from typing import Any, TypeVar

from django.apps import apps
from django.conf import settings as django_settings
from django.db import IntegrityError, connections

from . import databases, serializers
from .conf import seconds
from .cron import parse
from .declarations import Declaration, Misfire, Overlap, callee, declare
from .exceptions import TaskDefinitionError
from .jobs import Job
from .models import ScheduleModel
from .schedule_models import PLAN_FIELDS, STORED_CALL
from .syncing import Synced, sync

__all__ = ["Misfire", "Overlap", "Synced", "recurring", "recurring_job", "sync"]

_Task = TypeVar("_Task")


def recurring(
    cron: str | None = None,
    *,
    every: float | timedelta | None = None,
    timezone: str | None = None,
    name: str | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
    max_runs: int | None = None,
    misfire: str = Misfire.ONCE,
    overlap: str = Overlap.SKIP,
    jitter: float | timedelta = 0,
) -> Callable[[_Task], _Task]:
    """Declare that a task is called again and again; stands above ``@task`` or ``@atask``.

    Args:
        cron: When, as a cron expression; see ``docs/reference/cron.md``.
        every: Or how often, in seconds or as ``timedelta``.  With neither it runs by hand only.
        timezone: IANA name of the zone in which ``cron`` is read; default ``TIME_ZONE``.
        name: Its name in the database; default the task's.
        args: What the task is called with.
        kwargs: The same, by name.
        starts_at: An aware moment before which it does not run.
        ends_at: One after which it does not.
        max_runs: How often at most; ``None``: for ever.
        misfire: What becomes of occurrences that nobody could fire in time: ``"once"``: the
            latest is made up for, ``"skip"``, ``"all"``.
        overlap: What becomes of one while a former has not ended: ``"skip"``: it is left out,
            ``"allow"``: both run, ``"queue"``: it waits.
        jitter: Each call is due up to so much later, in seconds or as ``timedelta``, always the
            same for one occurrence.

    Returns:
        A decorator that returns the task as it is.

    Raises:
        TaskDefinitionError: If it stands below ``@task``, or the name is taken.
        ValueError, TypeError: If one of these is wrong, or the arguments do not fit.
    """

    def decorate(task: _Task) -> _Task:
        if not hasattr(task, "row_of"):
            label = getattr(task, "__qualname__", repr(task))
            message = f"@recurring stands above @task or @atask, and {label} is no task yet."
            raise TaskDefinitionError(message)
        job = Job(task, args, kwargs)
        declare(
            _declaration(
                job.task.name if name is None else name,
                job,
                former_names=job.task.options.aliases if name is None else (),
                cron=cron,
                every=every,
                timezone=timezone,
                starts_at=starts_at,
                ends_at=ends_at,
                max_runs=max_runs,
                misfire=misfire,
                overlap=overlap,
                jitter=jitter,
            )
        )
        return task

    return decorate


def recurring_job(
    name: str,
    job_or_workflow: Any,
    cron: str | None = None,
    *,
    every: float | timedelta | None = None,
    timezone: str | None = None,
    declares: bool | None = None,
    **options: Any,
) -> ScheduleModel:
    """Let a job or a workflow be started again and again.

    At the top of a module this declares it, as :func:`recurring` does: the row follows the code.
    Called elsewhere, by a view for example, it writes a row of its own at once, which stays
    until somebody deletes it.

    Args:
        name: Unique in the database.
        job_or_workflow: A job, a task that is called without arguments, or a workflow: then each
            occurrence is a run of its own.
        cron: As for :func:`recurring`, like all that follow.
        every: How often, in seconds or as ``timedelta``.
        timezone: Of ``cron``.
        declares: Whether the code declares it, where the place of the call is no answer.
        options: The other words of :func:`recurring`, but for ``args`` and ``kwargs``.

    Returns:
        The row.  That of what is declared is not written yet: consumers do so when they start.

    Raises:
        TaskDefinitionError: If it is declared, and the name is taken by another call.
        ValueError, TypeError: If something is wrong, or the name is taken in the database.
    """
    call = job_or_workflow
    if hasattr(call, "row_of"):
        call = Job(call)
    if not isinstance(call, Job) and not hasattr(call, "submit_all"):
        message = f"recurring_job takes a job, a task or a workflow, got {call!r}."
        raise TypeError(message)
    declaration = _declaration(name, call, cron=cron, every=every, timezone=timezone, **options)
    if declares is None:
        # What is imported early is declared as well, wherever it stands.
        declares = not apps.ready or _is_at_the_top_of_a_module(2)
    if declares:
        declare(declaration)
        return _row(declaration)
    return _write(declaration)


def _declaration(name: str, call: Any, **words: Any) -> Declaration:
    cron, every, zone = words.pop("cron"), words.pop("every"), words.pop("timezone")
    if cron is not None and zone is None:
        zone = django_settings.TIME_ZONE
    if isinstance(zone, tzinfo):
        # A ZoneInfo's name.
        zone = str(zone)
    jitter = words.pop("jitter", 0)
    declaration = Declaration(
        name=name,
        call=call,
        cron=parse(cron, timezone=zone).expression if cron is not None else "",
        every=None if every is None else _seconds("every", every),
        timezone=zone or "",
        jitter=_seconds("jitter", jitter),
        **words,
    )
    if isinstance(call, Job):
        call.row()
    else:
        call.check()
    return declaration


def _is_at_the_top_of_a_module(depth: int) -> bool:
    code = sys._getframe(depth).f_code  # noqa: SLF001 - inspect's way reads source files
    # What is typed into a shell has no file.
    return code.co_name == "<module>" and not code.co_filename.startswith("<")


def _seconds(word: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        message = f"{word} must be seconds or a timedelta, got {value!r}."
        raise TypeError(message)
    return float(seconds(value))


def _row(declaration: Declaration) -> ScheduleModel:
    values = {name: getattr(declaration, name) for name in PLAN_FIELDS}
    func_name = callee(declaration.call)
    return ScheduleModel(name=declaration.name, func_name=func_name, **values)


def _write(declaration: Declaration) -> ScheduleModel:
    using, row = declaration.alias, _row(declaration)
    row.raw_call = serializers.dumps_params(
        (declaration.call,), {}, task_name=STORED_CALL, serializer="pickle"
    )
    try:
        with databases.of(using).write_transaction(connections[using]):
            row.save(using=using, force_insert=True)
    except IntegrityError as error:
        message = f"There is a schedule {row.name!r} already; change or delete that one."
        raise ValueError(message) from error
    return row
