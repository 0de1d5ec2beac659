"""Fill in what other steps of a workflow have returned, when a step's call starts."""

from __future__ import annotations

from typing import Any

from .exceptions import PayloadError
from .placeholders import ParentResults, Placeholder, StepResult, placeholders_in, replaced
from .states import Status
from .workflow_models import WorkflowStep


def filled(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, workflow: int, using: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the results that placeholders stand for.

    Args:
        args: As they were stored.
        kwargs: Likewise.
        workflow: The workflow's id.
        using: Database alias.

    Raises:
        PayloadError: If a step whose result stands there has not completed.
    """
    found = list(placeholders_in((args, kwargs)))
    if not found:
        return args, kwargs
    names = {name for placeholder in found for name in _names_of(placeholder)}
    steps = WorkflowStep.objects.using(using).filter(workflow=workflow, name__in=names)
    completed = steps.filter(task__status=Status.COMPLETED).select_related("task")
    results = {step.name: step.task.returned for step in completed}

    def value_of(placeholder: Placeholder) -> Any:
        if isinstance(placeholder, ParentResults):
            return {name: results[name] for name in placeholder.steps if name in results}
        if placeholder.step not in results:
            message = (
                f"Step {placeholder.step!r} has not completed, so it has no result to pass on."
            )
            raise PayloadError(message)
        return results[placeholder.step]

    return replaced(args, value_of), replaced(kwargs, value_of)


def _names_of(placeholder: Placeholder) -> tuple[str, ...]:
    return (placeholder.step,) if isinstance(placeholder, StepResult) else placeholder.steps
