"""The table of schedules: what is to be called again and again, when next, and how it went.

A row says everything that firing needs.  ``next_run`` alone decides whether a schedule is due:
it is empty for one that is paused, retired or over.  ``firing`` moves it, in the transaction
that writes the call; ``tallies`` keeps the counters of what has ended.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta, tzinfo
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ValidationError
from django.db import models, router, transaction
from django.db.models.enums import TextChoices
from django.utils import timezone
from django.utils.translation import gettext_lazy as _

from . import cron as cron_rules
from . import serializers
from .conf import OWNER_LENGTH_MAX
from .databases.fields import ExactCharField, PlainJSONField
from .databases.functions import DatabaseNow
from .declarations import NAME_LENGTH_MAX as SCHEDULE_NAME_LENGTH_MAX
from .declarations import Misfire, Overlap, problems_of
from .job_models import SavedJob
from .options import NAME_LENGTH_MAX
from .recurrence import Interval, Recurrence
from .states import Status
from .storable import json_problem

if TYPE_CHECKING:
    from .models import TaskQuerySet

CRON_LENGTH_MAX, ZONE_LENGTH_MAX = 200, 64
# The salt under which a stored call is signed.
STORED_CALL = "firefly_jobs.schedule"
_MICROSECOND = timedelta(microseconds=1)
# When it recurs; each alone says nothing.
RECURRENCE_FIELDS: Collection[str] = ("cron", "timezone", "every")
# How the error of a row begins that does not fit its call any more.
CANNOT_RUN = "Cannot run: "
# What a declaration says about a row, and a person may say instead.
PLAN_FIELDS: Collection[str] = (
    *RECURRENCE_FIELDS,
    *("starts_at", "ends_at", "max_runs"),
    *("misfire", "overlap", "jitter"),
)
# What a person may change.
CHANGEABLE = (*PLAN_FIELDS, "name", "func_name", "arguments", "saved_job", "is_paused")


class Operation(TextChoices):
    """Whether anything that a schedule has started has not ended yet."""

    IDLE = "idle", _("idle")
    RUNNING = "running", _("running")


class ScheduleModel(models.Model):
    """A job or a workflow that is started again and again, or by hand only."""

    Operation = Operation
    Misfire = Misfire
    Overlap = Overlap
    Status = Status

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    name: ExactCharField = ExactCharField(
        _("name"), max_length=SCHEDULE_NAME_LENGTH_MAX, unique=True
    )

    # --- what is called
    func_name = models.CharField(_("function"), max_length=NAME_LENGTH_MAX, blank=True, default="")
    # {"args": [...], "kwargs": {...}}: what a person has entered, in place of what is declared.
    arguments = PlainJSONField(_("arguments"), null=True, blank=True)
    # A job or workflow that was given at run time, stored as payloads are.
    raw_call = models.TextField(_("stored call"), blank=True, default="", editable=False)

    # Or a start that is kept by name.
    saved_job: models.ForeignKey[Any, Any] = models.ForeignKey(
        SavedJob,
        on_delete=models.PROTECT,
        related_name="schedules",
        verbose_name=_("saved job"),
        null=True,
        blank=True,
    )

    # --- when
    cron = models.CharField(
        _("cron expression"), max_length=CRON_LENGTH_MAX, blank=True, default=""
    )
    timezone = models.CharField(_("time zone"), max_length=ZONE_LENGTH_MAX, blank=True, default="")
    every = models.FloatField(_("every, in seconds"), null=True, blank=True)
    starts_at = models.DateTimeField(_("starts"), null=True, blank=True)
    ends_at = models.DateTimeField(_("ends"), null=True, blank=True)
    max_runs = models.PositiveIntegerField(_("runs at most"), null=True, blank=True)
    misfire = models.CharField(
        _("missed runs"), max_length=10, choices=Misfire.choices, default=Misfire.ONCE
    )
    overlap = models.CharField(
        _("while one runs"), max_length=10, choices=Overlap.choices, default=Overlap.SKIP
    )
    jitter = models.FloatField(_("jitter in seconds"), default=0.0)
    is_paused = models.BooleanField(_("paused"), default=False)

    # --- whose it is
    created = models.DateTimeField(_("created"), db_default=DatabaseNow(), editable=False)
    # The project that declares it in its code; empty for one that was made at run time.
    owner = models.CharField(_("declared by"), max_length=OWNER_LENGTH_MAX, blank=True, default="")
    # What the code said last, so that what a person has changed is told from what it has.
    declared = PlainJSONField(null=True, blank=True, editable=False)
    # Its declaration has gone.
    is_retired = models.BooleanField(_("retired"), default=False, editable=False)

    # --- how it goes
    next_run = models.DateTimeField(_("next run"), null=True, blank=True, editable=False)
    # With overlap="queue": until when somebody saw that it was due and waited.
    waited_until = models.DateTimeField(_("waited until"), null=True, blank=True, editable=False)
    last_run = models.DateTimeField(_("last run"), null=True, blank=True, editable=False)
    run_count = models.PositiveIntegerField(_("runs"), default=0, editable=False)
    manual_count = models.PositiveIntegerField(_("runs by hand"), default=0, editable=False)
    success_count = models.PositiveIntegerField(_("successes"), default=0, editable=False)
    failure_count = models.PositiveIntegerField(_("failures"), default=0, editable=False)
    retry_count = models.PositiveIntegerField(_("retries"), default=0, editable=False)
    active_count = models.PositiveIntegerField(_("not ended"), default=0, editable=False)
    operation = models.CharField(
        _("operation"),
        max_length=10,
        choices=Operation.choices,
        default=Operation.IDLE,
        editable=False,
    )
    last_ended = models.DateTimeField(_("last end"), null=True, blank=True, editable=False)
    last_status = models.CharField(
        _("last status"),
        max_length=10,
        choices=[(s.value, s.label) for s in Status if s.is_terminal],
        blank=True,
        default="",
        editable=False,
    )
    last_func_name = models.CharField(
        _("last function"),
        max_length=NAME_LENGTH_MAX,
        blank=True,
        db_default="",
        default="",
        editable=False,
    )
    raw_last_result = models.TextField(  # noqa: DJ001 - NULL: nothing was returned
        _("stored last result"), null=True, blank=True, editable=False
    )
    last_error = models.TextField(_("last error"), blank=True, default="", editable=False)

    class Meta:
        verbose_name = _("schedule")
        verbose_name_plural = _("schedules")
        ordering = ("name",)
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["next_run"], name="firefly_next_run"),
        ]

    def __str__(self) -> str:
        return str(self.name)

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Write it; a new one is planned as well.

        Of one that was read, all that a person may change is written as :meth:`change` does:
        what consumers have written meanwhile is theirs.
        """
        using = kwargs.get("using") or router.db_for_write(type(self), instance=self)
        if self._state.adding:
            # Before a database makes something else of it.
            self.clean()
        if not self._state.adding and using == self._state.db:
            fields = kwargs.get("update_fields")
            fields = CHANGEABLE if fields is None else fields
            if set(fields) <= set(CHANGEABLE):
                self.change(**{name: getattr(self, name) for name in fields})
            else:
                super().save(*args, **kwargs)
            return
        pk = self.pk
        try:
            with transaction.atomic(using=using):
                super().save(*args, **{**kwargs, "using": using})
                self.change()
        except Exception:
            # As it was, to be mended and saved.
            self.pk, self._state.adding = pk, True
            raise

    # --- when it runs

    @property
    def recurrence(self) -> Recurrence | None:
        """Its cron expression or interval, or ``None`` if it runs by hand only.

        Raises:
            ValueError: If what the row says is none; nothing that is checked is.
        """
        if self.cron:
            return cron_rules.parse(self.cron, timezone=self.timezone or None)
        if self.every is not None:
            return Interval(self.every, self.starts_at or self.created)
        return None

    @property
    def zone(self) -> tzinfo:
        """The time zone that it goes by, or that of the project for an interval.

        Raises:
            ValueError: If there is none of that name here.
        """
        if not self.timezone:
            return timezone.get_current_timezone()
        return cron_rules.zone_of(self.timezone)

    @property
    def calls(self) -> str:
        """What it calls, by name."""
        return f"saved job {self.saved_job}" if self.saved_job is not None else self.func_name

    @property
    def has_runs_left(self) -> bool:
        """Whether it has not run as often as it may; runs by hand do not count."""
        return self.max_runs is None or self.run_count - self.manual_count < self.max_runs

    def next_run_after(self, moment: datetime) -> datetime | None:
        """Return the first occurrence after ``moment`` that the row allows, if there is one."""
        found = self._occurrences_after(moment, 1)
        return found[0] if found and self.has_runs_left else None

    def upcoming(self, count: int = 10) -> list[datetime]:
        """Return the next occurrences, as far as is known: in UTC, fewer if it ends before.

        Args:
            count: How many.
        """
        if self.next_run is None:
            return []
        if self.max_runs is not None:
            count = min(count, self.max_runs - (self.run_count - self.manual_count))
        later = self._occurrences_after(self.next_run, count - 1) if count > 1 else []
        return [self.next_run, *later][:count]

    def _occurrences_after(self, moment: datetime, count: int) -> list[datetime]:
        recurrence = self.recurrence
        if recurrence is None:
            return []
        if self.starts_at is not None:
            moment = max(moment, self.starts_at - _MICROSECOND)
        found = recurrence.upcoming(moment.astimezone(UTC), count)
        return [one for one in found if self.ends_at is None or one <= self.ends_at]

    # --- how it went

    @property
    def last_result(self) -> Any:
        """What the last call that ended has returned, or the text of its error.

        Raises:
            BadSignature, PayloadError: If what is stored cannot be read.
        """
        if self.raw_last_result is not None:
            return serializers.loads_returned(self.raw_last_result, task_name=self.last_func_name)
        return self.last_error or None

    @property
    def tasks(self) -> TaskQuerySet:
        """The calls that it has started and that are not pruned yet, the latest first."""
        from .models import TaskModel  # noqa: PLC0415 - it refers to this table

        rows = TaskModel.objects.using(self._state.db).filter(schedule=self.pk)
        return rows.order_by("-pk")

    # --- what people do

    def run_now(self, user: Any = None) -> Any:
        """Start one more call at once, besides those that are planned; it ``is_manual``.

        Args:
            user: Who starts it; of a saved job the rules of starts hold for that user.

        Returns:
            The ``TaskModel``, or the ``WorkflowModel`` of a workflow.

        Raises:
            ScheduleError: If what it calls is not known here any more.
            JobRefused: If the user may not start the saved job, or it does not fit any more.
        """
        from .firing import run_now  # noqa: PLC0415 - a verb on a value, see ARCHITECTURE layers

        return run_now(self.pk, using=self._state.db or "default", user=user)

    def pause(self) -> None:
        """Let no occurrence fire until :meth:`resume`."""
        self.change(is_paused=True)

    def resume(self) -> None:
        """Let it fire again, from the next occurrence on: what was paused is not made up for."""
        self.change(is_paused=False)

    def change(self, **changes: Any) -> None:
        """Write some columns, and take over the row's other values.

        The next run is planned anew, and what was missed is forgotten, if it recurs otherwise
        than before: another ``cron``, ``timezone``, ``every`` or ``starts_at``, or a pause.

        Args:
            changes: Values of the columns that a person may change.

        Raises:
            ValidationError: If what comes out is refused; nothing is written then.
        """
        from .planning import change  # noqa: PLC0415 - as above

        change(self, changes, using=self._state.db or "default")

    def clean(self) -> None:
        """Check what columns mean together.

        Raises:
            ValidationError: With a message per field.
        """
        problems = problems_of(self)
        if self.arguments is not None and (complaint := arguments_problem(self.arguments)):
            problems["arguments"] = complaint
        if self.saved_job is not None and not (
            self.saved_job.target_type and self.saved_job.relation
        ):
            problems["saved_job"] = (
                "This saved job has no target with a relation, so a schedule cannot say what to "
                "start it on."
            )
        if problems:
            raise ValidationError(problems)


def arguments_problem(arguments: Any) -> str | None:
    """Return what is wrong with the shape of some arguments, if anything is."""
    is_shaped = (
        isinstance(arguments, dict)
        and set(arguments) <= {"args", "kwargs"}
        and isinstance(arguments.get("args", []), list)
        and isinstance(arguments.get("kwargs", {}), dict)
    )
    if is_shaped:
        return json_problem(arguments)
    return 'Arguments are {"args": [...], "kwargs": {...}}; either may be left out.'
