"""The tasks that are measured."""

from __future__ import annotations

from firefly_jobs import task

from .models import Inserted


@task
def noop(value: int) -> None:
    """Do nothing; the result is stored all the same."""


@task
def insert(value: int) -> None:
    """Insert one row through the ORM."""
    Inserted.objects.create(value=value)
