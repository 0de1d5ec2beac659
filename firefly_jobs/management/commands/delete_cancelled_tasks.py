"""``manage.py delete_cancelled_tasks``: delete cancelled tasks, in batches."""

from __future__ import annotations

from firefly_jobs.management.ended import DeletingCommand
from firefly_jobs.states import Status


class Command(DeletingCommand):
    """Delete cancelled rows with their history."""

    help = "Delete cancelled tasks with their history, and workflows of which no task is left."
    status = Status.CANCELLED
    moment = "cancelled"
