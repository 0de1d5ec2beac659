"""The rules of saved jobs: what a start that is kept by name stands for.

A saved job is started through :func:`~firefly_jobs.job_registry.get_job_from_name`, so
every rule of a start holds for it as well; here stands only what it adds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.core.exceptions import ValidationError

from .exceptions import JobRefused
from .job_models import SavedJob
from .job_registry import NamedJob, find, get_job_from_name


def is_known(row: SavedJob) -> bool:
    """Return whether the job of a saved job is registered here."""
    try:
        find(row.task_name)
    except JobRefused:
        return False
    return True


def start_of(row: SavedJob, pks: Iterable[Any] | None, user: Any) -> NamedJob:
    """Return the start that a saved job stands for; see ``SavedJob.get_job``."""
    if pks is None:
        try:
            pks = row.current_pks(at_most=find(row.task_name).max_items)
        except ValidationError as error:
            message = f"Saved job {row.name!r}: {' '.join(error.messages)}"
            raise JobRefused(message, 400) from error
    user_pk = getattr(user, "pk", user)
    job_args = find(row.task_name).arguments_from_json(row.job_args)
    return get_job_from_name(row.task_name, row.obj_type, pks, job_args, user_pk)


def check_saved(row: SavedJob) -> None:
    """Check a saved job; see ``SavedJob.clean``."""
    problems: dict[str, str] = {}
    try:
        registered = find(row.task_name)
    except JobRefused as refusal:
        raise ValidationError({"task_name": refusal.message}) from None
    if row.obj_type != registered.task_data_type:
        problems["obj_type"] = f"This job is for {registered.task_data_type!r}."
    if bool(row.target_type) != bool(row.target_pk):
        problems["target_type"] = "Give the type and the key of the target, or neither."
    elif row.relation and not row.target_type:
        problems["relation"] = "A relation belongs to a target; give that as well."
    elif row.target_type:
        try:
            row.current_pks(at_most=0)
        except ValidationError as error:
            problems.update({k: " ".join(v) for k, v in error.message_dict.items()})
    try:
        # With one object in place of those that a start is about.
        job_args = registered.arguments_from_json(row.job_args)
        get_job_from_name(row.task_name, registered.task_data_type, [1], job_args)
    except JobRefused as refusal:
        problems["job_args"] = refusal.message
    if problems:
        raise ValidationError(problems)
