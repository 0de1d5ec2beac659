"""Django signals for what happens to tasks and workflows, each sent after it was committed.

Those about tasks have ``sender=TaskModel`` and the arguments ``task_id``, ``func_name``, ``queue``
and ``using`` (the database alias), those about workflows ``sender=WorkflowModel`` and the
arguments ``workflow_id``, ``name``, ``error`` and ``using``; ``docs/reference/hooks.md`` lists what
each has beside these.
``messenger`` sends them; what a receiver raises is logged.

Names only: importing this module needs no models, so receivers can connect anywhere.
"""

from __future__ import annotations

from django.dispatch import Signal

task_scheduled = Signal()
task_started = Signal()
task_completed = Signal()
task_retried = Signal()
task_failed = Signal()
task_cancelled = Signal()
task_rescued = Signal()

workflow_started = Signal()
workflow_completed = Signal()
workflow_failed = Signal()
workflow_cancelled = Signal()
