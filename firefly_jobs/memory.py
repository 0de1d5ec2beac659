"""How much memory a process keeps, and the thread that notices when it is too much.

Resident size is what the kernel counts when memory runs out, and Linux tells it of any
process in ``/proc/PID/statm`` (see proc(5)).  Elsewhere ``ps`` is asked.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

MEGABYTE = 1024 * 1024
CHECK_SECONDS = 1.0


def resident_bytes(pid: int) -> int | None:
    """Return the resident size of a process; ``None`` if nobody tells, or it has ended."""
    try:
        if Path("/proc/self/statm").exists():
            pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        told = subprocess.run(  # noqa: S603 - a fixed command and a number
            ["/bin/ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
        )
        return int(told.stdout) * 1024
    except (OSError, ValueError, IndexError, subprocess.CalledProcessError):
        return None


class MemoryGuard(threading.Thread):
    """Call ``on_exceeded`` once when this process has grown beyond a bound.

    A context manager: the thread runs inside the block, if there is a bound at all.

    Args:
        max_mb: The bound in megabytes of 1,048,576 bytes; ``None`` for no bound.
        on_exceeded: Called on the guard's thread.
    """

    def __init__(self, max_mb: int | None, *, on_exceeded: Callable[[], None]) -> None:
        super().__init__(name="firefly-memory", daemon=True)
        self._max_mb = max_mb
        self._on_exceeded = on_exceeded
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        if self._max_mb is not None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Look once a second."""
        bound = (self._max_mb or 0) * MEGABYTE
        while not self._stopping.wait(CHECK_SECONDS):
            if (resident_bytes(os.getpid()) or 0) > bound:
                self._on_exceeded()
                return
