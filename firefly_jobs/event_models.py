"""The table of events: what happened to a task, where ``FIREFLY_JOBS["KEEP_EVENTS"]`` says so.

``events`` writes them.
"""

from __future__ import annotations

from django.db import models
from django.db.models.enums import TextChoices
from django.utils.translation import gettext_lazy as _

from .databases.functions import DatabaseNow


class EventKind(TextChoices):
    """What happened."""

    SCHEDULED = "scheduled", _("scheduled")
    CLAIMED = "claimed", _("claimed")
    STARTED = "started", _("started")
    COMPLETED = "completed", _("completed")
    RETRIED = "retried", _("retried")
    FAILED = "failed", _("failed")
    CANCELLED = "cancelled", _("cancelled")
    SNOOZED = "snoozed", _("snoozed")
    LOST = "lost", _("lost")
    RELEASED = "released", _("released")
    RESCUED = "rescued", _("rescued")
    PREREQUISITE_FAILED = "prerequisite_failed", _("prerequisite failed")


class TaskEvent(models.Model):
    """Something that happened to a task; written together with it, and deleted with the task."""

    Kind = EventKind

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    # Without a constraint: telling what happened must neither lock the task nor fail because of it.
    task = models.ForeignKey(
        "TaskModel",
        on_delete=models.CASCADE,
        related_name="events",
        verbose_name=_("task"),
        db_constraint=False,
    )
    kind = models.CharField(_("kind"), max_length=20, choices=EventKind.choices)
    at = models.DateTimeField(_("at"), db_default=DatabaseNow())
    consumer = models.BigIntegerField(_("consumer"), null=True, blank=True)
    message = models.TextField(_("message"), blank=True, default="")

    class Meta:
        verbose_name = _("event")
        verbose_name_plural = _("events")
        ordering = ("id",)

    def __str__(self) -> str:
        return f"task {self.task_id}: {self.kind}"
