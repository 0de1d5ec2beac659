"""Run a function on a second database connection, at the same time as the test."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from django.db import connections

T = TypeVar("T")


class Concurrent(Generic[T]):
    """A call in a thread of its own, with connections of its own, started at once.

    ``Concurrent(function, *args)``; :meth:`result` waits for it.  The thread is a daemon, so a
    call that hangs fails its test and not the run.
    """

    def __init__(self, function: Callable[..., T], *args: object) -> None:
        self._function = function
        self._args = args
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the call has not returned yet."""
        return self._thread.is_alive()

    def result(self, *, timeout_seconds: float = 10.0) -> T:
        """Return what the call returned, or raise what it raised.

        Raises:
            AssertionError: If it is still running after ``timeout_seconds``.
        """
        self._thread.join(timeout_seconds)
        assert not self._thread.is_alive(), f"still running after {timeout_seconds} s"
        if self._error is not None:
            raise self._error
        return self._values[0]

    def _run(self) -> None:
        try:
            self._values.append(self._function(*self._args))
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._error = error
        finally:
            connections.close_all()
