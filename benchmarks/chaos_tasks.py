"""The tasks of ``chaos``: each that completes leaves one effect with its id, and returns it.

All but one rest before and after their effect, so that a kill finds them without a query,
with a row written, and between their end and its settling.
"""

from __future__ import annotations

import asyncio
import time

from firefly_jobs import atask, task
from firefly_jobs.contexts import TaskContext

from .models import ChaosEffect

REST_SECONDS_MAX = 0.04
# Long enough that a consumer holds some of them whenever it is killed.
WAIT_SECONDS_MAX = 0.5
# Shorter, since on SQLite nobody else can write meanwhile.
HOLD_SECONDS_MAX = 0.01
# The attempt that a retrying task succeeds with; each before it is a retry.
SUCCEEDS_AT = 3


class ExpectedError(Exception):
    """What a task raises that is meant to fail."""


@task(takes_context=True)
def write(context: TaskContext) -> int:
    """Write one effect."""
    return _write(context)


@atask(takes_context=True)
async def awrite(context: TaskContext) -> int:
    """Write one effect from a coroutine."""
    return await _awrite(context)


@task(takes_context=True, group_commit=True)
def write_at_once(context: TaskContext) -> int:
    """Write one effect without a rest: short enough to share a COMMIT with others."""
    ChaosEffect.objects.create(task=context.id)
    return context.id


@task(takes_context=True)
def idle(context: TaskContext) -> int:
    """Touch no database: the outcome is settled with others'."""
    time.sleep(_share(context) * REST_SECONDS_MAX)
    return context.id


@atask(takes_context=True)
async def aidle(context: TaskContext) -> int:
    """Touch no database in a coroutine."""
    await asyncio.sleep(_share(context) * WAIT_SECONDS_MAX)
    return context.id


@task(takes_context=True, max_retries=0)
def fail(context: TaskContext) -> int:
    """Write one effect, and raise: it must not be there afterwards."""
    _write(context)
    raise ExpectedError


@task(takes_context=True, max_retries=SUCCEEDS_AT - 1, retry_delay=1)
def succeed_later(context: TaskContext) -> int:
    """Write one effect, and raise at every attempt but the last."""
    task_id = _write(context)
    if context.attempt < SUCCEEDS_AT:
        raise ExpectedError
    return task_id


@atask(takes_context=True, max_retries=SUCCEEDS_AT - 1, retry_delay=1)
async def asucceed_later(context: TaskContext) -> int:
    """Do the same in a coroutine."""
    task_id = await _awrite(context)
    if context.attempt < SUCCEEDS_AT:
        raise ExpectedError
    return task_id


def _write(context: TaskContext) -> int:
    time.sleep(_share(context) * REST_SECONDS_MAX)
    ChaosEffect.objects.create(task=context.id)
    time.sleep(_share(context) * HOLD_SECONDS_MAX)
    return context.id


async def _awrite(context: TaskContext) -> int:
    await asyncio.sleep(_share(context) * WAIT_SECONDS_MAX)
    await ChaosEffect.objects.acreate(task=context.id)
    await asyncio.sleep(_share(context) * HOLD_SECONDS_MAX)
    return context.id


def _share(context: TaskContext) -> float:
    """Return something between zero and one that differs from task to task."""
    return context.id % 10 / 10
