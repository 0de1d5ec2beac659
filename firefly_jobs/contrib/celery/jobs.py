"""``CeleryJob``: hand one call to Celery, free the slot, and settle when it reports back.

A row passes through its consumer several times within one attempt.  The first time it
sends the call and goes back to ``created``, a snooze that spends nothing.  Then it looks
from time to time what the result backend says; and it is made due at once by the worker
in which the call ends (``app._ended``), so the pauses between looks are only the ceiling.

Where it stands is told by its history.  The losses, releases and snoozes at its end
belong to the attempt under way: the fence of the first of them, or the claim's own, is
what the id of the Celery call is made of, and the snooze is the moment of the handover.
Before them stands what ended another attempt, or, if the row was cancelled or replaced
while it waited, another call (``history.note_withdrawn``).
So a consumer that is killed after sending and before settling finds the result of what
it sent, under the same id.  If there is none yet it sends again: a call to Celery is
at-least-once, like every effect outside the database.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

from celery import Celery, states
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.result import AsyncResult, EagerResult
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from firefly_jobs.attempts import Ended
from firefly_jobs.conf import seconds
from firefly_jobs.contexts import TaskContext, current_task
from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.exceptions import Snooze
from firefly_jobs.jobs import Job
from firefly_jobs.models import TaskAttempt, TaskModel

from .app import HEADER, handed_over, installed_app

SILENCE_SECONDS = 3_600.0
LOOK_SECONDS_MIN, LOOK_SECONDS_MAX = 1.0, 60.0
_SAME_ATTEMPT = frozenset({Ended.SNOOZED, Ended.LOST, Ended.RELEASED})


class CeleryTaskFailed(Exception):
    """The Celery task raised, or was revoked; its traceback there is in the attempt's."""


class CeleryTaskSilent(Exception):
    """Celery did not report the end of a call in time; the call was revoked."""


class HandedOver(Snooze):
    """Steers: the call was sent, and the row waits."""

    def __init__(self, celery_id: str, delay: float) -> None:
        super().__init__(delay)
        self.reason = handed_over(celery_id)


class NotEnded(HandedOver):
    """Steers: Celery has not reported yet."""

    is_notable = False


class CeleryJob(Job):
    """Hand a call to a task of the installed Celery application, and wait without a slot.

    Args:
        celery_task: The Celery task, or its name.
        task_args: Its positional arguments, in a form that Celery's serializer takes.
        task_kwargs: Its keyword arguments, likewise.
        celery_queue: Celery's queue; by default as Celery routes the task.
        silence: Seconds or ``timedelta`` until the attempt fails if Celery has not reported
            the end of the call: longer than the task takes and waits in Celery's queue.

    Raises:
        ValueError: Also for ``concurrency`` and ``rate_limit``.  They would count how often a
            consumer sends and looks, not what runs in Celery meanwhile.
    """

    # Nothing here touches the task's database but reading; and on SQLite a transaction
    # would hold the write lock while a broker is waited for.
    atomic: ClassVar[bool] = False
    no_limits: ClassVar[str] = (
        "a consumer sends the call and looks at it from time to time, and what it does in between "
        "is up to Celery. Limit it there (rate_limit of the Celery task, --concurrency of its "
        "workers), or let them run a task of this project with manage.py celery_consume."
    )

    def __init__(
        self,
        celery_task: Any,
        task_args: Sequence[Any] = (),
        task_kwargs: Mapping[str, Any] | None = None,
        **words: Any,
    ) -> None:
        if isinstance(task_args, str | bytes):
            message = "task_args must be a list of arguments, got text."
            raise ValueError(message)  # noqa: TRY004 - as what validate raises
        name = getattr(celery_task, "name", celery_task)
        super().__init__(name, list(task_args), dict(task_kwargs or {}), **words)

    def run(
        self,
        celery_task: str,
        task_args: Sequence[Any] = (),
        task_kwargs: Mapping[str, Any] | None = None,
        *,
        celery_queue: str | None = None,
        silence: float | timedelta = SILENCE_SECONDS,
    ) -> dict[str, Any]:
        """Return ``{"celery_task_id", "result"}`` once the call has ended in Celery."""
        app, context = _app_with_results(), current_task()
        handover = _handover(context)
        result: Any = AsyncResult(handover.celery_id, app=app)
        # Before sending, too: a consumer that was killed may have sent it.  An eager
        # application, as tests have it, stores nothing.
        if not app.conf.task_always_eager and result.state in states.READY_STATES:
            return _outcome(celery_task, result)
        if handover.waited_seconds is None:
            options: dict[str, Any] = {
                "args": task_args,
                "kwargs": dict(task_kwargs or {}),
                "task_id": handover.celery_id,
                "ignore_result": False,
                "headers": {HEADER: [context.database, context.id]},
            }
            if celery_queue is not None:
                options["queue"] = celery_queue
            sent = _send(app, celery_task, options)
            if isinstance(sent, EagerResult):
                return _outcome(celery_task, sent)
            raise HandedOver(handover.celery_id, LOOK_SECONDS_MIN)
        left = seconds(silence) - handover.waited_seconds
        if left <= 0:
            result.revoke()
            message = (
                f"Celery did not report the end of {celery_task} ({handover.celery_id}) within "
                f"{seconds(silence):g} s. Its worker may be gone, or may not store results in "
                f"the backend that this process reads."
            )
            raise CeleryTaskSilent(message)
        pause = min(max(handover.waited_seconds / 2, LOOK_SECONDS_MIN), LOOK_SECONDS_MAX)
        raise NotEnded(handover.celery_id, min(pause, left))

    def validate(self, celery_task: Any, silence: Any) -> None:
        """Raise ``ValueError`` if there is no such call."""
        if not isinstance(celery_task, str) or not celery_task:
            message = "celery_task must be a Celery task, or the name of one."
            raise ValueError(message)
        is_time = isinstance(silence, int | float | timedelta) and not isinstance(silence, bool)
        if not is_time or seconds(silence) <= 0:
            message = "silence must be more than 0 seconds, or a timedelta."
            raise ValueError(message)


CeleryIntegrationJob = CeleryJob


class Handover(NamedTuple):
    """Under which id a call is Celery's, and for how long; ``None``: not yet."""

    celery_id: str
    waited_seconds: float | None


def _handover(context: TaskContext) -> Handover:
    rows = TaskModel.objects.using(context.database).filter(pk=context.id)
    created, now = rows.values_list("created", DatabaseNow()).get()
    history = TaskAttempt.objects.using(context.database).filter(task=context.id)
    fence, handed_over = context.fence, None
    for outcome, former_fence, ended in history.order_by("-id").values_list(
        "outcome", "fence", "ended"
    ):
        if outcome not in _SAME_ATTEMPT:
            break
        fence = former_fence
        if outcome == Ended.SNOOZED:
            handed_over = ended
    # A copy of the database, or a new one, must not find the results of this one.
    name = connections[context.database].settings_dict["NAME"]
    celery_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{name}:{created}:{context.id}:{fence}")
    waited = None if handed_over is None else (now - handed_over).total_seconds()
    return Handover(str(celery_id), waited)


def _app_with_results() -> Celery:
    """Return the installed application, if other processes can read results that it stores."""
    app = installed_app()
    backend: Any = app.backend
    if isinstance(backend, DisabledBackend | RPCBackend):
        message = (
            "CeleryJob learns from Celery's result backend what became of a call, and this "
            "application has none that any process can read (rpc:// gives results to the sender "
            "only). Set result_backend to Redis, a database or the like."
        )
        raise ImproperlyConfigured(message)
    return app


def _send(app: Celery, name: str, options: dict[str, Any]) -> Any:
    task: Any = app.tasks.get(name)
    # One that is known here knows its own queue, serializer and signature.
    sent = app.send_task(name, **options) if task is None else task.apply_async(**options)
    if not isinstance(sent, EagerResult):
        # Celery would listen for the result on a connection of this thread, for ever.
        backend: Any = app.backend
        backend.remove_pending_result(sent)
    return sent


def _outcome(name: str, result: Any) -> dict[str, Any]:
    """Return what a call that has ended gave, or raise what it raised."""
    if result.state == states.SUCCESS:
        return {"celery_task_id": result.id, "result": result.result}
    error = result.result
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else result.state
    # Not the exception itself: what an error of a database means for a task is another
    # matter if it was not the task's database.
    failure = CeleryTaskFailed(f"{text} (Celery task {name}, {result.id})")
    if result.traceback:
        failure.add_note(f"In the Celery worker:\n{result.traceback}")
    raise failure
