"""The steps of a call that all executors share: look up, unpack, call, pack."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from time import monotonic, perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from firefly_jobs import serializers, step_results
from firefly_jobs.attempts import Claim, Outcome
from firefly_jobs.checkpoints import reach
from firefly_jobs.contexts import enter_context
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import (
    Cancel,
    CommitUncertain,
    LaneTimeoutError,
    Retry,
    Snooze,
    StopRequested,
    Withdrawn,
)
from firefly_jobs.reporting import log_fields
from firefly_jobs.transactions import CallTransaction

from . import hooking
from .hooking import Run

if TYPE_CHECKING:
    from firefly_jobs.databases import Database

logger = logging.getLogger("firefly_jobs")

# The reason that a row gives.
EXPIRED = "expired"


def refuse_if_withdrawn(claim: Claim) -> None:
    """Raise ``Withdrawn`` if it is too late to start the call, or its workflow stops.

    The database told, when it was claimed, how much time was left, and whether that stops.
    """
    if claim.start_by is not None and monotonic() >= claim.start_by:
        raise Withdrawn(EXPIRED)
    if claim.withdrawn:
        reason = f"cancelled: {claim.withdrawn}"
        raise Withdrawn(reason)


def load_arguments(claim: Claim, using: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the call's arguments, verified and unpickled.

    May query, for model instances and for what other steps of its workflow have returned.
    """
    args, kwargs = serializers.loads_params(claim.raw_params, task_name=claim.func_name)
    if claim.workflow is None:
        return args, kwargs
    return step_results.filled(args, kwargs, workflow=claim.workflow, using=using)


class OwnProcess:
    """Keep a process that the call forks from going on where its parent does.

    A child that does not end itself would settle the call, too, on a copy of its parent's
    connection, and destroy the transaction that is open there.
    """

    __slots__ = ("_process",)

    def __enter__(self) -> None:
        self._process = os.getpid()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._process:
            _end_child(error)


def _end_child(error: BaseException | None) -> NoReturn:
    """End this process as an interpreter would that has come to its end, or raised."""
    code: Any = int(error is not None)
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def call(run: Run, transaction: CallTransaction) -> str:
    """Call a sync task, with its hooks, and return its result as it is stored.

    It runs in a copy of the context, so that what it sets (an active language, a time
    zone, any context variable) is not there for the next call.

    Raises:
        BaseException: Whatever the function raised; or what unpacking, packing did.
    """
    with OwnProcess():
        return run.variables.run(_call, run, transaction)


def _call(run: Run, transaction: CallTransaction) -> str:
    reach("executing")
    context, task = run.context, run.context.task
    enter_context(context)
    args, kwargs = context.args, context.kwargs = load_arguments(run.claim, context.database)
    if run.hooks:
        hooking.before_sync(run, transaction)
    if task.options.takes_context:
        value = task.func(context, *args, **kwargs)
    else:
        value = task.func(*args, **kwargs)
    returned = store_returned(run.claim, value)
    if run.hooks:
        hooking.returned_sync(run, value, transaction)
    return returned


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
    duration = perf_counter() - started
    return Completion.of(claim, duration, returned)


def failed_outcome(
    claim: Claim, error: BaseException, *, duration: float, is_usable: bool, database: Database
) -> Outcome:
    """Return the outcome of a call that raised, or whose settling did.

    Args:
        claim: What was executed.
        error: What was raised.
        duration: Seconds that it took.
        is_usable: Whether the call's connection survived.
        database: Knows which errors say nothing about the task.
    """
    return Outcome(
        claim=claim,
        duration=duration,
        error=error,
        is_lost=not is_usable
        or isinstance(error, CommitUncertain | LaneTimeoutError)
        # What a task says itself counts, whatever made it say so.
        or (not isinstance(error, Retry | Snooze | Cancel) and database.is_conflict(error)),
        is_interrupted=isinstance(error, StopRequested),
    )


def not_started(claim: Claim, error: BaseException) -> Outcome:
    """Return the outcome of a claim for which there was no connection; log why."""
    logger.warning("There is no connection for a task: %s", error, extra=log_fields(claim))
    return Outcome(claim=claim, duration=0.0, error=error, has_started=False)
