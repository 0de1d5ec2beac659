"""Wait for a database that is not there yet: containers start in any order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from time import monotonic

from django.db import Error, connections

from . import databases

logger = logging.getLogger("firefly_jobs")

# For so long a database may be away when a consumer starts.
AWAIT_DATABASE_SECONDS = 30.0
_RETRY_SECONDS = 1.0


def insist(
    using: str,
    step: Callable[[], object] | None = None,
    *,
    timeout_seconds: float = AWAIT_DATABASE_SECONDS,
    is_stopping: Callable[[], bool] = lambda: False,
    wait: Callable[[float], object] | None = None,
) -> bool:
    """Do one step of starting, again while the database cannot be reached.

    Args:
        using: Database alias.
        step: What to do, which may be done twice; by default connecting.
        timeout_seconds: How long to try.
        is_stopping: Ends the trying.
        wait: Waits for so many seconds, or until something has happened.

    Returns:
        Whether it was done; ``False`` if there was a wish to stop before.

    Raises:
        Error: What the step raised: at once if the server itself refused (a wrong
            password, where it says so), else when the time was over.
    """
    connection = connections[using]
    deadline = monotonic() + timeout_seconds
    while not is_stopping():
        try:
            (step or connection.ensure_connection)()
        except Error as error:
            if not databases.of(using).is_lost(error) or monotonic() >= deadline:
                raise
            logger.warning("Waiting for database %s: %s", using, error)
            with suppress(Error):
                connection.close()
            (wait or Event().wait)(_RETRY_SECONDS)
        else:
            return True
    return False
