"""Which steps have ended without anybody having followed their end yet.

Where the transactions of calls repeat reads, what follows from the end of a step is done
after its COMMIT (``dependencies``).  In between, and for longer if the process is paused or
ends there, the step's row says so in place of its gate.  So that each end is counted once:
by who comes for it, or by a sweep that sets all counters of the workflow from its rows.
"""

from __future__ import annotations

from collections.abc import Collection

from .models import TaskModel
from .states import Status

# No gate has this number.
NOT_FOLLOWED = -1
_ENDED = [status for status in Status if status.is_terminal]


def postpone(ids: Collection[int], *, using: str) -> None:
    """Note that the ends of some steps, written in the open transaction, are followed later."""
    rows = TaskModel.objects.using(using).filter(pk__in=ids, status__in=_ENDED)
    rows.update(next_gate=NOT_FOLLOWED)


def take(ids: Collection[int], *, using: str) -> set[int]:
    """Lock those of some steps whose ends nobody has followed yet, and return them as ours."""
    rows = TaskModel.objects.using(using).filter(
        pk__in=ids, status__in=_ENDED, next_gate=NOT_FOLLOWED
    )
    taken = set(rows.order_by("pk").select_for_update().values_list("pk", flat=True))
    rows.update(next_gate=None)
    return taken


def take_all(workflow: int, *, using: str) -> None:
    """Take all of a workflow, as its counters are about to be set from the rows."""
    rows = TaskModel.objects.using(using).filter(
        workflow=workflow, status__in=_ENDED, next_gate=NOT_FOLLOWED
    )
    rows.update(next_gate=None)
