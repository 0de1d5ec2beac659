"""Check what a consumer was told, and look up what it was not.

``consume_tasks`` checks its arguments while it parses them; a ``Consumer`` may be made by
anybody, and what it cannot mean is reported there, not once it claims nothing or
everything.  Each function returns the value that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

from .conf import get_settings, seconds, suggestion
from .options import check_queue

ALL_QUEUES = "*"

_Default = TypeVar("_Default", int, None)


def queue_names(queues: Any) -> list[str]:
    """Return the queues to serve; for ``None`` ``FIREFLY_JOBS["DEFAULT_QUEUE"]``."""
    if queues is None:
        return [get_settings().DEFAULT_QUEUE]
    if isinstance(queues, str | bytes) or not isinstance(queues, Sequence):
        message = (
            f"queues must be a list of names, got {queues!r} of type {type(queues).__name__}. "
            f"For one queue pass a list of one, such as ['mail']."
        )
        raise TypeError(message)
    if not queues:
        message = (
            f"queues must name a queue at least, got {queues!r}. "
            f"Leave it out for FIREFLY_JOBS['DEFAULT_QUEUE']; ['*'] stands for all."
        )
        raise ValueError(message)
    for name in queues:
        if name != ALL_QUEUES:
            check_queue(name)
    return list(queues)


def count(word: str, value: Any, default: _Default) -> int | _Default:
    """Return how many; ``default`` for ``None``."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{word} must be a whole number, got {value!r} of type {type(value).__name__}."
        raise TypeError(message)
    if value < 1:
        message = f"{word} must be 1 or more, got {value}."
        raise ValueError(message)
    return value


def shutdown_seconds(timeout: Any) -> float:
    """Return how long running calls get; for ``None`` ``FIREFLY_JOBS["SHUTDOWN_TIMEOUT"]``."""
    if timeout is None:
        return get_settings().SHUTDOWN_TIMEOUT
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | timedelta):
        message = (
            f"shutdown_timeout must be seconds or a timedelta, got {timeout!r} "
            f"of type {type(timeout).__name__}."
        )
        raise TypeError(message)
    if not 0 <= seconds(timeout) < float("inf"):
        message = f"shutdown_timeout must be zero or more seconds, got {timeout!r}."
        raise ValueError(message)
    return seconds(timeout)


def check_word(word: str, value: Any, known: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``known``."""
    if value not in known:
        message = (
            f"{word} must be one of {', '.join(map(repr, known))}, got {value!r}."
            f"{suggestion(str(value), known)}"
        )
        raise ValueError(message)
