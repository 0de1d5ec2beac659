"""The Celery application of this process, and what the bridge adds to it.

Celery's own ``current_app`` belongs to a thread, and consumers have several.  So the
application is named once, by :func:`install`: in workers, where it adds the task that
executes claims and listens for calls that have ended, and in consumers, which send them.

Imports no model: see the package.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import Celery, signals, states
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

logger = logging.getLogger("firefly_jobs")

# The Celery task that executes a claim.
RUN = "firefly_jobs.run"
# The header of a call for which a row waits: alias, id.
HEADER = "firefly_jobs_waiting"

_installed: list[Celery] = []


def install(app: Celery) -> None:
    """Make ``app`` the Celery application of this process, and add to it what workers need."""
    _installed[:] = [app]
    app.task(name=RUN, ignore_result=True, acks_late=False, max_retries=0)(_run)
    signals.task_postrun.connect(_ended, weak=False, dispatch_uid=RUN)


def installed_app() -> Celery:
    """Return the application that :func:`install` was called with.

    Raises:
        ImproperlyConfigured: If there is none.
    """
    if not _installed:
        message = (
            "No Celery application is known in this process. Call "
            "firefly_jobs.contrib.celery.install(app) where it is made, and have that module "
            "imported: from the project's __init__.py as Celery's own guide does, or by "
            "FIREFLY_JOBS['IMPORTS']."
        )
        raise ImproperlyConfigured(message)
    return _installed[0]


def handed_over(celery_id: str) -> str:
    """Return the reason for which a row waits; it has another one for each call."""
    return f"handed over to Celery as {celery_id}"


def _run(using: str, consumer: int, pk: int, fence: int) -> None:
    """Execute a claim, in a worker."""
    from .worker import execute  # noqa: PLC0415 - it imports models; see the module's docstring

    execute(using=using, consumer=consumer, pk=pk, fence=fence)


def _ended(task: Any = None, state: str | None = None, **_: Any) -> None:
    """Make the row due that waits for the call which has just ended in this worker."""
    waiting = task.request.get(HEADER) if task is not None else None
    if waiting is None or state not in states.READY_STATES:
        return
    try:
        using, pk = waiting
        is_connected = connections[using].connection is not None
        from firefly_jobs import lifecycle  # noqa: PLC0415 - as above

        # If it has been cancelled or replaced meanwhile, this is none of its business.
        lifecycle.hasten(pk, reason=handed_over(task.request.get("id")), using=using)
        if not is_connected:
            connections[using].close()
    except Exception:  # the row looks by itself later, and the Celery task has ended
        logger.warning("A row could not be told that its Celery task has ended", exc_info=True)
