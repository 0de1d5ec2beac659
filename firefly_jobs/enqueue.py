"""Write new rows.

The row belongs to the caller's transaction if that is on the same database: it is
rolled back with it and visible with it.  Everything that can be wrong with a call is
found before the INSERT.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from itertools import chain, islice
from operator import attrgetter, itemgetter
from typing import Any

from django.conf import settings as django_settings
from django.db import connections
from django.db.models.expressions import DatabaseDefault

from . import databases, events, messenger, serializers, unique
from .conf import get_settings, seconds, suggestion
from .databases import (
    EXTRA_COLUMNS,
    INSERT_COLUMNS,
    SCHEDULE_COLUMNS,
    STATEMENT_BYTES_MAX,
    STEP_COLUMNS,
)
from .databases.functions import SecondsFromNow
from .jobs import Job
from .models import TaskModel
from .options import ETA_MAX, TaskOptions
from .states import Status
from .wakeup import announce

# Fields of a new row, in the order of databases.base.INSERT_COLUMNS.
INSERTED = (
    *("func_name", "queue", "priority", "not_before", "raw_params"),
    *("retry_delay", "max_retries", "retry"),
)
EXTRAS = tuple(EXTRA_COLUMNS.split(", "))
_inserted = attrgetter(*INSERTED)
_extras = itemgetter(*EXTRAS)
# The fields of a row whose scheduler says nothing about them.
_NO_EXTRAS: tuple[Any, ...] = (*[None] * 5, "", "", {}, [], *[None] * 4)

logger = logging.getLogger("firefly_jobs")


def build(
    name: str,
    options: TaskOptions,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    unique_key: str | None = None,
) -> TaskModel:
    """Return the row of one call, not yet written.

    Args:
        name: The task's name.
        options: Its options, or those of ``using()``.
        args: Positional arguments, already bound to the signature.
        kwargs: Keyword arguments, likewise.
        unique_key: The key of this call, if it has one.

    Raises:
        PayloadError: If the arguments cannot be stored.
        ValueError: If the call would expire before it is due.
    """
    settings = get_settings()
    serializer = options.serializer or settings.SERIALIZER
    serializers.refuse_unreadable(serializer)
    strategy = options.effective_retry
    row = TaskModel(
        func_name=name,
        queue=options.queue or settings.DEFAULT_QUEUE,
        priority=options.priority,
        not_before=options.eta,
        raw_params=serializers.dumps_params(args, kwargs, task_name=name, serializer=serializer),
        max_retries=options.effective_max_retries,
        retry_delay=options.effective_retry_delay,
        retry=None if strategy is None else strategy.to_json(),
    )
    if options.has_extras:
        row.unique_key = row.active_key = unique_key
        row.on_conflict = options.on_conflict
        # An expression until it is written: the database's clock decides.
        row.expires_at = _expires_at(options)
        row.time_limit, row.memory_limit = options.time_limit, options.memory_limit
        row.label, row.description = options.label, options.description
        row.metadata, row.tags = dict(options.metadata), list(options.tags)
    return row


def _expires_at(options: TaskOptions) -> Any:
    """Return when a call expires: seconds count from the moment that it is due."""
    expires, eta = options.expires, options.eta
    if expires is None:
        return None
    if isinstance(expires, datetime):
        if eta is not None and expires <= eta:
            message = f"expires must be after eta, got {expires!r} and {eta!r}."
            raise ValueError(message)
        return expires
    if eta is None:
        return SecondsFromNow(seconds(expires))
    return min(eta, ETA_MAX - timedelta(seconds=seconds(expires))) + timedelta(
        seconds=seconds(expires)
    )


def insert(row: TaskModel, *, using: str | None) -> TaskModel:
    """Write ``row`` with one INSERT and return it.

    Args:
        row: What :func:`build` returned.
        using: The database alias, or ``None`` for ``FIREFLY_JOBS["DATABASE"]``.

    Returns:
        The row; or the one that has its unique key, as ``on_conflict`` says.

    Raises:
        ValueError: If the alias is not in ``DATABASES``.
        TaskAlreadyScheduled: If the key is taken and ``on_conflict`` says so.
    """
    alias = _alias(using)
    if row.active_key is not None:
        return unique.insert(row, connections[alias], write=_write_unless_taken)
    with events.together(alias):
        _write(connections[alias], [row])
    announce(alias, (row.queue,))
    logger.debug(
        "Scheduled task",
        extra={"task_id": row.pk, "task_name": row.func_name, "queue": row.queue},
    )
    return row


def insert_many(rows: Iterable[TaskModel], *, using: str | None = None) -> list[TaskModel]:
    """Write many rows in one transaction, a thousand or more per statement unless they are long.

    Args:
        rows: What :func:`build` returned; an iterator is read batch by batch.
        using: As for :func:`insert`.

    Returns:
        The rows in order, with their ids.  All of them are written, or none.

    Raises:
        ValueError: If the alias is not in ``DATABASES``.
        TaskAlreadyScheduled: As for :func:`insert`.
    """
    return _insert_many(rows, _alias(using), keeps_rows=True)


def _insert_many(rows: Iterable[TaskModel], alias: str, *, keeps_rows: bool) -> list[Any]:
    """Write many rows; return them, or only their ids, so that no more than a batch is held."""
    connection, database = connections[alias], databases.of(alias)
    written: list[Any] = []
    keyed: list[int] = []
    queues: set[str] = set()
    with database.write_transaction(connection):
        iterator = iter(rows)
        while batch := list(islice(iterator, database.insert_batch_size)):
            keyed += [n for n, row in enumerate(batch, len(written)) if row.active_key is not None]
            if plain := [row for row in batch if row.active_key is None]:
                _write(connection, plain)
            queues.update(row.queue for row in batch)
            # Those with a key are written at last.
            written += [
                row if keeps_rows or row.active_key is not None else row.pk for row in batch
            ]
        if keyed:
            unique.insert_many(written, keyed, connection, write=_write_unless_taken)
        announce(alias, queues)
    logger.debug("Scheduled %s tasks", len(written))
    if not keeps_rows:
        for place in keyed:
            written[place] = written[place].pk
    return written


def insert_steps(
    rows: Sequence[TaskModel], *, workflow: int, waiting: Collection[int], using: str
) -> None:
    """Write the rows of a workflow's steps, in the transaction that is open.

    Args:
        rows: What :func:`build` returned; a key that is taken is an error.
        workflow: The workflow's id.
        waiting: The places in ``rows`` of those that wait for others.
        using: The database alias.

    Raises:
        TaskAlreadyScheduled: If another row has the unique key of one.
    """
    for place, row in enumerate(rows):
        row.workflow_id = workflow
        row.on_conflict = "raise"
        if place in waiting:
            row.status = Status.BLOCKED
    insert_many(rows, using=using)


def insert_calls(jobs: Iterable[Job], *, keeps_rows: bool) -> list[Any]:
    """Write many jobs' rows in one transaction; see :func:`firefly_jobs.jobs.schedule_many`.

    Args:
        jobs: The jobs.
        keeps_rows: Whether to return the rows, or only their ids.

    Raises:
        ValueError: If they belong to different databases.
    """
    iterator = iter(jobs)
    first = next(iterator, None)
    if first is None:
        return []
    alias = _alias(first.options.database)

    def rows() -> Iterator[TaskModel]:
        for job in chain([first], iterator):
            if (other := _alias(job.options.database)) != alias:
                message = (
                    f"schedule_many got jobs of the databases {alias!r} and {other!r}, which "
                    f"cannot be committed together. Call it once for each."
                )
                raise ValueError(message)
            yield job.row()

    return _insert_many(rows(), alias, keeps_rows=keeps_rows)


def _write(connection: Any, rows: list[TaskModel]) -> None:
    """Insert ``rows`` with as few statements as they fit in, and tell each its id."""
    # By hand, since the ORM would name every column of a wide table for every row.
    values, columns = list(map(_inserted, rows)), INSERT_COLUMNS
    # Either all of them are steps of a workflow, or none is; and all of a schedule, or none.
    if _is_of_another(rows[0]) or any(_extras(row.__dict__) != _NO_EXTRAS for row in rows):
        values, columns = _with_extras(connection, rows)
    insert, ids = databases.of(connection.alias).insert, []
    for portion in _portions(values):
        ids += insert(connection, portion, columns=columns)
    for row, pk in zip(rows, ids, strict=True):
        _settle_in(row, pk, connection)
    events.scheduled(rows, using=connection.alias)
    messenger.scheduled(rows, using=connection.alias)


def _write_unless_taken(connection: Any, rows: list[TaskModel]) -> list[bool]:
    """Insert those of ``rows`` whose keys, all different, are free; return which."""
    values, columns = _with_extras(connection, rows)
    insert, ids = databases.of(connection.alias).insert_unless_taken, []
    with events.together(connection.alias):
        for portion in _portions(values):
            ids += insert(connection, portion, columns=columns)
        for row, pk in zip(rows, ids, strict=True):
            if pk is not None:
                _settle_in(row, pk, connection)
        written = [row for row, pk in zip(rows, ids, strict=True) if pk is not None]
        events.scheduled(written, using=connection.alias)
    messenger.scheduled(written, using=connection.alias)
    return [pk is not None for pk in ids]


def _settle_in(row: TaskModel, pk: int, connection: Any) -> None:
    row.pk = pk
    row._state.adding, row._state.db = False, connection.alias
    _forget_defaults(row)


def _with_extras(connection: Any, rows: list[TaskModel]) -> tuple[list[tuple[Any, ...]], str]:
    values = [(*_inserted(row), *_prepared(row, connection)) for row in rows]
    columns = f"{INSERT_COLUMNS}, {EXTRA_COLUMNS}"
    if not _is_of_another(rows[0]):
        return values, columns
    is_step = bool(rows[0].workflow_id)
    more, others = (STEP_COLUMNS, _of_step) if is_step else (SCHEDULE_COLUMNS, _of_schedule)
    values = [(*found, *others(row)) for found, row in zip(values, rows, strict=True)]
    return values, f"{columns}, {more}"


def _is_of_another(row: TaskModel) -> bool:
    return bool(row.workflow_id or row.schedule_id)


_of_step = attrgetter("workflow_id", "next_gate", "status")
_of_schedule = attrgetter("schedule_id", "occurrence", "is_manual")


def _prepared(row: TaskModel, connection: Any) -> Iterator[Any]:
    for field, value in zip(_extra_fields(), _extras(row.__dict__), strict=True):
        is_ready = value is None or isinstance(value, str | datetime | SecondsFromNow)
        yield value if is_ready else field.get_db_prep_save(value, connection)


@lru_cache(maxsize=1)
def _extra_fields() -> list[Any]:
    return [TaskModel._meta.get_field(name) for name in EXTRAS]


def _portions(values: list[tuple[Any, ...]]) -> list[list[tuple[Any, ...]]]:
    """Cut what is to be inserted into what one statement may hold, by the length of its texts."""
    if len(values) == 1:
        return [values]
    portions: list[list[tuple[Any, ...]]] = [[]]
    length = 0
    for row in values:
        own = sum(_bytes_at_most(value) for value in row if isinstance(value, str))
        if portions[-1] and length + own > STATEMENT_BYTES_MAX:
            portions.append([])
            length = 0
        portions[-1].append(row)
        length += own
    return portions


def _bytes_at_most(text: str) -> int:
    # Encoding each text to count its bytes would cost as much as sending it.
    return len(text) if text.isascii() else 4 * len(text)


def _alias(using: str | None) -> str:
    alias = using or get_settings().DATABASE
    if alias not in django_settings.DATABASES:
        message = (
            f"There is no database {alias!r} in DATABASES."
            f"{suggestion(alias, django_settings.DATABASES)}"
        )
        raise ValueError(message)
    return alias


def _forget_defaults(row: TaskModel) -> None:
    """Let what the database has worked out be read when somebody asks."""
    fields: Any = row.__dict__
    if isinstance(fields.get("created"), DatabaseDefault):
        del fields["created"]
    if isinstance(fields.get("expires_at"), SecondsFromNow):
        del fields["expires_at"]
