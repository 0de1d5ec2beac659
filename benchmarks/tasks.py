"""The tasks that are measured; those of ``chaos`` are in ``chaos_tasks``."""

from __future__ import annotations

import asyncio
import time

from firefly_jobs import atask, task

from .models import Inserted


@task
def noop(value: int) -> None:
    """Do nothing; the result is stored all the same."""


@task
def insert(value: int) -> None:
    """Insert one row through the ORM."""
    Inserted.objects.create(value=value)


@task
def started_at(value: int) -> int:  # noqa: ARG001 - each call of its own
    """Return when the call began, in nanoseconds; the scheduler reads the same clock."""
    return time.time_ns()


@atask
async def sleep(value: int) -> None:  # noqa: ARG001 - each call of its own
    """Wait for a second, as for a web service."""
    await asyncio.sleep(1)
