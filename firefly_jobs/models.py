"""The tables: one row per scheduled call, per attempt worth keeping, per consumer.

Rows are read here and changed elsewhere: ``enqueue`` writes new ones, ``lifecycle``
changes the status of existing ones, and a running row changes only under its fence.
The verbs on :class:`TaskModel` (``cancel``, ``retry_now``) hand over to ``lifecycle``, those
that wait for its end to ``references``.

The tables of workflows stand in ``workflow_models``, that of schedules in ``schedule_models``,
that of events in ``event_models``.

To add a column: make it nullable or give it a ``db_default``, so that yesterday's
consumer can insert into today's table.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.db import models
from django.db.models.functions import Coalesce
from django.utils.translation import gettext_lazy as _

from . import serializers
from .attempts import Ended
from .conf import OWNER_LENGTH_MAX, QUEUE_LENGTH_MAX
from .databases.fields import ExactCharField, SparseJSONField, TagsField
from .databases.functions import DatabaseNow
from .databases.indexes import SetIndex, StatusIndex, UniqueWhereSet
from .declarations import DIGEST_LENGTH
from .event_models import TaskEvent
from .job_models import JobStart, SavedJob
from .limits import LINE_LENGTH_MAX, RATE_LENGTH_MAX
from .neighbours import MARK_LENGTH_MAX
from .options import (
    DESCRIPTION_LENGTH_MAX,
    KEY_LENGTH_MAX,
    LABEL_LENGTH_MAX,
    NAME_LENGTH_MAX,
    OnConflict,
)
from .schedule_models import ScheduleModel
from .states import Status
from .workflow_models import WorkflowEdge, WorkflowGate, WorkflowModel, WorkflowStep

if TYPE_CHECKING:
    from .references import TaskReference

__all__ = [
    "ConcurrencySlot",
    "ConsumerModel",
    "JobStart",
    "RateBucket",
    "SavedJob",
    "ScheduleModel",
    "TaskAttempt",
    "TaskEvent",
    "TaskModel",
    "TaskQuerySet",
    "WorkflowEdge",
    "WorkflowGate",
    "WorkflowModel",
    "WorkflowStep",
]


class TaskQuerySet(models.QuerySet["TaskModel"]):
    """Questions people ask about tasks; changing rows is not one of them."""

    def due(self) -> TaskQuerySet:
        """Rows that a consumer may claim now, by the database's clock."""
        return self.filter(status=Status.CREATED, run_at__lte=DatabaseNow())

    def running(self) -> TaskQuerySet:
        """Rows that a consumer holds."""
        return self.filter(status=Status.RUNNING)

    def finished(self) -> TaskQuerySet:
        """Rows that have ended: completed, failed or cancelled."""
        return self.filter(status__in=[s for s in Status if s.is_terminal])

    def for_task(self, task: Any) -> TaskQuerySet:
        """Rows of a task, given as the decorated function or by name; aliases included."""
        if isinstance(task, str):
            return self.filter(func_name=task)
        return self.filter(func_name__in=[task.name, *task.options.aliases])

    def active_for(self, what: Any) -> TaskQuerySet:
        """Return the running rows of a task, a name, a workflow, a schedule, or a list of these.

        Args:
            what: A decorated function, its aliases included; the name of one, a label or the
                name of a step; a ``WorkflowModel``; a ``ScheduleModel``; or a list of these.

        Raises:
            TypeError: If it is, or has in it, something else.
        """
        items = what if isinstance(what, list | tuple | set | frozenset) else [what]
        wanted = models.Q(pk__in=[])
        for item in items:
            wanted |= _about(item)
        return self.filter(wanted, status=Status.RUNNING)

    def names(self) -> list[str]:
        """Return what these rows are called, each name once: their labels, else their functions."""
        found = self.order_by().values_list("label", "func_name").distinct()
        return sorted({label or func_name for label, func_name in found})

    def lookup(self, id_or_name: int | str) -> tuple[TaskModel, ScheduleModel | None]:
        """Return a row and its schedule, with one query.

        Args:
            id_or_name: The row's id, a number; or a text: the name of its function, its label or
                the name of its step.  Of several the latest is returned.

        Returns:
            The row, and the schedule that has started it, or ``None``.

        Raises:
            TaskModel.DoesNotExist: If there is none.
        """
        if isinstance(id_or_name, str):
            rows, what = self.filter(_called(id_or_name)), "function name, label or step name"
        else:
            rows, what = self.filter(pk=id_or_name), "id"
        row = rows.select_related("schedule").order_by("-pk").first()
        if row is None:
            message = f"There is no task with the {what} {id_or_name!r}."
            raise self.model.DoesNotExist(message)
        return row, row.schedule

    def tagged(self, *tags: str) -> TaskQuerySet:
        """Rows that have all of these tags; case counts."""
        return self.filter(tags__contains=tags)


def _called(name: str) -> models.Q:
    return models.Q(func_name=name) | models.Q(label=name) | models.Q(step__name=name)


def _about(item: Any) -> models.Q:
    """Return the condition that a row belongs to a task, a name, a workflow or a schedule."""
    if isinstance(item, str):
        return _called(item)
    if isinstance(item, WorkflowModel):
        return models.Q(workflow=item.pk)
    if isinstance(item, ScheduleModel):
        return models.Q(schedule=item.pk) | models.Q(workflow__schedule=item.pk)
    if hasattr(item, "row_of"):
        return models.Q(func_name__in=[item.name, *item.options.aliases])
    message = (
        f"active_for() takes tasks, names, workflows and schedules, or a list of these, "
        f"got {item!r}."
    )
    raise TypeError(message)


class TaskModel(models.Model):
    """One scheduled call of a task, from ``created`` to its end."""

    Status = Status
    # What to do if the key is taken when the row is written; not stored.
    on_conflict: OnConflict = "return"

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    func_name = models.CharField(_("function"), max_length=NAME_LENGTH_MAX)
    queue = models.CharField(_("queue"), max_length=QUEUE_LENGTH_MAX, default="default")
    status = models.CharField(
        _("status"), max_length=10, choices=Status.choices, default=Status.CREATED
    )
    priority = models.SmallIntegerField(_("priority"), default=0)

    created = models.DateTimeField(_("created"), db_default=DatabaseNow(), editable=False)
    not_before = models.DateTimeField(_("not before"), null=True, blank=True)
    # The database itself keeps the moment the row is due, so not_before can stay empty
    # for "now" and the claim still has one column to order by.
    run_at = models.GeneratedField(
        expression=Coalesce("not_before", "created"),
        output_field=models.DateTimeField(_("due")),
        db_persist=True,
    )
    started = models.DateTimeField(_("started"), null=True, blank=True)
    completed = models.DateTimeField(_("completed"), null=True, blank=True)
    failed = models.DateTimeField(_("failed"), null=True, blank=True)
    cancelled = models.DateTimeField(_("cancelled"), null=True, blank=True)
    duration = models.FloatField(_("duration"), null=True, blank=True)

    raw_params = models.TextField(_("stored parameters"), db_column="params")
    raw_returned = models.TextField(  # noqa: DJ001 - NULL: nothing was returned yet
        _("stored result"), db_column="returned", null=True, blank=True
    )
    error = models.TextField(_("error"), db_default="", default="", blank=True)

    retry_attempts = models.SmallIntegerField(_("retries used"), default=0)
    retry_delay = models.IntegerField(_("retry delay"), default=0)
    max_retries = models.SmallIntegerField(_("retries at most"), default=0)
    retry = models.TextField(  # noqa: DJ001 - NULL: the two columns say it all
        _("retry strategy"), null=True, blank=True
    )

    fence = models.IntegerField(_("fence"), default=0)
    consumer = models.BigIntegerField(_("consumer"), null=True, blank=True)
    rescues = models.SmallIntegerField(_("rescues"), default=0)
    lost_alone = models.SmallIntegerField(_("losses while alone"), default=0)

    # What was asked for, and the same as long as the row has not ended: the second is what
    # the database keeps unique.
    unique_key = ExactCharField(_("unique key"), max_length=KEY_LENGTH_MAX, null=True, blank=True)
    active_key = ExactCharField(
        _("active key"), max_length=KEY_LENGTH_MAX, null=True, blank=True, editable=False
    )
    # How many may run at the same time with the first key, and start in a period with the second.
    concurrency_key = ExactCharField(
        _("concurrency key"), max_length=KEY_LENGTH_MAX, null=True, blank=True
    )
    max_concurrent = models.IntegerField(_("running at most"), null=True, blank=True)
    rate_key = ExactCharField(_("rate key"), max_length=KEY_LENGTH_MAX, null=True, blank=True)
    rate_limit = models.CharField(  # noqa: DJ001 - NULL: none
        _("rate limit"), max_length=RATE_LENGTH_MAX, null=True, blank=True
    )
    # The line that the row stands in: blocked, it waits there; created, it was let go and has
    # not been admitted yet; running, it occupies a slot.
    limit_key = ExactCharField(
        _("line"), max_length=LINE_LENGTH_MAX, null=True, blank=True, editable=False
    )
    # The workflow that it is a step of.
    workflow: models.ForeignKey[Any, Any] = models.ForeignKey(
        "WorkflowModel",
        on_delete=models.CASCADE,
        related_name="tasks",
        verbose_name=_("workflow"),
        null=True,
        blank=True,
        editable=False,
        db_index=False,
        db_constraint=False,
    )
    # Where its success counts, if that is at one gate only.
    next_gate = models.BigIntegerField(null=True, blank=True, editable=False)
    # The schedule that has started it: when that was planned for, or whether by hand.
    schedule: models.ForeignKey[Any, Any] = models.ForeignKey(
        "ScheduleModel",
        on_delete=models.DO_NOTHING,
        related_name="+",
        verbose_name=_("schedule"),
        null=True,
        blank=True,
        editable=False,
        db_index=False,
        db_constraint=False,
    )
    occurrence = models.DateTimeField(_("occurrence"), null=True, blank=True, editable=False)
    is_manual = models.BooleanField(_("by hand"), null=True, blank=True, editable=False)
    expires_at = models.DateTimeField(_("expires"), null=True, blank=True)
    time_limit = models.FloatField(_("time limit in seconds"), null=True, blank=True)
    memory_limit = models.BigIntegerField(_("memory limit in bytes"), null=True, blank=True)
    label = models.CharField(
        _("label"), max_length=LABEL_LENGTH_MAX, db_default="", default="", blank=True
    )
    # No text without bounds: to give it a default, MariaDB would have to write every row.
    description = models.CharField(
        _("description"), max_length=DESCRIPTION_LENGTH_MAX, db_default="", default="", blank=True
    )
    metadata = SparseJSONField(_("metadata"), default=dict)
    tags = TagsField(_("tags"), default=list)

    objects = TaskQuerySet.as_manager()

    class Meta:
        verbose_name = _("task")
        verbose_name_plural = _("tasks")
        indexes = [  # noqa: RUF012 - Django's own class attribute
            # The claim reads one (queue, priority) range of it in exactly this order.
            # All keys ascend: see docs/explanation/claims.md.
            StatusIndex(
                fields=["queue", "priority", "run_at", "id"],
                name="firefly_claim",
                statuses=["created"],
            ),
            StatusIndex(fields=["consumer", "id"], name="firefly_running", statuses=["running"]),
            StatusIndex(
                fields=["status", "id"],
                name="firefly_rare",
                statuses=["blocked", "cancelled", "failed"],
            ),
            SetIndex(
                fields=["limit_key", "status", "priority", "run_at", "id"], name="firefly_limit"
            ),
            # Without the status, which three statements per step would have to move in it.
            SetIndex(fields=["workflow", "id"], name="firefly_by_workflow"),
            SetIndex(fields=["schedule", "id"], name="firefly_schedule"),
        ]
        constraints = [  # noqa: RUF012 - Django's own class attribute
            UniqueWhereSet(fields=["active_key"], name="firefly_active_key"),
        ]

    def __str__(self) -> str:
        return f"{self.func_name} #{self.pk}"

    @property
    def params(self) -> dict[str, Any]:
        """The call's arguments, ``{"args": tuple, "kwargs": dict}``.

        Raises:
            BadSignature: If the stored text does not verify; it was not decoded.
            PayloadError: If it cannot be decoded, or a referenced object has vanished.
        """
        args, kwargs = serializers.loads_params(self.raw_params, task_name=self.func_name)
        return {"args": args, "kwargs": kwargs}

    @property
    def returned(self) -> Any:
        """What the call returned; ``None`` while it has not completed. Errors as ``params``."""
        if self.raw_returned is None:
            return None
        return serializers.loads_returned(self.raw_returned, task_name=self.func_name)

    @property
    def ended(self) -> datetime | None:
        """When it completed, failed or was cancelled."""
        return self.completed or self.failed or self.cancelled

    @property
    def already_run(self) -> bool:
        """Whether any attempt at this call has started."""
        if self.started is not None or self.retry_attempts > 0 or self.rescues > 0:
            return True
        # Claimed or revived since, but not started again: then history tells.  What expired
        # before its first attempt stands there under number 0.
        return self.fence > 0 and self.attempts.filter(number__gt=0).exists()

    def cancel(self) -> bool:
        """Cancel this call if it waits, for its start or a retry; return whether it did."""
        from . import lifecycle  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return lifecycle.cancel([self.pk], using=self._state.db or "default") == 1

    def retry_now(self) -> bool:
        """Make a failed or cancelled call due again, with all its retries; say if it was."""
        from . import lifecycle  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return lifecycle.retry([self.pk], using=self._state.db or "default") == 1

    # --- waiting for the end

    def wait(self, timeout: float | timedelta | None = None) -> Any:
        """Wait until the call has ended, and return what it returned; see ``TaskReference``.

        This object has the row's new values afterwards.

        Args:
            timeout: Seconds or ``timedelta``; ``None`` waits for ever.

        Raises:
            TaskFailed: If it failed.
            TaskCancelled: If it was cancelled.
            TimeoutError: If it has not ended in time.
            WaitInsideTransactionError: If it has not ended and a transaction is open here.
        """
        from .references import result_of  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return result_of(self.wait_finished(timeout))

    def wait_finished(self, timeout: float | timedelta | None = None) -> TaskModel:
        """Wait until the call has ended, however it did; return this object, read anew."""
        return self._become(self._reference().wait_finished(timeout))

    async def await_result(self, timeout: float | timedelta | None = None) -> Any:  # noqa: ASYNC109 - one word for both twins
        """Return what the call returned, as :meth:`wait`, without blocking the event loop."""
        from .references import result_of  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return await sync_to_async(result_of)(await self.await_finished(timeout))

    async def await_finished(self, timeout: float | timedelta | None = None) -> TaskModel:  # noqa: ASYNC109 - one word for both twins
        """Return this object once the call has ended, as :meth:`wait_finished`."""
        return self._become(await self._reference().await_finished(timeout))

    def _reference(self) -> TaskReference:
        from .references import TaskReference  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        pk: Any = self.pk
        if pk is None:
            message = (
                f"This call of {self.func_name!r} is not scheduled, so it never ends. Wait for "
                f"the row that schedule() returned."
            )
            raise ValueError(message)
        return TaskReference(pk, using=self._state.db)

    def _become(self, row: TaskModel) -> TaskModel:
        """Take over what another object knows about the same row."""
        names = [field.attname for field in self._meta.concrete_fields]
        vars(self).update({name: vars(row)[name] for name in names})
        self._state.adding, self._state.db = False, row._state.db
        return self


class TaskAttempt(models.Model):
    """An attempt that did not simply succeed, kept as history."""

    Outcome = Ended

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    task = models.ForeignKey(
        TaskModel, on_delete=models.CASCADE, related_name="attempts", verbose_name=_("task")
    )
    number = models.IntegerField(_("attempt"))
    fence = models.IntegerField(_("fence"))
    outcome = models.CharField(
        _("outcome"), max_length=10, choices=[(e.value, _(e.value)) for e in Ended]
    )
    consumer = models.BigIntegerField(_("consumer"), null=True, blank=True)
    ended = models.DateTimeField(_("ended"), db_default=DatabaseNow())
    duration = models.FloatField(_("duration"), null=True, blank=True)
    error = models.TextField(_("error"), blank=True, default="")
    traceback = models.TextField(_("traceback"), blank=True, default="")

    class Meta:
        verbose_name = _("attempt")
        verbose_name_plural = _("attempts")
        ordering = ("id",)

    def __str__(self) -> str:
        return f"attempt {self.number} of task {self.task_id}: {self.outcome}"


class ConsumerModel(models.Model):
    """One process that claims tasks, with its heartbeat; the row goes when the process does."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    name = models.CharField(_("name"), max_length=200)
    queues = models.TextField(_("queues"))
    started = models.DateTimeField(_("started"), db_default=DatabaseNow())
    renewed_at = models.DateTimeField(_("last heartbeat"), db_default=DatabaseNow())
    lease_seconds = models.FloatField(_("lease in seconds"))
    # Written by the first look of a rescuer, cleared by the next heartbeat.
    suspected_at = models.DateTimeField(_("suspected dead"), null=True, blank=True)
    # What others on the same machine know its process by; without, only the lease tells.
    process = models.CharField(  # noqa: DJ001 - NULL: nothing is known
        _("process"), max_length=MARK_LENGTH_MAX, null=True, blank=True
    )
    # Which schedules its code declares: whose they are, and a digest of them.
    schedule_owner = models.CharField(
        max_length=OWNER_LENGTH_MAX, db_default="", default="", blank=True, editable=False
    )
    declared = models.CharField(
        max_length=DIGEST_LENGTH, db_default="", default="", blank=True, editable=False
    )

    class Meta:
        verbose_name = _("consumer")
        verbose_name_plural = _("consumers")

    def __str__(self) -> str:
        return f"{self.name} #{self.pk}"


class ConcurrencySlot(models.Model):
    """What all who start or end a call with one concurrency key lock first; holds no number.

    How many run is counted from the rows of the tasks, so there is nothing to leak.
    """

    key: ExactCharField = ExactCharField(_("key"), max_length=KEY_LENGTH_MAX, primary_key=True)

    class Meta:
        verbose_name = _("concurrency slot")
        verbose_name_plural = _("concurrency slots")

    def __str__(self) -> str:
        return str(self.key)


class RateBucket(models.Model):
    """How far the tokens of one rate key are spent; see ``limits.Rate``."""

    key: ExactCharField = ExactCharField(_("key"), max_length=KEY_LENGTH_MAX, primary_key=True)
    # Microseconds since 1970, by the database's clock.
    spent_until = models.BigIntegerField(_("spent until"), default=0)

    class Meta:
        verbose_name = _("rate bucket")
        verbose_name_plural = _("rate buckets")

    def __str__(self) -> str:
        return str(self.key)
