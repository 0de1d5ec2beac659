"""The states of a task and the steps allowed between them.

One table, read by everything that changes a row.  ``docs/explanation/states.md`` draws
it; a test compares the drawing with this table.

To add a state: add it to :class:`Status`, say in :data:`TRANSITIONS` how it is reached
and left, and decide whether it :attr:`~Status.is_terminal`.
"""

from __future__ import annotations

from django.db.models.enums import TextChoices
from django.utils.translation import gettext_lazy as _


class Status(TextChoices):
    """Where a scheduled call stands."""

    CREATED = "created", _("created")
    BLOCKED = "blocked", _("blocked")
    RUNNING = "running", _("running")
    COMPLETED = "completed", _("completed")
    FAILED = "failed", _("failed")
    CANCELLED = "cancelled", _("cancelled")

    @property
    def is_terminal(self) -> bool:
        """Whether a row in this state has ended."""
        return self in TERMINAL


class WorkflowStatus(TextChoices):
    """Where a workflow stands."""

    RUNNING = "running", _("running")
    COMPLETED = "completed", _("completed")
    FAILED = "failed", _("failed")
    CANCELLED = "cancelled", _("cancelled")


TERMINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})

TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.CREATED: frozenset({Status.RUNNING, Status.BLOCKED, Status.CANCELLED}),
    Status.BLOCKED: frozenset({Status.CREATED, Status.CANCELLED}),
    # Back to created: a retry, a snooze, a release, a rescue.  Blocked: a limit is reached.
    Status.RUNNING: frozenset(
        {Status.CREATED, Status.BLOCKED, Status.COMPLETED, Status.FAILED, Status.CANCELLED}
    ),
    Status.COMPLETED: frozenset(),
    # Only a person brings an ended row back; a step of a workflow to where it waited.
    Status.FAILED: frozenset({Status.CREATED, Status.BLOCKED}),
    Status.CANCELLED: frozenset({Status.CREATED, Status.BLOCKED}),
}


def sources(target: Status) -> list[Status]:
    """Return the states a row may be in to become ``target``."""
    return [status for status, targets in TRANSITIONS.items() if target in targets]


# The reason that rows of a workflow that was cancelled give.
WORKFLOW_CANCELLED = "the workflow was cancelled"
