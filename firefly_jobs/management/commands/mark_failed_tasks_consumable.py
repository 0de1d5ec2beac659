"""``manage.py mark_failed_tasks_consumable``: make failed tasks due again."""

from __future__ import annotations

from collections.abc import Sequence

from firefly_jobs import lifecycle
from firefly_jobs.management.ended import EndedTasksCommand
from firefly_jobs.states import Status


class Command(EndedTasksCommand):
    """Make failed rows due now, with all their retries."""

    help = "Make failed tasks due again, with all their retries."
    status = Status.FAILED
    moment = "failed"
    done = "made due again"
    reasons = "changed meanwhile, or have a unique key that another task has,"

    def change(self, ids: Sequence[int], *, using: str) -> int:
        """Make one batch due."""
        return lifecycle.retry(ids, using=using)
