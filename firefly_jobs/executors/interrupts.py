"""Interrupt a sync call from another thread, and nothing but the call.

``PyThreadState_SetAsyncExc`` raises an exception at the target thread's next bytecode,
wherever that is.  Inside our own bookkeeping it would leave a lock taken or an outcome
unwritten, so it is only sent while a call is under way.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from firefly_jobs.exceptions import StopRequested

_Result = TypeVar("_Result")


class Interrupt:
    """The calls of one thread, as far as they may be interrupted."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._thread: int | None = None
        self._of: Any = None

    @property
    def is_call_running(self) -> bool:
        """Whether a call is under way."""
        return self._thread is not None

    def run(self, call: Callable[[], _Result], *, of: Any = None) -> _Result:
        """Return what ``call`` returns; meanwhile :meth:`interrupt` reaches it.

        Args:
            call: What may be interrupted.
            of: Tells this call from the others of the thread.

        Raises:
            BaseException: What it was interrupted with, at the latest just before it could
                be no more.
        """
        with self._guard:
            self._thread, self._of = threading.get_ident(), of
        try:
            return call()
        finally:
            # An exception that was sent before is raised here at the latest: both sides
            # hold the lock, and letting go of it is followed by more bytecode.
            with self._guard:
                self._thread = self._of = None

    def interrupt(
        self,
        error: type[BaseException] = StopRequested,
        *,
        of: Any = None,
        also: Callable[[], Callable[[], object]] | None = None,
    ) -> bool:
        """Raise ``error`` inside the running call; return whether one runs.

        It arrives with the next bytecode: a call blocked in C code sees it only when it
        comes back.  The consumer does not wait for that (see ``Consumer``).

        Args:
            error: What to raise; a class, since Python takes nothing else from afar.
            of: Interrupt only that call of :meth:`run`; the thread may have gone on.
            also: Called if one runs, before it is interrupted: looks at what it does at this
                moment, and returns what ends that, which is called afterwards.
        """
        with self._guard:
            if self._thread is None or (of is not None and of is not self._of):
                return False
            end = None if also is None else also()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread), ctypes.py_object(error)
            )
            if end is not None:
                end()
        return True
