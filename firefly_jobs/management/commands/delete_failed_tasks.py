"""``manage.py delete_failed_tasks``: delete failed tasks, in batches."""

from __future__ import annotations

from firefly_jobs.management.ended import DeletingCommand
from firefly_jobs.states import Status


class Command(DeletingCommand):
    """Delete failed rows with their history."""

    help = "Delete failed tasks with their history, and workflows of which no task is left."
    status = Status.FAILED
    moment = "failed"
