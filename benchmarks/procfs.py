"""Memory and processor time of a process and its children, as ``/proc`` of Linux tells.

See proc(5): ``/proc/PID/status`` and ``/proc/PID/stat``.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Of the fields behind the closing bracket of the command's name, which may hold anything.
_USER_TIME, _SYSTEM_TIME = 11, 12


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        # A thread may end while we look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process and its living children have used."""
    return sum(_cpu_seconds(one) for one in tree(pid))


def resident_mb(pid: int) -> float:
    """Return the memory that a process and its children have in use, in MB."""
    return sum(_status_mb(one, "VmRSS") for one in tree(pid))


def peak_mb(pid: int) -> float:
    """Return the most memory that a process and its children have had in use, in MB."""
    return sum(_status_mb(one, "VmHWM") for one in tree(pid))


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])) / _TICKS


def _status_mb(pid: int, name: str) -> float:
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith(f"{name}:"):
            return int(text.split()[1]) * 1024 / 1e6
    message = f"/proc/{pid}/status has no {name}; a process that has ended has none"
    raise RuntimeError(message)
