"""Tasks of the tests; each leaves an :class:`Effect` or nothing, so that a run can be counted."""

from typing import Any

from firefly_jobs.contexts import TaskContext
from firefly_jobs.decorators import atask, task
from tests.testapp.models import Effect


@task
def add(a: int, b: int = 2) -> int:
    """Add; touches no database."""
    return a + b


@atask
async def aadd(a: int, b: int = 2) -> int:
    """Add; never waits."""
    return a + b


@task
def echo(value: Any = None) -> Any:
    """Return what was passed."""
    return value


@task
def write_effect(task_key: str, value: int = 1) -> int:
    """Leave one effect."""
    Effect.objects.create(task_key=task_key, value=value)
    return value


@task(takes_context=True)
def with_context(context: TaskContext, value: int = 0) -> int:
    """Return the attempt's number plus ``value``."""
    return context.attempt + value


@task(serializer="json")
def echo_json(value: Any = None) -> Any:
    """Return what was passed, stored as JSON."""
    return value
