"""A bridge to Celery, in both directions that matter: call it, or let it do the work.

:class:`CeleryJob` hands one call to a task of an existing Celery application and settles
its row when Celery reports back.  ``manage.py celery_consume`` lets Celery workers execute
this project's own tasks; rows, fences and transactions stay what they are.

Both need :func:`install`, called where the Celery application is made::

    app = Celery("mysite")
    app.config_from_object("django.conf:settings", namespace="CELERY")
    app.autodiscover_tasks()
    install(app)

A consumer of jobs needs ``"firefly_jobs.contrib.celery.jobs"`` in
``FIREFLY_JOBS["IMPORTS"]``.  This module itself imports no model, because Celery
applications are made before Django is set up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import celery  # noqa: F401 - asked for, so that what is missing is said here
except ImportError as error:
    message = (
        "firefly_jobs.contrib.celery is a bridge to Celery, which is not installed. Run: "
        "pip install 'django-firefly-jobs[celery]'"
    )
    raise ImportError(message) from error

from .app import install, installed_app

if TYPE_CHECKING:
    from .jobs import CeleryIntegrationJob, CeleryJob, CeleryTaskFailed, CeleryTaskSilent

__all__ = [
    "CeleryIntegrationJob",
    "CeleryJob",
    "CeleryTaskFailed",
    "CeleryTaskSilent",
    "install",
    "installed_app",
]

_OF_JOBS = {"CeleryIntegrationJob", "CeleryJob", "CeleryTaskFailed", "CeleryTaskSilent"}


def __getattr__(name: str) -> Any:
    if name in _OF_JOBS:
        return getattr(import_module(f"{__name__}.jobs"), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
