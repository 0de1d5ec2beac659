"""Refer to a scheduled call by its id: read it, or wait for its end and its result.

A :class:`TaskReference` is a value: it can be compared, pickled, kept in a session and
handed to another process.  It knows the id and the database, and reads nothing until it is
asked.  The verbs of ``TaskModel`` with the same names do the same for the object at hand.
How the end of a row is noticed is the business of ``waiting``.
"""

from __future__ import annotations

import asyncio
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any

from asgiref.sync import sync_to_async

from .conf import get_settings, seconds
from .exceptions import TaskCancelled, TaskFailed
from .models import TaskModel
from .states import Status
from .waiting import Wait, read


@dataclass(frozen=True, slots=True)
class TaskReference:
    """A scheduled call, by its id.

    Args:
        id: Primary key of the row.
        using: Database alias; default ``FIREFLY_JOBS["DATABASE"]`` where it is used.
    """

    id: int
    _: KW_ONLY
    using: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.id, bool) or not isinstance(self.id, int):
            message = f"id must be a whole number, the id of a task, got {self.id!r}."
            raise TypeError(message)

    @property
    def _alias(self) -> str:
        return self.using or get_settings().DATABASE

    def get(self) -> TaskModel:
        """Return the row.

        Raises:
            DoesNotExist: ``TaskModel.DoesNotExist``, if there is none.
        """
        return read(self.id, using=self._alias)

    async def aget(self) -> TaskModel:
        """Return the row, as :meth:`get`."""
        return await sync_to_async(self.get)()

    def wait(self, timeout: float | timedelta | None = None) -> Any:
        """Wait until the call has ended, and return what it returned.

        Args:
            timeout: Seconds or ``timedelta``; zero looks once, ``None`` waits for ever.

        Raises:
            TaskFailed: If it failed.
            TaskCancelled: If it was cancelled.
            TimeoutError: If it has not ended in time; it is not cancelled by that.
            WaitInsideTransactionError: If it has not ended, and this thread has a transaction
                open on its database.
            DoesNotExist: ``TaskModel.DoesNotExist``, if there is no such row, or no more.
            PayloadError: If what it returned cannot be read.
        """
        return result_of(self.wait_finished(timeout))

    def wait_finished(self, timeout: float | timedelta | None = None) -> TaskModel:
        """Wait until the call has ended, however it did, and return the row.

        Args and what it raises are those of :meth:`wait`, without the first two and the last.
        """
        waiting = Wait(self.id, using=self._alias, timeout_seconds=timeout_seconds_of(timeout))
        if row := waiting.first_look():
            return row
        return waiting.sleep_until_ended()

    async def await_result(self, timeout: float | timedelta | None = None) -> Any:  # noqa: ASYNC109 - one word for both twins
        """Return what the call returned, as :meth:`wait`, without blocking the event loop."""
        # It may be a model instance, which is loaded when it is read.
        return await sync_to_async(result_of)(await self.await_finished(timeout))

    async def await_finished(self, timeout: float | timedelta | None = None) -> TaskModel:  # noqa: ASYNC109 - one word for both twins
        """Return the row once it has ended, as :meth:`wait_finished`; may be cancelled."""
        waiting = Wait(
            self.id,
            using=self._alias,
            timeout_seconds=timeout_seconds_of(timeout),
            loop=asyncio.get_running_loop(),
        )
        if row := await sync_to_async(waiting.first_look)():
            return row
        return await waiting.until_ended()


def result_of(row: TaskModel) -> Any:
    """Return what an ended call returned, or raise what became of it instead."""
    if row.status == Status.FAILED:
        raise TaskFailed(row.pk, row.func_name, row.error)
    if row.status == Status.CANCELLED:
        raise TaskCancelled(row.pk, row.func_name, row.error)
    return row.returned


def timeout_seconds_of(timeout: float | timedelta | None) -> float | None:
    """Return the seconds of a ``timeout`` argument; raise ``TypeError``, ``ValueError``."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float | timedelta):
        message = f"timeout must be seconds, a timedelta or None, got {timeout!r}."
        raise TypeError(message)
    number = float(seconds(timeout))
    if not number >= 0:
        message = f"timeout must be zero or more seconds, got {timeout!r}."
        raise ValueError(message)
    return number
