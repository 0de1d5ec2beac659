"""Send the signals about tasks and workflows, each after what it tells was committed.

In a process with a consumer they go through a queue to the *messenger*, a thread of its own,
so that a slow receiver holds up neither a call nor the dispatcher; anywhere else the thread
that has committed sends them.  Nothing is built while a signal has no receivers.

A signal is sent once or, if the process dies between COMMIT and sending, not at all: what
must not be missed belongs into the transaction, or into another task.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from django.db import connections
from django.db.models import QuerySet
from django.dispatch import Signal

from . import signals
from .attempts import Claim, Ended, Settlement
from .models import TaskModel, WorkflowModel
from .states import WorkflowStatus
from .wakeup import idle_seconds

logger = logging.getLogger("firefly_jobs")

# Beyond that receivers are slower than tasks, and memory is worth more than a signal.
QUEUE_MAX = 10_000

_Message = tuple[Signal, dict[str, Any]]


# --- what happened


def scheduled(rows: Sequence[TaskModel], *, using: str) -> None:
    """Tell that ``rows`` were written by this thread, once it has committed."""
    if not signals.task_scheduled.receivers or not rows:
        return
    _on_commit(
        [(signals.task_scheduled, _words(row.pk, row.func_name, row.queue, using)) for row in rows],
        using,
    )


def started(claim: Claim, *, using: str, owner: Callable[[], int]) -> None:
    """Tell that the call of ``claim`` begins, in the consumer of that id."""
    if signals.task_started.receivers:
        _tell(signals.task_started, claim, using, owner())


def completed(claim: Claim, duration: float, *, using: str, consumer: int) -> None:
    """Tell that a completion was committed."""
    if signals.task_completed.receivers:
        _tell(signals.task_completed, claim, using, consumer, duration=duration)


def settled(settlement: Settlement, *, using: str, consumer: int | None) -> None:
    """Tell what was committed about an attempt, if there is a signal for that."""
    claim, error = settlement.claim, settlement.error or ""
    if settlement.ended is Ended.COMPLETED and signals.task_completed.receivers:
        _tell(signals.task_completed, claim, using, consumer, duration=settlement.duration)
    elif settlement.ended is Ended.FAILED and signals.task_failed.receivers:
        _tell(signals.task_failed, claim, using, consumer, error=error)
    elif settlement.ended is Ended.CANCELLED and signals.task_cancelled.receivers:
        _tell(signals.task_cancelled, claim, using, consumer, error=error)
    elif settlement.ended is Ended.RETRIED and signals.task_retried.receivers:
        delay = settlement.delay_seconds
        _tell(signals.task_retried, claim, using, consumer, error=error, delay=delay)


def freed(settlements: Iterable[Settlement], *, using: str, consumer: int | None) -> None:
    """Tell what became of rows that a dead consumer held.

    Args:
        settlements: What was committed about them.
        using: Database alias.
        consumer: The dead one's id.
    """
    for settlement in settlements:
        if settlement.ended is Ended.LOST:
            rescued(settlement.claim, using=using, consumer=consumer)
        else:
            settled(settlement, using=using, consumer=consumer)


def rescued(claim: Claim, *, using: str, consumer: int | None) -> None:
    """Tell that a row of a consumer that is gone was made due again."""
    if signals.task_rescued.receivers:
        _tell(signals.task_rescued, claim, using, consumer)


def cancelling(rows: QuerySet[TaskModel], error: str, *, using: str) -> None:
    """Tell that ``rows`` are cancelled in the open transaction, once it has committed."""
    if not signals.task_cancelled.receivers:
        return
    # Locked, so that what is told is what the UPDATE that follows finds.
    locked = rows.select_for_update().order_by("pk")
    found = list(locked.values_list("pk", "func_name", "queue", "retry_attempts"))
    _on_commit(
        [
            (
                signals.task_cancelled,
                _words(pk, func_name, queue, using)
                | {
                    "attempt": retries + 1,
                    "consumer": None,
                    "error": error,
                },
            )
            for pk, func_name, queue, retries in found
        ],
        using,
    )


_WORKFLOW_ENDS = {
    WorkflowStatus.COMPLETED: signals.workflow_completed,
    WorkflowStatus.FAILED: signals.workflow_failed,
    WorkflowStatus.CANCELLED: signals.workflow_cancelled,
}


def workflow_started(run: WorkflowModel, *, using: str) -> None:
    """Tell that a workflow was scheduled in the open transaction, once it has committed."""
    _tell_of_workflow(signals.workflow_started, run, "", using)


def workflow_ended(run: WorkflowModel, status: WorkflowStatus, *, using: str) -> None:
    """Tell that a workflow ends in the open transaction, once it has committed."""
    error = run.error if status is WorkflowStatus.FAILED else ""
    _tell_of_workflow(_WORKFLOW_ENDS[status], run, error, using)


def _tell_of_workflow(signal: Signal, run: WorkflowModel, error: str, using: str) -> None:
    if signal.receivers:
        words = {"workflow_id": run.pk, "name": run.name, "error": error, "using": using}
        _on_commit([(signal, words)], using)


def _words(task_id: int, func_name: str, queue: str, using: str) -> dict[str, Any]:
    return {"task_id": task_id, "func_name": func_name, "queue": queue, "using": using}


def _tell(signal: Signal, claim: Claim, using: str, consumer: int | None, **more: Any) -> None:
    words = _words(claim.id, claim.func_name, claim.queue, using)
    _messenger.deliver(
        [(signal, {**words, "attempt": claim.attempt, "consumer": consumer, **more})]
    )


def _on_commit(messages: list[_Message], using: str) -> None:
    connection: Any = connections[using]
    # Where transactions are managed by hand, nobody tells whether they are committed.
    if messages and (connection.in_atomic_block or connection.autocommit):
        connection.on_commit(partial(_deliver, messages), robust=True)


def _deliver(messages: list[_Message]) -> None:
    _messenger.deliver(messages)


# --- who sends it


def start() -> None:
    """Send what this process tells from a thread of its own, until as many :func:`stop`."""
    _messenger.start()


def stop(timeout_seconds: float) -> None:
    """Send what is queued, and wait for that no longer than this."""
    _messenger.stop(timeout_seconds)


class _Messenger:
    """The queue of this process, and the thread that empties it."""

    def __init__(self) -> None:
        self._state = threading.Condition()
        self._queue: deque[_Message] = deque()
        self._thread: threading.Thread | None = None
        # Consumers, or supervisors, of this process.
        self._users = 0
        self._is_sending = False
        self._dropped = 0

    def start(self) -> None:
        with self._state:
            self._users += 1

    def stop(self, timeout_seconds: float) -> None:
        with self._state:
            self._users -= 1
            self._state.notify_all()
            is_done = self._state.wait_for(
                lambda: self._thread is None or (self._users > 0 and self._is_idle),
                timeout_seconds,
            )
            if not is_done:
                logger.warning(
                    "%s signals were not sent before this process stopped, as a receiver takes "
                    "long",
                    len(self._queue) + self._is_sending,
                )

    @property
    def _is_idle(self) -> bool:
        return not self._queue and not self._is_sending

    def deliver(self, messages: list[_Message]) -> None:
        """Send ``messages`` soon; where nobody has asked for a thread, at once."""
        if not self._users:
            for message in messages:
                _send(message)
            return
        with self._state:
            room = max(QUEUE_MAX - len(self._queue), 0)
            self._queue.extend(messages[:room])
            if len(messages) > room:
                self._drop(len(messages) - room)
            if self._thread is None:
                self._start_thread()
            self._state.notify_all()

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="firefly-messenger", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the interpreter is ending, or there are too many
            self._thread = None
            logger.warning("Signals wait, as their thread could not be started: %s", error)

    def _drop(self, count: int) -> None:
        if not self._dropped:
            logger.warning(
                "Signals are dropped, as their receivers take longer than the tasks they are about"
            )
        self._dropped += count

    def _run(self) -> None:
        try:
            while (message := self._next()) is not None:
                _send(message)
        finally:
            with self._state:
                if self._thread is threading.current_thread():
                    self._is_sending, self._thread = False, None
                self._state.notify_all()

    def _next(self) -> _Message | None:
        """Wait for the next message; ``None`` once all are sent and nobody adds more."""
        with self._state:
            self._is_sending = False
            self._state.notify_all()
            if self._wait(idle_seconds()):
                return self._take()
        # Idle: a connection that a receiver has used is not kept.
        connections.close_all()
        with self._state:
            while not self._queue:
                if not self._users:
                    self._thread = None
                    return None
                self._state.wait()
            return self._take()

    def _wait(self, seconds: float) -> bool:
        self._state.wait_for(lambda: self._queue or not self._users, seconds)
        return bool(self._queue)

    def _take(self) -> _Message:
        self._is_sending = True
        if self._dropped and len(self._queue) == 1:
            logger.warning("%s signals were dropped", self._dropped)
            self._dropped = 0
        return self._queue.popleft()


def _send(message: _Message) -> None:
    """Send one signal; what its receivers raise is logged."""
    signal, words = message
    sender = WorkflowModel if "workflow_id" in words else TaskModel
    try:
        answers = signal.send_robust(sender=sender, **words)
    except BaseException:
        # Receivers are user code; one of them may even have raised SystemExit.
        logger.exception(
            "A receiver of a signal raised",
            extra={"task_id": words.get("task_id"), "workflow_id": words.get("workflow_id")},
        )
        return
    for receiver, answer in answers:
        if isinstance(answer, Exception):
            logger.error(
                "%s, a receiver of a signal, raised %s",
                getattr(receiver, "__qualname__", receiver),
                type(answer).__name__,
                exc_info=answer,
                extra={"task_id": words.get("task_id"), "workflow_id": words.get("workflow_id")},
            )


_messenger = _Messenger()
# What a forked child must neither use nor close.
_inherited: list[_Messenger] = []


def _forget_parents() -> None:
    global _messenger  # noqa: PLW0603 - a forked process starts over
    _inherited.append(_messenger)
    _messenger = _Messenger()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_parents)
