"""``manage.py delete_failed_tasks``: delete failed tasks, in batches."""

from __future__ import annotations

from collections.abc import Sequence

from firefly_jobs import lifecycle
from firefly_jobs.management.ended import EndedTasksCommand
from firefly_jobs.states import Status


class Command(EndedTasksCommand):
    """Delete failed rows with their history."""

    help = "Delete failed tasks and their history."
    status = Status.FAILED
    moment = "failed"
    done = "deleted"

    def change(self, ids: Sequence[int], *, using: str) -> int:
        """Delete one batch."""
        return lifecycle.delete(ids, using=using)
