"""Make rows of what the code declares to recur, and keep them in step with it.

What a person has changed in a row stays as it is: each row remembers what the code said last,
and only what still says that follows the code.  A row whose declaration has gone is retired,
not deleted, and comes back with it.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, NamedTuple

from django.conf import settings as django_settings
from django.core.exceptions import ValidationError
from django.db import IntegrityError, connections

from . import databases
from .conf import get_settings
from .declarations import Declaration, all_declared, callee
from .models import ScheduleModel
from .planning import check_call, locked, plan
from .schedule_models import PLAN_FIELDS

logger = logging.getLogger("firefly_jobs")


class Synced(NamedTuple):
    """The names of schedules that a synchronisation has changed."""

    created: list[str]
    changed: list[str]
    retired: list[str]


def owner() -> str:
    """Return whose declarations those of this process are."""
    if named := get_settings().SCHEDULE_OWNER:
        return named
    module = getattr(django_settings, "SETTINGS_MODULE", None) or "project"
    return str(module).partition(".")[0]


def sync(*, using: str) -> Synced:
    """Write what is declared here, and retire what this project has declared before.

    Args:
        using: Database alias; what belongs to others is left alone.

    Returns:
        What has changed; nothing if all was in step, and then nothing was written.
    """
    wanted = {item.name: item for item in all_declared() if item.alias == using}
    synced = Synced([], [], [])
    # Mostly all is in step, and one look without a lock says so.
    rows = {str(row.name): row for row in ScheduleModel.objects.using(using).exclude(owner="")}
    for name, declaration in sorted(wanted.items()):
        row = rows.get(name)
        if row is None or _changes(row, declaration):
            _write(declaration, synced, using)
    for name, row in sorted(rows.items()):
        if name not in wanted and row.owner == owner() and not row.is_retired:
            _retire(row.pk, synced, using)
    for verb, names in synced._asdict().items():
        if names:
            logger.info("Schedules %s: %s", verb, ", ".join(names))
    return synced


def _write(declaration: Declaration, synced: Synced, using: str) -> None:
    if _insert(declaration, using):
        synced.created.append(declaration.name)
        return
    with databases.of(using).own_transaction(connections[using]):
        row = locked(using).get(name=declaration.name)
        if not row.owner:
            logger.error(
                "Schedule %s is declared by the code, but was made by hand before, and is left as "
                "it is. Rename or delete the one in the database",
                row.name,
            )
            return
        changes = _changes(row, declaration)
        for name, value in changes.items():
            setattr(row, name, value)
        if changes:
            _check(row)
            plan(row, row.now)
            row.save(using=using)
            synced.changed.append(declaration.name)


def _insert(declaration: Declaration, using: str) -> bool:
    """Write a new row, unless there is one, perhaps of a consumer that starts as well."""
    if ScheduleModel.objects.using(using).filter(name=declaration.name).exists():
        return False
    row = ScheduleModel(name=declaration.name, owner=owner(), **_said(declaration))
    row.declared = _as_json(declaration)
    try:
        with databases.of(using).own_transaction(connections[using]):
            row.save(using=using)
    except IntegrityError:
        return False
    return True


def _check(row: ScheduleModel) -> None:
    try:
        row.clean()
        check_call(row)
    except ValidationError as error:
        row.last_error = f"Cannot run: {'; '.join(error.messages)}"
        logger.exception("Schedule %s does not fit its call any more", row.name)


def _retire(pk: int, synced: Synced, using: str) -> None:
    with databases.of(using).own_transaction(connections[using]):
        row = locked(using).get(pk=pk)
        row.is_retired, row.next_run = True, None
        row.save(using=using, update_fields=["is_retired", "next_run"])
    synced.retired.append(str(row.name))


def _changes(row: ScheduleModel, declaration: Declaration) -> dict[str, Any]:
    """Return what has to be written so that a row follows its declaration."""
    before, now = row.declared or {}, _as_json(declaration)
    said = _said(declaration)
    changes: dict[str, Any] = {
        name: value
        for name, value in said.items()
        if now[name] != before.get(name) and _plain(getattr(row, name)) == before.get(name)
    }
    if now != before:
        changes["declared"] = now
    if row.is_retired:
        changes["is_retired"] = False
    if row.owner and row.owner != owner():
        changes["owner"] = owner()
    return changes


def _said(declaration: Declaration) -> dict[str, Any]:
    found = {name: getattr(declaration, name) for name in PLAN_FIELDS}
    return {**found, "func_name": callee(declaration.call)}


def _as_json(declaration: Declaration) -> dict[str, Any]:
    return {name: _plain(value) for name, value in _said(declaration).items()}


def _plain(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value
