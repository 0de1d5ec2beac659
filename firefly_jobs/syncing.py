"""Make rows of what the code declares to recur, and keep them in step with it.

What a person has changed in a row stays as it is: each row remembers what the code said last,
and only what still says that follows the code.  A row whose declaration has gone is retired,
not deleted, and comes back with it.

While a deploy replaces one consumer after the other, some declare what others do not.  Then
the one that has lived longest says what holds: the old code until its last consumer has gone.
A process of the old code that starts late changes nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from django.core.exceptions import ValidationError
from django.db import IntegrityError, connections, transaction

from . import databases
from .declarations import (
    DIGEST_LENGTH,
    Declaration,
    all_declared,
    callee,
    owner,
    problems_of,
)
from .models import ConsumerModel, ScheduleModel
from .planning import check_call, locked, plan_after
from .schedule_models import CANNOT_RUN, PLAN_FIELDS, RECURRENCE_FIELDS

logger = logging.getLogger("firefly_jobs")


class Synced(NamedTuple):
    """The names of schedules that a synchronisation has changed."""

    created: list[str]
    changed: list[str]
    retired: list[str]


# Complaints that were made: a sync comes every minute, and one of each is enough.
_told: set[str] = set()


def sync(*, using: str, consumer: int | None = None) -> Synced:
    """Write what is declared here, and retire what this project has declared before.

    A schedule that cannot be written is logged, and keeps the others from nothing.

    Args:
        using: Database alias; what belongs to others is left alone.
        consumer: The consumer that asks: where one that is older declares otherwise, nothing is
            written.

    Returns:
        What has changed; nothing if all was in step, and then nothing was written.
    """
    wanted = {item.name: item for item in all_declared() if item.alias == using}
    synced = Synced([], [], [])
    if consumer is not None and not _is_eldest(consumer, wanted.values(), using):
        return synced
    # Mostly all is in step, and one look without a lock says so.
    found = ScheduleModel.objects.using(using).exclude(owner="").defer("raw_last_result")
    rows = {str(row.name): row for row in found}
    for name, declaration in sorted(wanted.items()):
        row = rows.get(name) or _renamed(declaration, rows, wanted, using)
        if row is None or _changes(row, declaration):
            _try(name, partial(_write, declaration, synced, using), using)
    for name, row in sorted(rows.items()):
        if name not in wanted and row.owner == owner() and not row.is_retired:
            _try(name, partial(_retire, row.pk, synced, using), using)
    for verb, names in synced._asdict().items():
        if names:
            logger.info("Schedules %s: %s", verb, ", ".join(names))
    return synced


def _renamed(
    declaration: Declaration,
    rows: dict[str, ScheduleModel],
    wanted: Collection[str],
    using: str,
) -> ScheduleModel | None:
    """Give the row of a function that was moved its new name, and return it, if there is one."""
    for former in declaration.former_names:
        row = rows.get(former)
        if row is not None and former not in wanted and row.owner == owner():
            found = ScheduleModel.objects.using(using).filter(pk=row.pk, name=former)
            if found.update(name=declaration.name):
                rows[declaration.name] = rows.pop(former)
                return row
    return None


def _try(name: str, work: Callable[[], None], using: str) -> None:
    try:
        work()
    except Exception as error:
        if databases.of(using).is_lost(error):
            raise
        _complain("Schedule %s could not be brought in step with the code: %s", name, error)


def _complain(message: str, name: str, *words: object) -> None:
    text = message % (name, *words)
    if text not in _told:
        _told.add(text)
        logger.error("%s", text)


def _is_eldest(consumer: int, declarations: Iterable[Declaration], using: str) -> bool:
    """Note what a consumer declares, and return whether no older one declares otherwise."""
    said = sorted([item.name, item.alias, _as_json(item)] for item in declarations)
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=DIGEST_LENGTH // 2).hexdigest()
    ours = ConsumerModel.objects.using(using).filter(schedule_owner=owner())
    if not ours.filter(pk=consumer, declared=digest).exists():
        ConsumerModel.objects.using(using).filter(pk=consumer).update(
            schedule_owner=owner(), declared=digest
        )
    elder = ours.filter(pk__lt=consumer).exclude(declared=digest).order_by("pk").first()
    if elder is not None:
        logger.info(
            "Schedules follow consumer %s, which is older and declares others, until it has ended",
            elder,
        )
    return elder is None


def _write(declaration: Declaration, synced: Synced, using: str) -> None:
    is_new = _insert(declaration, using)
    with databases.of(using).own_transaction(connections[using]):
        row = locked(using).get(name=declaration.name)
        if not is_new and not _may_be_taken(row, using):
            return
        changes = _changes(row, declaration)
        if not is_new and not changes:
            return
        for name, value in changes.items():
            setattr(row, name, value)
        columns = [*changes, "next_run"]
        plan_after(row, changes, row.now)
        problem = _problem(row)
        if problem is not None or row.last_error.startswith(CANNOT_RUN):
            row.last_error, columns = problem or "", [*columns, "last_error"]
        row.save(using=using, update_fields=columns)
    (synced.created if is_new else synced.changed).append(declaration.name)


def _insert(declaration: Declaration, using: str) -> bool:
    """Write a new row, unless there is one, perhaps of a consumer that starts as well."""
    rows = ScheduleModel.objects.using(using)
    if rows.filter(name=declaration.name).exists():
        return False
    row = ScheduleModel(name=declaration.name, owner=owner(), **_said(declaration))
    row.declared = _as_json(declaration)
    try:
        with transaction.atomic(using=using):
            rows.bulk_create([row])
    except IntegrityError:
        return False
    return True


def _may_be_taken(row: ScheduleModel, using: str) -> bool:
    """Return whether a row is ours, or that of a project which is not there any more."""
    if not row.owner:
        _complain(
            "Schedule %s is declared by the code, but was made by hand before, and is left as it "
            "is. Rename or delete the one in the database",
            str(row.name),
        )
        return False
    others = ConsumerModel.objects.using(using).filter(schedule_owner=row.owner)
    if row.owner == owner() or not others.exists():
        return True
    _complain(
        "Schedule %s is declared by project %s as well, whose consumers run, and is left to it. "
        "Names are unique in a database: give one of them another with name=",
        str(row.name),
        row.owner,
    )
    return False


def _problem(row: ScheduleModel) -> str | None:
    """Return why a row cannot run; one of which nobody can say when is not planned."""
    try:
        if problems_of(row):
            row.next_run = None
        row.clean()
        check_call(row)
    except ValidationError as error:
        problem = f"{CANNOT_RUN}{'; '.join(error.messages)}"
        _complain("Schedule %s does not fit its call any more. %s", str(row.name), problem)
        return problem
    return None


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
    by_hand = {name for name in said if _plain(getattr(row, name)) != before.get(name)}
    if by_hand.intersection(RECURRENCE_FIELDS):
        # Half of what a person said, and half of what the code does, is no plan.
        by_hand.update(RECURRENCE_FIELDS)
    changes: dict[str, Any] = {
        name: value
        for name, value in said.items()
        if now[name] != before.get(name) and name not in by_hand
    }
    if now != before:
        changes["declared"] = now
    if row.is_retired:
        changes["is_retired"] = False
    if row.owner != owner():
        changes["owner"] = owner()
    return changes


def _said(declaration: Declaration) -> dict[str, Any]:
    found = {name: getattr(declaration, name) for name in PLAN_FIELDS}
    return {**found, "func_name": callee(declaration.call)}


def _as_json(declaration: Declaration) -> dict[str, Any]:
    return {name: _plain(value) for name, value in _said(declaration).items()}


def _plain(value: Any) -> Any:
    return value.astimezone(UTC).isoformat() if isinstance(value, datetime) else value
