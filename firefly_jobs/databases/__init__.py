"""The databases this app runs on: the only home of what differs between them."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module

from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from .base import Completion, Database, Problem, Session

_CLASSES = {
    "postgresql": ("postgresql", "PostgreSQL"),
    "mysql": ("mysql", "MySQL"),
    "sqlite": ("sqlite", "SQLite"),
}

__all__ = ["Completion", "Database", "Problem", "Session", "is_supported", "of"]


def of(alias: str) -> Database:
    """Return what the database behind ``alias`` can do.

    Raises:
        ImproperlyConfigured: If it is of a kind this app does not run on.
    """
    return _make(connections[alias].vendor)


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
