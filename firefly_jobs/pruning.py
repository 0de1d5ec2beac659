"""Delete workflows that have ended and of which no task is left, with their gates and edges.

Tasks are deleted by ``lifecycle``, steps with their tasks.  A workflow stays as long as one
row belongs to it: somebody may look at it there, or let it run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from django.db import connections
from django.db.models import Exists, OuterRef, QuerySet

from . import databases
from .databases.functions import SecondsFromNow
from .lines import tried_again
from .models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowModel
from .states import WorkflowStatus

# Workflows deleted per transaction; each may have some hundred gates.
BATCH_SIZE = 100


def empty_workflows(*, using: str, older_than_seconds: float | None) -> QuerySet[WorkflowModel]:
    """Return the workflows that have ended, that long ago, and have no task left.

    Args:
        using: Database alias.
        older_than_seconds: By the database's clock; ``None``: of any age.
    """
    tasks = TaskModel.objects.using(using).filter(workflow=OuterRef("pk"))
    ended = WorkflowModel.objects.using(using).exclude(status=WorkflowStatus.RUNNING)
    if older_than_seconds is not None:
        ended = ended.filter(ended__lt=SecondsFromNow(-older_than_seconds))
    return ended.filter(~Exists(tasks))


def delete_workflows(ids: Sequence[int], *, using: str) -> int:
    """Delete those of some workflows that have ended and have no task left; return how many."""
    return tried_again(partial(_delete, ids, using), using=using)


def _delete(ids: Sequence[int], using: str) -> int:
    database = databases.of(using)
    with database.own_transaction(connections[using]):
        # Locked first, and looked at once more: somebody may just let one run again.
        locked = (
            WorkflowModel.objects.using(using)
            .select_for_update(skip_locked=database.can_skip_locked)
            .filter(pk__in=ids)
            .order_by("pk")
        )
        found = list(locked.values_list("pk", flat=True))
        empty = list(
            empty_workflows(using=using, older_than_seconds=None)
            .filter(pk__in=found)
            .values_list("pk", flat=True)
        )
        WorkflowEdge.objects.using(using).filter(gate__workflow__in=empty).delete()
        WorkflowGate.objects.using(using).filter(workflow__in=empty).delete()
        WorkflowModel.objects.using(using).filter(pk__in=empty).delete()
    return len(empty)
