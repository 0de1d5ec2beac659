"""Whether a consumer makes way for a fresh process, and why.

To retire is not to stop: what runs gets all the time it needs, and a supervisor starts
the replacement meanwhile.  The dispatcher asks, and does what follows; others may ask it
to: the memory guard here, and whoever calls ``Consumer.retire``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from .consumer_options import count
from .control import Link
from .memory import MemoryGuard

logger = logging.getLogger("firefly_jobs")


class Retirement:
    """The wish that a consumer retires; a context manager around its run.

    Args:
        max_memory_mb: Ask once the process keeps more than so many megabytes.
        link: Where a supervisor is told.
        on_asked: Called when it is asked, on any thread.
    """

    def __init__(
        self, max_memory_mb: int | None, *, link: Link, on_asked: Callable[[], None]
    ) -> None:
        limit = count("max_memory_mb", max_memory_mb, None)
        self._guard = MemoryGuard(limit, on_exceeded=lambda: self.ask("max-memory"))
        self._link = link
        self._on_asked = on_asked
        self._reason: str | None = None
        self._is_announced = False

    def __enter__(self) -> Self:
        self._guard.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._guard.__exit__(kind, error, traceback)

    @property
    def is_asked(self) -> bool:
        """Whether the consumer is to retire."""
        return self._reason is not None

    def ask(self, reason: str) -> None:
        """Ask for it; the first reason counts."""
        if self._reason is None:
            self._reason = reason
            self._on_asked()

    def announce(self, consumer: int) -> None:
        """Say that no more rows are claimed, once."""
        if self._is_announced or self._reason is None:
            return
        self._is_announced = True
        logger.info("Consumer %s retires: %s", consumer, self._reason, extra={"consumer": consumer})
        self._link.retiring(self._reason)
