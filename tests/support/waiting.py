"""Wait for something to become true, with a deadline instead of a guess.

The pause in here is the only sleep of the tests.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from django.core.exceptions import ObjectDoesNotExist

T = TypeVar("T")

PAUSE_SECONDS = 0.01


def eventually(assertion: Callable[[], T], *, timeout_seconds: float = 10.0) -> T:
    """Call ``assertion`` until it passes, and return what it returned.

    Args:
        assertion: Asserts, or gets a row that may not be there yet.
        timeout_seconds: Once over, the last failure is raised as it is.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return assertion()
        except (AssertionError, ObjectDoesNotExist):
            if time.monotonic() >= deadline:
                raise
        time.sleep(PAUSE_SECONDS)  # noqa: TID251 - see the module's docstring
