"""A start of a registered job that is checked; ``job_registry`` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from django.db import connections

from . import databases
from .exceptions import JobRefused, TaskAlreadyScheduled
from .job_models import JobStart
from .jobs import Job
from .models import TaskModel

if TYPE_CHECKING:
    from .job_registry import RegisteredJob


@dataclass(frozen=True, slots=True)
class NamedJob:
    """A start that is checked and not written yet.

    Attributes:
        job: The call, a :class:`~firefly_jobs.Job`.
        registered: What was started.
        obj_pks: On which objects.
        user_pk: By whom.
    """

    job: Job
    registered: RegisteredJob
    obj_pks: tuple[Any, ...]
    user_pk: Any = None

    def schedule(self) -> TaskModel:
        """Write the task, and who has started it on what, in one transaction.

        Raises:
            TaskAlreadyScheduled: As ``job.schedule()``.
        """
        using = self.job.alias
        with databases.of(using).write_transaction(connections[using]):
            row = self.job.schedule()
            self.note_start(row)
        return row

    def apply_async(self) -> TaskModel:
        """Do the same as :meth:`schedule`."""
        return self.schedule()

    def start(self) -> TaskModel:
        """Do the same for a person, to whom a unique key means nothing.

        Raises:
            JobRefused: With 400, if a call with the same unique key has not ended.
        """
        try:
            return self.schedule()
        except TaskAlreadyScheduled as error:
            other = "another task" if error.existing is None else f"task {error.existing.pk}"
            message = (
                f"{self.registered.name!r} was not started, as {other} does the same and has not "
                f"ended. Wait for it, or cancel it."
            )
            raise JobRefused(message, 400) from error

    def note_start(self, row: TaskModel) -> None:
        """Write who has started a row on what, in the transaction that writes the row."""
        JobStart.objects.using(self.job.alias).create(
            task_id=row.pk,
            user_pk="" if self.user_pk is None else str(self.user_pk),
            task_name=self.registered.task_name,
            obj_type=self.registered.task_data_type,
            obj_pks=[pk if isinstance(pk, int) else str(pk) for pk in self.obj_pks],
        )
