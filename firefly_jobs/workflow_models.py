"""The tables of workflows: runs, their steps, and the gates that steps wait at.

A step is a row of ``TaskModel`` like any other; what makes it a step stands in
:class:`WorkflowStep`.  Gates and edges are counters for ``dependencies``, see ``graphs``.
"""

from __future__ import annotations

from django.db import models
from django.utils.translation import gettext_lazy as _

from .databases.functions import DatabaseNow
from .graphs import When
from .options import LABEL_LENGTH_MAX
from .states import WorkflowStatus


class WorkflowModel(models.Model):
    """One run of a workflow: steps that wait for each other."""

    Status = WorkflowStatus

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    name = models.CharField(_("name"), max_length=LABEL_LENGTH_MAX)
    status = models.CharField(
        _("status"),
        max_length=10,
        choices=WorkflowStatus.choices,
        default=WorkflowStatus.RUNNING,
    )
    created = models.DateTimeField(_("created"), db_default=DatabaseNow(), editable=False)
    ended = models.DateTimeField(_("ended"), null=True, blank=True)
    # Names the step that failed; set when it fails, which is before the workflow has ended.
    error = models.TextField(_("error"), default="", blank=True)
    is_cancelled = models.BooleanField(_("cancelled"), default=False)
    # Calls that wait for the end, by their ids.
    on_success = models.BigIntegerField(_("on success"), null=True, blank=True)
    on_failure = models.BigIntegerField(_("on failure"), null=True, blank=True)

    class Meta:
        verbose_name = _("workflow")
        verbose_name_plural = _("workflows")
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["status", "id"], name="firefly_workflow_status"),
        ]

    def __str__(self) -> str:
        return f"{self.name} #{self.pk}"


class WorkflowGate(models.Model):
    """A counter of what has to end before some steps may start; see ``graphs``."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    workflow = models.ForeignKey(
        WorkflowModel, on_delete=models.CASCADE, related_name="gates", db_index=False
    )
    # How far it is from the start; whatever opens because of it has a higher one.
    rank = models.IntegerField()
    waiting_for = models.IntegerField()
    # Whether something ended otherwise than the steps here ask for.
    is_unmet = models.BooleanField(default=False)

    class Meta:
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["workflow", "rank", "id"], name="firefly_gate"),
        ]

    def __str__(self) -> str:
        return f"gate #{self.pk} of workflow {self.workflow_id}"


class WorkflowStep(models.Model):
    """What makes a task a step of a workflow: its name, and where it waits."""

    task = models.OneToOneField(
        "TaskModel", on_delete=models.CASCADE, related_name="step", primary_key=True
    )
    workflow = models.ForeignKey(
        WorkflowModel, on_delete=models.CASCADE, related_name="steps", db_index=False
    )
    name = models.CharField(_("name"), max_length=LABEL_LENGTH_MAX)
    priority = models.IntegerField(_("priority in the workflow"), default=0)
    gate = models.ForeignKey(
        WorkflowGate, on_delete=models.CASCADE, related_name="steps", null=True, blank=True
    )
    ignore_result = models.BooleanField(_("failure is ignored"), default=False)
    # It waits for a failure, or for any end: so it runs although the workflow has stopped.
    is_cleanup = models.BooleanField(_("clean-up"), default=False)

    class Meta:
        verbose_name = _("step")
        verbose_name_plural = _("steps")
        constraints = [  # noqa: RUF012 - Django's own class attribute
            models.UniqueConstraint(fields=["workflow", "name"], name="firefly_step_name"),
        ]

    def __str__(self) -> str:
        return self.name


class WorkflowEdge(models.Model):
    """That the end of a step, or the opening of a gate, counts at a gate."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    step = models.ForeignKey(
        WorkflowStep, on_delete=models.CASCADE, related_name="edges", null=True, blank=True
    )
    source = models.ForeignKey(
        WorkflowGate, on_delete=models.CASCADE, related_name="edges", null=True, blank=True
    )
    gate = models.ForeignKey(
        WorkflowGate, on_delete=models.CASCADE, related_name="sources", db_index=False
    )
    when = models.CharField(max_length=8, choices=[(w.value, w.value) for w in When])

    def __str__(self) -> str:
        return f"{self.step or self.source} counts at {self.gate}"
