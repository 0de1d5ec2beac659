"""The steps of a call that sync and async tasks share: look up, unpack, call, pack."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from firefly_jobs import lifecycle, registry, serializers
from firefly_jobs.attempts import Claim, Outcome, TaskContext
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import CommitUncertain, LaneTimeoutError, StopRequested

if TYPE_CHECKING:
    from firefly_jobs.databases import Database
    from firefly_jobs.decorators import BaseTask


def find_task(claim: Claim) -> BaseTask[Any, Any]:
    """Return the task that ``claim`` names; raises ``TaskNotFoundError``."""
    return registry.find(claim.func_name)


def load_arguments(claim: Claim) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call's arguments, verified and unpickled; may query for model instances."""
    return serializers.loads_params(claim.raw_params, task_name=claim.func_name)


def make_context(
    task: BaseTask[Any, Any], claim: Claim, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TaskContext:
    """Return what ``current_task()`` answers inside this call."""
    return TaskContext(task, claim, args, kwargs)


def store_returned(claim: Claim, value: Any) -> str:
    """Return the text to store for the call's result, in the format of its arguments.

    Raises:
        PayloadError: If it cannot be stored.
    """
    return serializers.dumps_returned(
        value, task_name=claim.func_name, serializer=serializers.format_of(claim.raw_params)
    )


def completion(claim: Claim, returned: str, started: float) -> Completion:
    """Return what the settling statement needs."""
    return Completion(claim.id, claim.fence, perf_counter() - started, returned)


def failed_outcome(
    claim: Claim, error: BaseException, *, started: float, is_usable: bool, database: Database
) -> Outcome:
    """Return the outcome of a call that raised, or whose settling did.

    Args:
        claim: What was executed.
        error: What was raised.
        started: ``perf_counter()`` at its start.
        is_usable: Whether the call's connection survived.
        database: Knows which errors say nothing about the task.
    """
    return Outcome(
        claim=claim,
        duration=perf_counter() - started,
        error=error,
        is_lost=not is_usable
        or isinstance(error, CommitUncertain | LaneTimeoutError)
        or database.is_conflict(error),
        is_interrupted=isinstance(error, StopRequested),
    )


def was_committed(claim: Claim, *, using: str) -> bool:
    """After :class:`CommitUncertain`: ask the row, on a fresh connection, what happened."""
    return lifecycle.was_completed(claim, using=using)
