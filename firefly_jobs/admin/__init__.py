"""The admin: look at tasks, workflows and consumers, retry and cancel; nothing is edited by hand.

The list stays quick on a million rows: it is ordered by primary key, reads at most
:data:`COUNT_MAX` keys to count and to page, and never a payload.  What no index finds (a
function's name, mostly) is looked for among the newest :data:`SEARCH_ROWS` rows, and the
page says so.

Stored data is decoded on the page of one task only, and only once it is trusted: its
signature verified, or in a format that runs no code.  Changes go through ``lifecycle``,
in the database that ``FIREFLY_JOBS["DATABASE"]`` names.
"""

from __future__ import annotations

from .consumers import ConsumerAdmin
from .jobs import RegisteredJobsMixin, SavedJobAdmin
from .schedules import ScheduleAdmin
from .tasks import TaskAdmin
from .workflows import WorkflowAdmin

__all__ = [
    "ConsumerAdmin",
    "RegisteredJobsMixin",
    "SavedJobAdmin",
    "ScheduleAdmin",
    "TaskAdmin",
    "WorkflowAdmin",
]
