"""The tables of workflows: runs, their steps, and the gates that steps wait at.

A step is a row of ``TaskModel`` like any other; what makes it a step stands in
:class:`WorkflowStep`.  Gates and edges are counters for ``dependencies``, see ``graphs``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from django.db import models
from django.db.models.functions import Coalesce
from django.utils.translation import gettext_lazy as _

from .databases.fields import ExactCharField
from .databases.functions import DatabaseNow
from .event_models import TaskEvent
from .graphs import When
from .options import LABEL_LENGTH_MAX
from .states import TERMINAL, Status, WorkflowStatus

if TYPE_CHECKING:
    from .models import TaskModel
    from .runs import Progress


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
    # The schedule that has started it: when that was planned for, or whether by hand.
    schedule: models.ForeignKey[Any, Any] = models.ForeignKey(
        "ScheduleModel",
        on_delete=models.DO_NOTHING,
        related_name="+",
        verbose_name=_("schedule"),
        null=True,
        blank=True,
        editable=False,
        db_constraint=False,
    )
    occurrence = models.DateTimeField(_("occurrence"), null=True, blank=True, editable=False)
    is_manual = models.BooleanField(_("by hand"), null=True, blank=True, editable=False)

    class Meta:
        verbose_name = _("workflow")
        verbose_name_plural = _("workflows")
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["status", "id"], name="firefly_workflow_status"),
        ]

    def __str__(self) -> str:
        return f"{self.name} #{self.pk}"

    @property
    def progress(self) -> Progress:
        """How many of its steps have ended, of how many, and how many are in each state."""
        from .runs import progress_of  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return progress_of(self)

    @property
    def ignored_failures(self) -> list[str]:
        """The names of the steps that have failed without stopping it."""
        from .runs import ignored_failures_of  # noqa: PLC0415 - as above

        return ignored_failures_of(self)

    @property
    def events(self) -> models.QuerySet[TaskEvent]:
        """What happened to its tasks, oldest first, where ``KEEP_EVENTS`` says so."""
        return TaskEvent.objects.using(self._state.db).filter(task__workflow=self.pk)

    def wait(self, timeout: float | timedelta | None = None) -> WorkflowModel:
        """Wait until it has ended, however it did; return this object, read anew.

        Args:
            timeout: Seconds or ``timedelta``; ``None`` waits for ever.

        Raises:
            TimeoutError: If it has not ended in time.
            WaitInsideTransactionError: If it has not ended and a transaction is open here.
        """
        from .runs import wait  # noqa: PLC0415 - as above

        wait(self, timeout)
        return self

    def cancel(self) -> bool:
        """Cancel what has not started; return whether it had not ended.

        Calls that run go on; they can ask ``current_task().cancelled``.
        """
        from .dependencies import cancel  # noqa: PLC0415 - as above

        return cancel(self.pk, using=self._state.db or "default")

    def retry_failed(self) -> int:
        """Run again what has failed or was cancelled; return how many steps.

        What has completed stays.  A workflow that runs, or has completed, is left alone.

        Raises:
            TaskAlreadyScheduled: If another task has the unique key of a step by now.
        """
        from .rebuilding import retry_failed  # noqa: PLC0415 - as above

        return retry_failed(self.pk, using=self._state.db or "default")

    def add(
        self,
        job: Any,
        name: str | None = None,
        depends_on: Any = None,
        *,
        ignore_result: bool = False,
        when: str = "success",
    ) -> TaskModel:
        """Add a step while it runs, from inside one of its steps or from outside.

        It belongs to the caller's transaction.  Until that ends, steps that nothing waits for
        cannot end, so add late in a call.

        Args:
            job: A job, or a task that is called without arguments.
            name: Its name; by default the job's label or its function's name.
            depends_on: Names of steps, rows of steps, or a list of both.
            ignore_result: Whether its failure stops nothing.
            when: What has to become of those: ``"success"``, ``"failure"``, ``"always"``.

        Raises:
            WorkflowError: If it has ended or stops, or a name is taken or unknown.
        """
        from .runs import add  # noqa: PLC0415 - as above

        condition = When.from_word(when)
        return add(
            self,
            job,
            name=name,
            depends_on=depends_on,
            ignore_result=ignore_result,
            when=condition,
        )

    def as_mermaid(self) -> str:
        """Return it as a Mermaid flowchart, coloured by the status of its steps."""
        from .runs import as_mermaid  # noqa: PLC0415 - as above

        return as_mermaid(self)


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
    # Whether steps were cancelled before those that they wait for have ended.
    is_cut_short = models.BooleanField(default=False)

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
    name: ExactCharField = ExactCharField(_("name"), max_length=LABEL_LENGTH_MAX)
    priority = models.IntegerField(_("priority in the workflow"), default=0)
    gate = models.ForeignKey(
        WorkflowGate, on_delete=models.CASCADE, related_name="steps", null=True, blank=True
    )
    ignore_result = models.BooleanField(_("failure is ignored"), default=False)
    # What a hook has answered about its failure; null: none had an answer, and ignore_result
    # decides.  Of this failure only: when the step runs again, that is asked anew.
    is_forgiven = models.BooleanField(_("failure is forgiven"), null=True, blank=True)
    # It waits for a failure, or for any end: so it runs although the workflow has stopped.
    is_cleanup = models.BooleanField(_("clean-up"), default=False)

    class Meta:
        verbose_name = _("step")
        verbose_name_plural = _("steps")
        constraints = [  # noqa: RUF012 - Django's own class attribute
            models.UniqueConstraint(fields=["workflow", "name"], name="firefly_step_name"),
        ]

    def __str__(self) -> str:
        return str(self.name)

    @property
    def is_ignored(self) -> bool:
        """Whether its failure stops nothing, if it has failed; in queries ``IS_IGNORED``."""
        return self.ignore_result if self.is_forgiven is None else self.is_forgiven


IS_IGNORED = Coalesce("is_forgiven", "ignore_result")

# What a workflow is once all its steps have ended.
ENDS_AS = models.Case(
    models.When(is_cancelled=True, then=models.Value(WorkflowStatus.CANCELLED)),
    models.When(error="", then=models.Value(WorkflowStatus.COMPLETED)),
    default=models.Value(WorkflowStatus.FAILED),
)


def keep_what_was_not_met(collector: Any, field: Any, sub_objs: Any, using: str) -> None:
    """Delete the edges of steps that are deleted, but of those that did not end as was asked.

    For ``on_delete``.  Those are kept without their step: should the workflow run again, who
    waits for that must not run.  One that has completed never does.
    """
    ended = sub_objs.filter(step__task__status__in=TERMINAL).exclude(
        step__workflow__status=WorkflowStatus.COMPLETED
    )
    is_ignored = Coalesce("step__is_forgiven", "step__ignore_result")
    unmet = {
        pk
        for pk, when, status, ignored in ended.values_list(
            "pk", "when", "step__task__status", is_ignored
        )
        if not When(when).is_met(Status(status), is_ignored=ignored)
    }
    if unmet:
        models.SET_NULL(collector, field, sub_objs.filter(pk__in=unmet), using)
    models.CASCADE(collector, field, sub_objs.exclude(pk__in=unmet), using)


class WorkflowEdge(models.Model):
    """That the end of a step, or the opening of a gate, counts at a gate.

    Without either: a step that has been deleted, and had not ended as was asked there.
    """

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    step = models.ForeignKey(
        WorkflowStep, on_delete=keep_what_was_not_met, related_name="edges", null=True, blank=True
    )
    source = models.ForeignKey(
        WorkflowGate, on_delete=models.CASCADE, related_name="edges", null=True, blank=True
    )
    gate = models.ForeignKey(WorkflowGate, on_delete=models.CASCADE, related_name="sources")
    when = models.CharField(max_length=8, choices=[(w.value, w.value) for w in When])

    def __str__(self) -> str:
        return f"{self.step or self.source or 'a deleted step'} counts at {self.gate}"
