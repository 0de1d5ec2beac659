"""``manage.py delete_completed_tasks``: delete completed tasks, in batches."""

from __future__ import annotations

from firefly_jobs.management.ended import DeletingCommand
from firefly_jobs.states import Status


class Command(DeletingCommand):
    """Delete completed rows with their history."""

    help = "Delete completed tasks with their history, and workflows of which no task is left."
    status = Status.COMPLETED
    moment = "completed"
