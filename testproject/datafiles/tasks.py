"""The jobs that are started on files."""

from __future__ import annotations

from typing import Any

from firefly_jobs import register_job, task

from .models import DataFile


@task
@register_job(
    name="Flag custom",
    task_name="flag_custom",
    task_data_type="datafile",
    max_items=500,
    default_args={"custom_flag": True},
)
def flag_custom(
    datafile_pks: list[int],
    custom_flag: bool = False,
    **kwargs: Any,  # noqa: ARG001 - user_pk, if somebody has started it
) -> int:
    """Flag files, or take the flag away.

    Args:
        datafile_pks: Which.
        custom_flag: Whether they get the flag or lose it.
        kwargs: Who has started it.
    """
    return DataFile.objects.filter(pk__in=datafile_pks).update(custom_flag=custom_flag)


@register_job("Rename", "rename_files", "datafile", task_admin_only=True, max_items=3)
@task
def rename_files(
    datafile_pks: list[int],
    prefix: str,
    user_pk: int | None = None,  # noqa: ARG001 - kept with the call
) -> list[str]:
    """Put a text before the names of files; staff only.

    Args:
        datafile_pks: Which.
        prefix: What comes before their names.
        user_pk: Who has started it.
    """
    names = []
    for datafile in DataFile.objects.filter(pk__in=datafile_pks).order_by("pk"):
        datafile.name = f"{prefix}{datafile.name}"
        datafile.save(update_fields=["name"])
        names.append(datafile.name)
    return names
