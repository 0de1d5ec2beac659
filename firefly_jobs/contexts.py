"""The running call's view of itself: :func:`current_task`."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, overload

from .attempts import Claim
from .words import HasWords, Words

if TYPE_CHECKING:
    from .decorators import BaseTask
    from .schedule_models import ScheduleModel
    from .workflow_models import WorkflowModel

_Default = TypeVar("_Default")


@dataclass(slots=True, eq=False)
class TaskContext(HasWords):
    """What a running call can ask about itself; see :func:`current_task`.

    Attributes:
        database: Alias of the database that holds the row.
        cache: A dictionary for the length of this attempt.
    """

    task: BaseTask[Any, Any]
    _claim: Claim
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    database: str = "default"
    _cache: dict[Any, Any] | None = field(default=None, init=False)
    _words: Words | None = field(default=None, init=False)

    @property
    def id(self) -> int:
        """Primary key of the row."""
        return self._claim.id

    @property
    def func_name(self) -> str:
        """The name the row carries; an alias if the function was moved."""
        return self._claim.func_name

    @property
    def queue(self) -> str:
        """The queue it was claimed from."""
        return self._claim.queue

    @property
    def attempt(self) -> int:
        """Number of this attempt, counted from 1."""
        return self._claim.attempt

    @property
    def fence(self) -> int:
        """How often the row has been claimed; unique per attempt, so usable as a token."""
        return self._claim.fence

    @property
    def workflow(self) -> WorkflowModel | None:
        """The workflow that this call is a step of; read from the database when asked."""
        if self._claim.workflow is None:
            return None
        from .workflow_models import WorkflowModel  # noqa: PLC0415 - see ARCHITECTURE layers

        return WorkflowModel.objects.using(self.database).get(pk=self._claim.workflow)

    @property
    def schedule(self) -> ScheduleModel | None:
        """The schedule that has started this call; read from the database when asked."""
        from .schedule_models import ScheduleModel  # noqa: PLC0415 - as above

        return (
            ScheduleModel.objects.using(self.database).filter(pk=self._claim.schedule or 0).first()
        )

    @property
    def cancelled(self) -> bool:
        """Whether somebody wishes that it ends: its workflow was cancelled, or has failed.

        Asks the database; a call that takes long asks now and then, and ends early.
        """
        run = self.workflow
        return run is not None and (run.is_cancelled or bool(run.error))

    @property
    def cache(self) -> dict[Any, Any]:
        """A dictionary that lives as long as this attempt."""
        if self._cache is None:
            self._cache = {}
        return self._cache

    def cached(self, key: Any, load: Callable[[], Any]) -> Any:
        """Return ``cache[key]``; call ``load()`` for it the first time."""
        if key not in self.cache:
            self.cache[key] = load()
        return self.cache[key]


_current: ContextVar[TaskContext] = ContextVar("firefly_jobs_current_task")
_REQUIRED: Any = object()


@overload
def current_task() -> TaskContext: ...
@overload
def current_task(default: _Default) -> TaskContext | _Default: ...
def current_task(default: Any = _REQUIRED) -> Any:
    """Return the context of the running call.

    Args:
        default: What to return outside of a task.

    Raises:
        LookupError: Outside of a task, if no ``default`` was given.
    """
    if default is not _REQUIRED:
        return _current.get(default)
    try:
        return _current.get()
    except LookupError:
        message = (
            "current_task() was called outside of a running task. Pass a default, "
            "current_task(None), where code runs in both."
        )
        raise LookupError(message) from None


def enter_context(context: TaskContext) -> None:
    """Make ``context`` the current one, in the calling thread's or coroutine's own context."""
    _current.set(context)
