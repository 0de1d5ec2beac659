"""Small functions with documented names."""

from __future__ import annotations

from typing import Any

from .models import TaskModel


def task_as_dict(task: TaskModel) -> dict[str, Any]:
    """Return the documented fields of a row as a dictionary.

    Returns:
        ``id``, ``func_name``, ``status`` (text), ``not_before`` and ``created`` (datetime or
        ``None``), ``retry_attempts`` (retries used), ``retry_delay`` (text such as
        ``"120s"``), ``max_retries``.
    """
    return {
        "id": task.pk,
        "func_name": task.func_name,
        "status": str(task.status),
        "not_before": task.not_before,
        "created": task.created,
        "retry_attempts": task.retry_attempts,
        "retry_delay": f"{task.retry_delay}s",
        "max_retries": task.max_retries,
    }
