"""The tables: one row per scheduled call, per attempt worth keeping, per consumer.

Rows are read here and changed elsewhere: ``enqueue`` writes new ones, ``lifecycle``
changes the status of existing ones, and a running row changes only under its fence.
The verbs on :class:`TaskModel` (``cancel``, ``retry_now``) hand over to ``lifecycle``.

To add a column: make it nullable or give it a ``db_default``, so that yesterday's
consumer can insert into today's table.
"""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.models.functions import Coalesce
from django.utils.translation import gettext_lazy as _

from . import serializers
from .attempts import Ended
from .conf import QUEUE_LENGTH_MAX
from .databases.functions import DatabaseNow
from .databases.indexes import StatusIndex
from .options import NAME_LENGTH_MAX
from .states import Status


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


class TaskModel(models.Model):
    """One scheduled call of a task, from ``created`` to its end."""

    Status = Status

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
    def already_run(self) -> bool:
        """Whether any attempt at this call has started."""
        if self.started is not None or self.retry_attempts > 0 or self.rescues > 0:
            return True
        # Claimed or revived since, but not started again: then history tells.
        return self.fence > 0 and self.attempts.exists()

    def cancel(self) -> bool:
        """Cancel this call if it has not started; return whether it was cancelled."""
        from . import lifecycle  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return lifecycle.cancel([self.pk], using=self._state.db or "default") == 1

    def retry_now(self) -> bool:
        """Make a failed or cancelled call due again, with all its retries; say if it was."""
        from . import lifecycle  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return lifecycle.retry([self.pk], using=self._state.db or "default") == 1


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

    class Meta:
        verbose_name = _("consumer")
        verbose_name_plural = _("consumers")

    def __str__(self) -> str:
        return f"{self.name} #{self.pk}"
