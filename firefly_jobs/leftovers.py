"""Which steps still wait although their workflow stops, and why it does.

They were locked when it stopped, or have been let go since; ``dependencies`` cancels them.
The claim asks the same in its own statement, see ``databases.base.WITHDRAWN``.
"""

from __future__ import annotations

from django.db.models import Q, QuerySet

from .models import WorkflowModel, WorkflowStep
from .states import WORKFLOW_CANCELLED, Status, WorkflowStatus

WAITING = [Status.CREATED, Status.BLOCKED]


def left_over(*, using: str) -> QuerySet[WorkflowStep]:
    """Return steps that wait although their workflow stops, but for those that wait for that."""
    return _withdrawn(using).filter(task__status__in=WAITING)


def why_withdrawn(step: int, *, using: str) -> str:
    """Return why a step is not to start, as what claims a row tells; mostly empty."""
    found = _withdrawn(using).filter(pk=step).select_related("workflow").first()
    return "" if found is None else why_stopped(found.workflow)


def why_stopped(workflow: WorkflowModel) -> str:
    """Return why a workflow stops."""
    return WORKFLOW_CANCELLED if workflow.is_cancelled else workflow.error


def _withdrawn(using: str) -> QuerySet[WorkflowStep]:
    running = WorkflowStep.objects.using(using).filter(workflow__status=WorkflowStatus.RUNNING)
    return running.filter(
        Q(workflow__is_cancelled=True) | (~Q(workflow__error="") & Q(is_cleanup=False))
    )
