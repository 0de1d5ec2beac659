"""Signals, and what a consumer does between being asked to stop and having stopped."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

logger = logging.getLogger("firefly_jobs")

# How long interrupted calls get to unwind before the process ends without them.
INTERRUPT_SECONDS = 2.0


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at the first SIGTERM or SIGINT; end the process at the second.

    Args:
        stop: Must be reentrant: it may interrupt this thread anywhere.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def asked_to_stop(number: int, _: FrameType | None) -> None:
        if asked:
            os._exit(1)
        asked.append(number)
        stop()

    former = {
        number: signal.signal(number, asked_to_stop) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
