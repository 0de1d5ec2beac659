"""Rows and names with everything filled in that a test does not care about."""

import itertools
from typing import Any

from tests.testapp.models import Effect

_numbers = itertools.count(1)


def unique_name(prefix: str = "name") -> str:
    """Return a name that no other call in this run returns."""
    return f"{prefix}-{next(_numbers)}"


def create_effect(**fields: Any) -> Effect:
    """Create an effect as a task would have left it."""
    return Effect.objects.create(**({"task_key": unique_name("task"), "value": 1} | fields))
