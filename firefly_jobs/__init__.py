"""A background-task queue inside your Django project's own database.

Follow one task by opening, in order: ``decorators`` (what a user writes), ``enqueue``
(the row), ``models``, ``consumer`` (the loop), ``lifecycle`` (claim and settle),
``executors`` (the call), ``transactions`` (its transaction).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .consumer import Consumer
    from .contexts import current_task
    from .decorators import AsyncTask, Task, atask, task
    from .exceptions import (
        AsyncFuncNotSupportedException,
        BadSignature,
        Cancel,
        JobRefused,
        LeaseLost,
        MemoryLimitExceeded,
        PayloadError,
        PayloadTooLargeError,
        Retry,
        ScheduleError,
        Snooze,
        SyncFuncNotSupportedException,
        TaskAlreadyScheduled,
        TaskCancelled,
        TaskFailed,
        TaskNotFoundError,
        TimeLimitExceeded,
        WaitInsideTransactionError,
        WorkflowError,
    )
    from .hooks import FailedStep, TaskHooks
    from .job_registry import (
        get_job_from_name,
        register_job,
        registered_jobs,
        start_job_from_name,
    )
    from .jobs import Job, aschedule_many, schedule_many
    from .limits import Concurrency, RateLimit
    from .models import (
        ConsumerModel,
        JobStart,
        SavedJob,
        ScheduleModel,
        TaskAttempt,
        TaskEvent,
        TaskModel,
        WorkflowModel,
    )
    from .priorities import Priority
    from .recurring_jobs import Misfire, Overlap, recurring, recurring_job
    from .references import TaskReference
    from .resources import Limit
    from .retries import Exponential, Fixed, RandomDelay, RetryStrategy
    from .states import Status
    from .utils import task_as_dict
    from .workflows import Workflow, chain, chord, group

__version__ = "0.1.0"

_HOMES = {
    "contexts": ("current_task",),
    "consumer": ("Consumer",),
    "decorators": ("AsyncTask", "Task", "atask", "task"),
    "exceptions": (
        "AsyncFuncNotSupportedException",
        "BadSignature",
        "Cancel",
        "JobRefused",
        "LeaseLost",
        "MemoryLimitExceeded",
        "PayloadError",
        "PayloadTooLargeError",
        "Retry",
        "ScheduleError",
        "Snooze",
        "SyncFuncNotSupportedException",
        "TaskCancelled",
        "TaskFailed",
        "TaskAlreadyScheduled",
        "TaskNotFoundError",
        "TimeLimitExceeded",
        "WaitInsideTransactionError",
        "WorkflowError",
    ),
    "hooks": ("FailedStep", "TaskHooks"),
    "jobs": ("Job", "aschedule_many", "schedule_many"),
    "limits": ("Concurrency", "RateLimit"),
    "models": (
        "ConsumerModel",
        "JobStart",
        "SavedJob",
        "ScheduleModel",
        "TaskAttempt",
        "TaskEvent",
        "TaskModel",
        "WorkflowModel",
    ),
    "references": ("TaskReference",),
    "job_registry": (
        "get_job_from_name",
        "register_job",
        "registered_jobs",
        "start_job_from_name",
    ),
    "recurring_jobs": ("Misfire", "Overlap", "recurring", "recurring_job"),
    "priorities": ("Priority",),
    "resources": ("Limit",),
    "retries": ("Exponential", "Fixed", "RandomDelay", "RetryStrategy"),
    "states": ("Status",),
    "utils": ("task_as_dict",),
    "workflows": ("Workflow", "chain", "chord", "group"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AsyncFuncNotSupportedException",
    "AsyncTask",
    "BadSignature",
    "Cancel",
    "Concurrency",
    "Consumer",
    "ConsumerModel",
    "Exponential",
    "FailedStep",
    "Fixed",
    "Job",
    "JobRefused",
    "JobStart",
    "LeaseLost",
    "Limit",
    "MemoryLimitExceeded",
    "Misfire",
    "Overlap",
    "PayloadError",
    "PayloadTooLargeError",
    "Priority",
    "RandomDelay",
    "RateLimit",
    "Retry",
    "RetryStrategy",
    "SavedJob",
    "ScheduleError",
    "ScheduleModel",
    "Snooze",
    "Status",
    "SyncFuncNotSupportedException",
    "Task",
    "TaskAlreadyScheduled",
    "TaskAttempt",
    "TaskCancelled",
    "TaskEvent",
    "TaskFailed",
    "TaskHooks",
    "TaskModel",
    "TaskNotFoundError",
    "TaskReference",
    "TimeLimitExceeded",
    "WaitInsideTransactionError",
    "Workflow",
    "WorkflowError",
    "WorkflowModel",
    "__version__",
    "aschedule_many",
    "atask",
    "chain",
    "chord",
    "current_task",
    "get_job_from_name",
    "group",
    "recurring",
    "recurring_job",
    "register_job",
    "registered_jobs",
    "schedule_many",
    "start_job_from_name",
    "task",
    "task_as_dict",
]


def __getattr__(name: str) -> Any:
    # Lazy, because models may only be imported once the app registry is ready.
    if name in _HOME_OF:
        return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
