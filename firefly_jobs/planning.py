"""What a schedule calls, and when next: its row is read, changed by people, and planned anew.

Every change to a row locks it and goes by the database's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

from django.core.exceptions import ValidationError
from django.db import connections
from django.db.models import QuerySet

from . import databases, registry, serializers
from .conf import get_settings
from .databases.functions import DatabaseNow
from .declarations import declared, owner
from .exceptions import BadSignature, PayloadError, ScheduleError, TaskNotFoundError
from .jobs import Job
from .json_arguments import arguments_from_json, positional_from_json
from .models import ScheduleModel
from .schedule_models import CANNOT_RUN, CHANGEABLE, STORED_CALL

# When it recurs: what was missed of another beat means nothing.
_BEAT = frozenset({"cron", "timezone", "every", "starts_at", "is_paused", "is_retired"})


def locked(using: str, *, skips: bool = False) -> QuerySet[Any]:
    """Return schedules that are locked as they are read, with the database's ``now``.

    Args:
        using: Database alias.
        skips: Whether those that somebody else has locked are passed over, where that can be.
    """
    # Results may be large, and nobody who locks a row looks at them.
    rows = ScheduleModel.objects.using(using).defer("raw_last_result", "last_error")
    rows = rows.annotate(now=DatabaseNow())
    return rows.select_for_update(skip_locked=skips and databases.of(using).can_skip_locked)


def plan(row: ScheduleModel, now: datetime) -> None:
    """Set when a row runs next, counted from ``now``."""
    is_over = row.is_paused or row.is_retired
    row.next_run = None if is_over else row.next_run_after(now)


def plan_after(row: ScheduleModel, changed: Collection[str], now: datetime) -> None:
    """Set when a row runs next, of which some columns have changed; what is due stays due."""
    if row.next_run is None or not _BEAT.isdisjoint(changed):
        plan(row, now)
    elif not row.has_runs_left or (row.ends_at is not None and row.next_run > row.ends_at):
        row.next_run = None


def change(row: ScheduleModel, changes: Mapping[str, Any], *, using: str) -> None:
    """Write some columns of a schedule; see ``ScheduleModel.change``."""
    if unknown := sorted(set(changes) - set(CHANGEABLE)):
        message = f"{', '.join(unknown)} cannot be changed; what can be: {', '.join(CHANGEABLE)}."
        raise TypeError(message)
    with databases.of(using).own_transaction(connections[using]):
        found = locked(using).get(pk=row.pk)
        changed = {name for name, value in changes.items() if getattr(found, name) != value}
        columns = set[str]()
        for name, value in changes.items():
            setattr(found, name, value)
        # What is broken can be paused.
        if not changes or changed - {"is_paused"} or (changed and not found.is_paused):
            found.full_clean(exclude=["declared"])
            check_call(found)
            if found.last_error.startswith(CANNOT_RUN):
                found.last_error, columns = "", {"last_error"}
        plan_after(found, changed, found.now)
        found.save(using=using, update_fields=[*changes, *columns, "next_run"])
    take_over(row, found)


def take_over(row: ScheduleModel, found: ScheduleModel) -> None:
    """Let an object in memory have the values of one that has just been read."""
    missing = found.get_deferred_fields()
    names = [field.attname for field in row._meta.concrete_fields]
    vars(row).update({name: vars(found)[name] for name in names if name not in missing})


# --- what it calls


def call_of(row: ScheduleModel) -> Any:
    """Return the job or workflow that a schedule starts, or ``None`` if it is not known here.

    Raises:
        Exception: Whatever is wrong with what the row says.
    """
    if row.owner:
        declaration = declared(str(row.name)) if row.owner == owner() else None
        if declaration is None:
            return None
        call = declaration.call
        return call if row.arguments is None else _with_arguments(call, row.arguments)
    if row.saved_job is not None:
        return row.saved_job.get_job().job if row.saved_job.is_known else None
    if row.raw_call:
        try:
            (call,), _ = serializers.loads_params(row.raw_call, task_name=STORED_CALL)
        except PayloadError as error:
            if _is_of_other_code(error):
                return None
            raise
        return call if row.arguments is None else _with_arguments(call, row.arguments)
    task = registry.get(row.func_name)
    return None if task is None else _with_arguments(Job(task), row.arguments or {})


def _is_of_other_code(error: PayloadError) -> bool:
    """Whether a stored call may be read elsewhere: by newer code, or where its key is."""
    unknown = (TaskNotFoundError, ImportError, AttributeError)
    return isinstance(error, BadSignature) or isinstance(error.__cause__, unknown)


def _with_arguments(call: Any, arguments: Mapping[str, Any]) -> Any:
    if not isinstance(call, Job):
        message = "A workflow takes no arguments; its steps have theirs."
        raise ScheduleError(message)
    task = call.task
    parameters = task.signature.plain.parameters
    args = positional_from_json(task.func, parameters, arguments.get("args", ()))
    kwargs = arguments_from_json(task.func, parameters, arguments.get("kwargs", {}))
    return call._copy(args=tuple(args), kwargs=kwargs)  # noqa: SLF001 - all of them at once, in place of its own


def check_call(row: ScheduleModel) -> None:
    """Check that what a row calls is known here, and that its arguments fit.

    Raises:
        ValidationError: If not.
    """
    if row.saved_job is not None:
        # What it is started on is read at each start, and may be nothing today.
        row.saved_job.clean()
        return
    if not row.owner and not row.raw_call and registry.get(row.func_name) is None:
        try:
            registry.find(row.func_name)
        except TaskNotFoundError as error:
            raise ValidationError({"func_name": str(error)}) from None
    try:
        call = call_of(row)
        if isinstance(call, Job):
            call.row()
    except Exception as error:  # a job type's validate may raise anything
        # What is about the arguments says so; of anything else its kind tells more.
        is_told = isinstance(error, TypeError | ValueError) and str(error)
        problem = str(error) if is_told else f"{type(error).__name__}: {error}"
        raise ValidationError({"arguments": problem}) from error
    using = row._state.db or get_settings().DATABASE
    if call is not None and call.alias != using:
        message = f"Its calls belong to database {call.alias!r}, and the schedule to {using!r}."
        raise ValidationError({"func_name": message})
