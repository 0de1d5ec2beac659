"""The databases this app runs on: the only home of what differs between them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from .base import (
    ALL_BANDS,
    EXTRA_COLUMNS,
    INSERT_COLUMNS,
    SCHEDULE_COLUMNS,
    STATEMENT_BYTES_MAX,
    STEP_COLUMNS,
    Database,
    Problem,
)
from .completing import Completion, Counted
from .notices import ANY_QUEUE, ANY_TASK, ROLL_CALL, Channel, Notice, Subscription
from .sessions import Session

_CLASSES = {
    "postgresql": ("postgresql", "PostgreSQL"),
    "mysql": ("mysql", "MySQL"),
    "sqlite": ("sqlite", "SQLite"),
}

__all__ = [
    "ALL_BANDS",
    "ANY_QUEUE",
    "ANY_TASK",
    "EXTRA_COLUMNS",
    "INSERT_COLUMNS",
    "ROLL_CALL",
    "SCHEDULE_COLUMNS",
    "STATEMENT_BYTES_MAX",
    "STEP_COLUMNS",
    "Channel",
    "Completion",
    "Counted",
    "Database",
    "Notice",
    "Problem",
    "Session",
    "Subscription",
    "is_supported",
    "leave_pools",
    "of",
]


def of(alias: str) -> Database:
    """Return what the database behind ``alias`` can do.

    Raises:
        ImproperlyConfigured: If it is of a kind this app does not run on.
    """
    return _make(connections[alias].vendor)


def leave_pools() -> None:
    """Make every connection that this process opens from now on its own.

    Called before the first connecting, which would fill the pools.
    """
    for connection in connections.all():
        if connection.vendor in _CLASSES:
            of(connection.alias).leave_pool(connection)


def is_supported(alias: str) -> bool:
    """Whether this app runs on databases of the kind behind ``alias``; connects to nothing."""
    return connections[alias].vendor in _CLASSES


@lru_cache(maxsize=len(_CLASSES))
def _make(vendor: str) -> Database:
    if vendor not in _CLASSES:
        message = (
            f"firefly_jobs runs on {', '.join(sorted(_CLASSES))}, not on {vendor!r}. Point "
            f"FIREFLY_JOBS['DATABASE'] at an alias of one of these."
        )
        raise ImproperlyConfigured(message)
    module, name = _CLASSES[vendor]
    database: Database = getattr(import_module(f".{module}", __package__), name)()
    return database
