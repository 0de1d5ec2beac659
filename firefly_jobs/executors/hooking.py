"""Call the hooks of an attempt, so that none of them can change what becomes of it.

``before_start`` and ``on_success`` run where the function does: in its context, under its
limits, in its transaction, of which a hook that raises is undone by a savepoint of its own.
The others run once the effects are undone and it is decided what the attempt was, in
autocommit mode and with the limits of the call once more.  One of them,
``on_prerequisite_failure``, is asked what the failure of a step means for its workflow.

What a hook raises is logged.  What is raised *into* it, because the consumer stops or a
limit is exceeded, ends the call like anything that is raised into the function.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.db import Error

from firefly_jobs.attempts import Claim, Ended, Outcome, Settlement, decide
from firefly_jobs.conf import get_settings
from firefly_jobs.contexts import TaskContext
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import (
    Cancel,
    LaneTimeoutError,
    LeavesGroup,
    MemoryLimitExceeded,
    Retry,
    Snooze,
    StopRequested,
    TimeLimitExceeded,
)
from firefly_jobs.hooks import ANSWERS, FailedStep, TaskHooks, methods_of, shared_hooks
from firefly_jobs.models import WorkflowStep
from firefly_jobs.reporting import log_fields
from firefly_jobs.transactions import CallTransaction

from .lanes import LaneBinding

if TYPE_CHECKING:
    from firefly_jobs.decorators import BaseTask

logger = logging.getLogger("firefly_jobs")

# What is raised into a hook from outside, and is about the call.
_INJECTED = (StopRequested, TimeLimitExceeded, MemoryLimitExceeded, LeavesGroup)
_STEERING = (Retry, Snooze, Cancel)
_ASKED = "on_prerequisite_failure"


class Run:
    """One attempt and what is called around it.

    Attributes:
        claim: The row as it was claimed.
        context: What ``current_task()`` returns; without arguments until they are read.
        hooks: Those of every task, then the task's own.
        variables: The context variables that the function and sync hooks share.
        ignores_failure: What a hook has answered about the failure of a step.
    """

    __slots__ = ("claim", "context", "hooks", "ignores_failure", "variables")

    def __init__(self, task: BaseTask[Any, Any], claim: Claim, *, using: str) -> None:
        self.claim = claim
        self.context = TaskContext(task, claim, (), {}, using)
        self.hooks = task.options.hooks
        if shared := shared_hooks():
            self.hooks = shared + self.hooks
        self.variables: Context = copy_context()
        self.ignores_failure: bool | None = None

    @property
    def is_atomic(self) -> bool:
        """Whether the call has a transaction."""
        return self.context.task.options.atomic

    def changes(self) -> dict[str, Any]:
        """Return the columns that the attempt has changed; what cannot be stored is left out."""
        try:
            return self.context.changes()
        except (TypeError, ValueError):
            logger.exception(
                "The metadata that task %s was given cannot be stored and stays as it was",
                self.claim.id,
                extra=log_fields(self.claim),
            )
            return {}


def changed_settlement(run: Run, completion: Completion) -> Settlement | None:
    """Return how to settle a call that returned, if it has changed columns of its row."""
    if not (changes := run.changes()):
        return None
    outcome = Outcome(
        claim=run.claim,
        duration=completion.duration,
        returned=completion.returned,
        changes=changes,
    )
    return decide(outcome, max_rescues=0)


def decided(outcome: Outcome) -> Outcome:
    """Return ``outcome`` with what it means: asked once, as a strategy may answer at random."""
    settlement = decide(outcome, max_rescues=get_settings().MAX_RESCUES)
    return replace(outcome, decided=settlement)


def with_later_changes(run: Run, outcome: Outcome) -> Outcome:
    """Return ``outcome`` with what the attempt, and its hooks, have changed until now."""
    changes = run.changes()
    if changes == outcome.changes and run.ignores_failure is None:
        return outcome
    settlement = outcome.decided and replace(
        outcome.decided, changes=changes, ignores_failure=run.ignores_failure
    )
    return replace(outcome, changes=changes, decided=settlement)


def events_after(outcome: Outcome) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the hooks to call once it is decided what an attempt was that did not succeed."""
    settlement = outcome.decided
    if settlement is None or not settlement.has_started:
        return []
    events: list[tuple[str, tuple[Any, ...]]] = [("after_return", (str(settlement.ended),))]
    if settlement.ended is Ended.FAILED:
        events.insert(0, ("on_failure", (outcome.error,)))
        if outcome.claim.workflow is not None:
            events.insert(1, (_ASKED, (outcome.error,)))
    elif settlement.ended is Ended.RETRIED:
        events.insert(0, ("on_retry", (outcome.error, settlement.delay_seconds)))
    return events


# --- hooks of plain functions


def before_sync(run: Run, transaction: CallTransaction) -> None:
    """Call the hooks before the function; errors as :func:`_run_sync`."""
    _run_sync(run, "before_start", transaction=transaction if run.is_atomic else None)


def returned_sync(run: Run, value: Any, transaction: CallTransaction) -> None:
    """Call the hooks after the function has returned ``value``; errors as :func:`_run_sync`.

    Raises:
        TransactionDoomedError: If the effects of the function are gone already.
    """
    own = transaction if run.is_atomic else None
    if own is not None:
        own.refuse_if_doomed()
    _run_sync(run, "on_success", value, transaction=own)
    _run_sync(run, "after_return", str(Ended.COMPLETED), transaction=own)


def _run_sync(
    run: Run, event: str, *values: Any, transaction: CallTransaction | None = None
) -> None:
    """Call the hooks for ``event`` on this thread.

    Args:
        run: Whose.
        event: One of ``hooks.EVENTS``.
        values: What each gets beside ``run.context``.
        transaction: The call's, if what a hook did is to be undone when it raises.

    Raises:
        Retry, Snooze, Cancel: From ``before_start``.
        BaseException: What was raised into a hook from outside, or had ended the transaction.
    """
    for hook, method in methods_of(run.hooks, event):
        if transaction is not None:
            transaction.begin_hook()
        try:
            method(run.context, *values)
            if transaction is not None:
                transaction.end_hook()
        except BaseException as error:
            if _passes(error, event) or (transaction is not None and not transaction.undo_hook()):
                raise
            _log(run, hook, event, error)


def finish_sync(run: Run, outcome: Outcome) -> None:
    """Call the hooks that follow an attempt without success, each whatever the others raise."""
    for event, values in events_after(outcome):
        if event == _ASKED:
            run.variables.run(_ask_sync, run, *values)
        else:
            run.variables.run(_run_sync, run, event, *values)


def _ask_sync(run: Run, error: BaseException) -> None:
    """Ask what the failure of a step means, until a hook has an answer."""
    methods = methods_of(run.hooks, _ASKED)
    failed = _failed_step(run, error) if methods else None
    if failed is None:
        return
    for hook, method in methods:
        try:
            answer = method(run.context, failed)
        except BaseException as raised:
            if _passes(raised, _ASKED):
                raise
            _log(run, hook, _ASKED, raised)
        else:
            if _heeds(run, hook, answer):
                return


# --- hooks of coroutine functions


async def before_async(run: Run, *, binding: LaneBinding) -> None:
    """Await the hooks before the function."""
    await _run_async(run, "before_start", binding=binding, is_atomic=run.is_atomic)


async def returned_async(run: Run, value: Any, *, binding: LaneBinding) -> None:
    """Await the hooks after the function has returned ``value``; errors as above."""
    if run.is_atomic:
        await _on_lane(binding, CallTransaction.refuse_if_doomed)
    await _run_async(run, "on_success", value, binding=binding, is_atomic=run.is_atomic)
    status = str(Ended.COMPLETED)
    await _run_async(run, "after_return", status, binding=binding, is_atomic=run.is_atomic)


async def _run_async(
    run: Run, event: str, *values: Any, binding: LaneBinding, is_atomic: bool
) -> None:
    """Await the hooks for ``event``, plain ones on the lane; arguments and errors as above.

    Args:
        run: Whose.
        event: One of ``hooks.EVENTS``.
        values: What each gets beside ``run.context``.
        binding: The coroutine's lane.
        is_atomic: Whether what a hook did is to be undone when it raises.
    """
    for hook, method in methods_of(run.hooks, event):
        if is_atomic:
            await _on_lane(binding, CallTransaction.begin_hook)
        try:
            await _awaitable(method)(run.context, *values)
            if is_atomic:
                await _on_lane(binding, CallTransaction.end_hook)
        except BaseException as error:
            if _passes(error, event) or _is_cancelled(error):
                raise
            if is_atomic and await _on_lane(binding, CallTransaction.undo_hook) is False:
                raise
            _log(run, hook, event, error)


async def finish_async(run: Run, outcome: Outcome, *, binding: LaneBinding) -> None:
    """Await the hooks that follow an attempt without success."""
    for event, values in events_after(outcome):
        if event == _ASKED:
            await _ask_async(run, *values)
        else:
            await _run_async(run, event, *values, binding=binding, is_atomic=False)


async def _ask_async(run: Run, error: BaseException) -> None:
    """Ask what the failure of a step means, plain hooks on the lane."""
    methods = methods_of(run.hooks, _ASKED)
    try:
        failed = await _awaitable(_failed_step)(run, error) if methods else None
    except LaneTimeoutError as late:
        _log_not_asked(run, late)
        return
    if failed is None:
        return
    for hook, method in methods:
        try:
            answer = await _awaitable(method)(run.context, failed)
        except BaseException as raised:
            if _passes(raised, _ASKED) or _is_cancelled(raised):
                raise
            _log(run, hook, _ASKED, raised)
        else:
            if _heeds(run, hook, answer):
                return


def _awaitable(method: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    if inspect.iscoroutinefunction(method):
        return method
    return sync_to_async(method, thread_sensitive=True)


async def _on_lane(binding: LaneBinding, work: Callable[[CallTransaction], Any]) -> Any:
    """Run ``work`` on the lane, if the coroutine has taken one."""
    return None if binding.lane is None else await binding.with_transaction(work)


def _is_cancelled(error: BaseException) -> bool:
    """Whether somebody cancels the call, not the hook what it awaits."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


# --- both


def _failed_step(run: Run, error: BaseException) -> FailedStep | None:
    """Return what the hooks are asked about; nothing if the task is no step, as the last call."""
    try:
        steps = WorkflowStep.objects.using(run.context.database).filter(pk=run.claim.id)
        name = steps.values_list("name", flat=True).first()
    except Error as broken:
        _log_not_asked(run, broken)
        return None
    return None if name is None else FailedStep(name, error)


def _log_not_asked(run: Run, error: Exception) -> None:
    logger.warning(
        "No hook was asked about the failure of task %s, as its step could not be read: %s",
        run.claim.id,
        error,
        extra=log_fields(run.claim),
    )


def _heeds(run: Run, hook: TaskHooks, answer: Any) -> bool:
    """Take note of what a hook has answered; return whether that decides."""
    if answer is not None and not (isinstance(answer, str) and answer in ANSWERS):
        logger.error(
            "Hook %s.%s answered about task %s with something of type %s, which counts as None; it "
            "may answer 'stop', 'continue' or None",
            type(hook).__qualname__,
            _ASKED,
            run.claim.id,
            type(answer).__name__,
            extra=log_fields(run.claim),
        )
        return False
    run.ignores_failure = ANSWERS[answer]
    return answer is not None


def _passes(error: BaseException, event: str) -> bool:
    return isinstance(error, _INJECTED) or (
        event == "before_start" and isinstance(error, _STEERING)
    )


def _log(run: Run, hook: TaskHooks, event: str, error: BaseException) -> None:
    logger.error(
        "Hook %s.%s raised for task %s, which it does not concern",
        type(hook).__qualname__,
        event,
        run.claim.id,
        exc_info=error,
        extra=log_fields(run.claim),
    )


def log_stopped(run: Run, error: BaseException) -> None:
    """Say that hooks were stopped, by a limit or by our own shutdown."""
    logger.warning(
        "The hooks of task %s were stopped before they had ended",
        run.claim.id,
        exc_info=error,
        extra=log_fields(run.claim),
    )
