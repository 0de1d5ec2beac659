"""Write new rows.

The row belongs to the caller's transaction if that is on the same database: it is
rolled back with it and visible with it.  Everything that can be wrong with a call is
found before the INSERT.
"""

from __future__ import annotations

import logging
from typing import Any

from django.conf import settings as django_settings
from django.db.models.expressions import DatabaseDefault

from . import serializers
from .conf import get_settings, suggestion
from .models import TaskModel
from .options import TaskOptions

logger = logging.getLogger("firefly_jobs")


def build(
    name: str, options: TaskOptions, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TaskModel:
    """Return the row of one call, not yet written.

    Args:
        name: The task's name.
        options: Its options, or those of ``using()``.
        args: Positional arguments, already bound to the signature.
        kwargs: Keyword arguments, likewise.

    Raises:
        PayloadError: If the arguments cannot be stored.
    """
    settings = get_settings()
    strategy = options.effective_retry
    return TaskModel(
        func_name=name,
        queue=options.queue or settings.DEFAULT_QUEUE,
        priority=options.priority,
        not_before=options.eta,
        raw_params=serializers.dumps_params(
            args, kwargs, task_name=name, serializer=options.serializer or settings.SERIALIZER
        ),
        max_retries=options.effective_max_retries,
        retry_delay=options.effective_retry_delay,
        retry=None if strategy is None else strategy.to_json(),
    )


def insert(row: TaskModel, *, using: str | None) -> TaskModel:
    """Write ``row`` with one INSERT and return it.

    Args:
        row: What :func:`build` returned.
        using: The database alias, or ``None`` for ``FIREFLY_JOBS["DATABASE"]``.

    Raises:
        ValueError: If the alias is not in ``DATABASES``.
    """
    alias = using or get_settings().DATABASE
    if alias not in django_settings.DATABASES:
        message = (
            f"There is no database {alias!r} in DATABASES."
            f"{suggestion(alias, django_settings.DATABASES)}"
        )
        raise ValueError(message)
    row.save(using=alias, force_insert=True)
    created: Any = row.created
    if isinstance(created, DatabaseDefault):
        # MySQL cannot return what an INSERT filled in: read it when somebody asks.
        del row.__dict__["created"]
    logger.debug(
        "Scheduled task",
        extra={"task_id": row.pk, "task_name": row.func_name, "queue": row.queue},
    )
    return row
