"""The tables of registered jobs: who has started what, and starts that are kept by name.

The rules are ``job_registry``'.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.core.exceptions import ObjectDoesNotExist, ValidationError
from django.db import models
from django.utils.translation import gettext_lazy as _

from .databases.fields import PlainJSONField
from .databases.functions import DatabaseNow
from .storable import json_problem

if TYPE_CHECKING:
    from .job_registry import NamedJob
    from .models import TaskModel

JOB_LENGTH_MAX, TYPE_LENGTH_MAX, PK_LENGTH_MAX = 200, 100, 100


class JobStart(models.Model):
    """That somebody has started a registered job; written together with its task."""

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    # Of several starts whose task has a unique key all name the same one.
    task = models.ForeignKey(
        "TaskModel",
        on_delete=models.CASCADE,
        related_name="starts",
        verbose_name=_("task"),
        db_constraint=False,
    )
    # As text, since a project's users may have any kind of key, or live elsewhere.
    user_pk = models.CharField(_("user"), max_length=PK_LENGTH_MAX, blank=True, default="")
    task_name = models.CharField(_("job"), max_length=JOB_LENGTH_MAX)
    obj_type = models.CharField(_("type of objects"), max_length=TYPE_LENGTH_MAX)
    obj_pks = PlainJSONField(_("objects"), default=list)
    created = models.DateTimeField(_("created"), db_default=DatabaseNow(), editable=False)

    class Meta:
        verbose_name = _("start of a job")
        verbose_name_plural = _("starts of jobs")
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["user_pk", "task"], name="firefly_starts_of"),
        ]

    def __str__(self) -> str:
        return f"{self.task_name} by {self.user_pk or 'nobody'}"


class SavedJobQuerySet(models.QuerySet["SavedJob"]):
    """Questions about saved jobs."""

    def for_target(self, target: models.Model) -> SavedJobQuerySet:
        """Those of one object."""
        label, pk = reference_to(target)
        return self.filter(target_type=label, target_pk=pk)


def reference_to(target: models.Model) -> tuple[str, str]:
    """Return what a row names an object by: its model's label and its key.

    Raises:
        ValueError: If it is not saved.
    """
    pk: Any = target.pk
    if pk is None:
        message = f"This {target._meta.label} is not saved, so nothing can refer to it."
        raise ValueError(message)
    # A proxy has the rows of its model, and who asks may hold either.
    model: Any = target._meta.concrete_model
    return model._meta.label_lower, str(pk)


class SavedJob(models.Model):
    """A start of a registered job that is kept by name, with its arguments.

    Args:
        name: Unique.
        task_name: Which registered job.
        obj_type: The type of its objects.
        job_args: Arguments, as JSON.
        target: Any saved object, such as a project.
        objects: The name of one of its relations, such as ``"datafiles"``: what that has is read
            at each start.  Stored as ``relation``.
    """

    id: models.BigAutoField[int, int] = models.BigAutoField(primary_key=True)
    name = models.CharField(_("name"), max_length=JOB_LENGTH_MAX, unique=True)
    task_name = models.CharField(_("job"), max_length=JOB_LENGTH_MAX)
    obj_type = models.CharField(_("type of objects"), max_length=TYPE_LENGTH_MAX)
    job_args = PlainJSONField(_("arguments"), default=dict, blank=True)
    # Not by content types, which not every project has installed.
    target_type = models.CharField(
        _("type of target"), max_length=PK_LENGTH_MAX, blank=True, default=""
    )
    target_pk = models.CharField(_("target"), max_length=PK_LENGTH_MAX, blank=True, default="")
    relation = models.CharField(
        _("objects of the target"), max_length=TYPE_LENGTH_MAX, blank=True, default=""
    )
    created = models.DateTimeField(_("created"), db_default=DatabaseNow(), editable=False)

    objects = SavedJobQuerySet.as_manager()

    class Meta:
        verbose_name = _("saved job")
        verbose_name_plural = _("saved jobs")
        ordering = ("name",)
        indexes = [  # noqa: RUF012 - Django's own class attribute
            models.Index(fields=["target_type", "target_pk"], name="firefly_saved_for"),
        ]

    def __str__(self) -> str:
        return str(self.name)

    def __init__(self, *args: Any, objects: str | None = None, **kwargs: Any) -> None:
        # The manager has this name.
        if objects is not None:
            kwargs["relation"] = objects
        super().__init__(*args, **kwargs)

    @property
    def target(self) -> Any:
        """The object whose it is; ``None`` if it has none.

        Raises:
            ObjectDoesNotExist: If that was deleted.
            LookupError: If there is no such model any more.
        """
        if not self.target_type:
            return None
        model: Any = apps.get_model(self.target_type)
        return model._base_manager.get(pk=self.target_pk)

    @target.setter
    def target(self, value: models.Model | None) -> None:
        self.target_type, self.target_pk = ("", "") if value is None else reference_to(value)

    @property
    def is_known(self) -> bool:
        """Whether its job is registered in this process; older or newer code may have others."""
        from .saved_jobs import is_known  # noqa: PLC0415 - a verb on a row, see ARCHITECTURE layers

        return is_known(self)

    def current_pks(self, *, at_most: int) -> list[Any]:
        """Return the keys of what the relation of its target has now.

        Args:
            at_most: How many a start may be about; one more is returned if there are more.

        Raises:
            ValidationError: If there is no target, or it has no such relation.
        """
        if not self.target_type or not self.relation:
            message = _("It has no target with a relation, so say which objects it is started on.")
            raise ValidationError({"relation": message})
        try:
            target = self.target
        except (LookupError, ValueError) as error:
            # No such model, no label of a model, or no key of that model.
            if self._has_model():
                raise ValidationError({"target_pk": str(error)}) from None
            message = _("There is no model %(label)r. Its label is that of its app and its name.")
            raise ValidationError({"target_type": message % {"label": self.target_type}}) from None
        except ValidationError as error:
            raise ValidationError({"target_pk": error.messages}) from None
        except ObjectDoesNotExist as error:
            raise ValidationError({"target_pk": str(error)}) from None
        related: Any = getattr(target, self.relation, None)
        if not hasattr(related, "values_list"):
            message = _("%(target)s has no relation %(relation)r to many objects.")
            values = {"target": self.target_type, "relation": self.relation}
            raise ValidationError({"relation": message % values})
        # One more than may be, so that a start sees that there are too many.
        return list(related.order_by("pk").values_list("pk", flat=True)[: at_most + 1])

    def _has_model(self) -> bool:
        try:
            apps.get_model(self.target_type)
        except (LookupError, ValueError):
            return False
        return True

    def get_job(self, pks: Iterable[Any] | None = None, user: Any = None) -> NamedJob:
        """Return the job, checked as every other start is.

        Args:
            pks: The objects; by default those of its target.
            user: Who starts it, a user or a key; ``None``: the code itself.

        Raises:
            JobRefused: As ``get_job_from_name``.
        """
        from .saved_jobs import start_of  # noqa: PLC0415 - a verb on a row, see ARCHITECTURE layers

        return start_of(self, pks, user)

    def start(self, pks: Iterable[Any] | None = None, user: Any = None) -> TaskModel:
        """Start the job; arguments and errors as for :meth:`get_job`."""
        return self.get_job(pks, user).start()

    def clean(self) -> None:
        """Check what can be checked before objects are known.

        Raises:
            ValidationError: With a message per field.
        """
        from .saved_jobs import check_saved  # noqa: PLC0415 - as above

        if self.job_args is None:
            # What an empty field of a form stands for.
            self.job_args = {}
        if (problem := json_problem(self.job_args)) is not None:
            raise ValidationError({"job_args": problem})
        check_saved(self)
