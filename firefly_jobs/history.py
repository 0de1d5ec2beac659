"""Keep it in history if a call ends that waits: somebody cancels or replaces it.

Ends of attempts are written where they are settled (``lifecycle``).  Here no attempt ends;
but whoever goes on with what an earlier claim of the row has begun, as ``CeleryJob`` does,
must be able to tell that it was for another call, also when the row is revived.
"""

from __future__ import annotations

from django.db.models import QuerySet

from .attempts import Ended
from .models import TaskAttempt, TaskModel


def note_withdrawn(rows: QuerySet[TaskModel], reason: str, *, using: str) -> None:
    """Lock ``rows``, which wait, and keep for those that were ever claimed that their call ends.

    Args:
        rows: In the transaction that is going to change them.
        reason: Text for people.
        using: Database alias.
    """
    fences = dict(rows.order_by("pk").select_for_update().values_list("pk", "fence"))
    claimed = {(pk, fence) for pk, fence in fences.items() if fence}
    if not claimed:
        return
    attempts = TaskAttempt.objects.using(using)
    # Once per claim, however often the row is replaced before the next one.
    noted = attempts.filter(task__in=[pk for pk, _ in claimed], outcome=Ended.CANCELLED)
    claimed -= set(noted.values_list("task", "fence"))
    attempts.bulk_create(
        TaskAttempt(task_id=pk, number=0, fence=fence, outcome=Ended.CANCELLED, error=reason)
        for pk, fence in sorted(claimed)
    )
