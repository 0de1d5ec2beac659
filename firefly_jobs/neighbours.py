"""Which process a consumer is, so that others on the same machine can see that it has ended.

A heartbeat that is late may have many reasons; a process that is gone has one.  Linux tells it
of each process whose numbers mean the same (see proc(5), pid_namespaces(7)): one machine since
one start, one namespace of process numbers.  Nobody is told anything elsewhere, or about
processes elsewhere: then the lease decides.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

MARK_LENGTH_MAX = 120
# What a process that was killed may be for a while: dead, with a parent that has not asked.
_DEAD_STATES = ("Z", "X")
# When a process started that /proc shows its own user only: hidepid in proc(5), or systemd's
# ProtectProc.
_HIDDEN = "hidden"


def mark_of_this_process() -> str | None:
    """Return what tells this process from all others; ``None`` if nothing can."""
    machine = this_machine(os.getpid())
    started = _started(os.getpid())
    if machine is None or started in {None, _HIDDEN}:
        return None
    return f"{machine}/{os.getpid()}/{started}"


@lru_cache(maxsize=1)
def this_machine(process: int) -> str | None:
    """Return what the marks of all processes begin with that ``process``, this one, can see."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - follows the magic link
        # Another namespace's /proc would tell of other processes.
        is_ours = os.readlink("/proc/self") == str(process)  # noqa: PTH115 - as a text
    except OSError:
        return None
    return f"{boot}/{namespace}" if is_ours and boot else None


def has_ended(mark: str) -> bool:
    """Whether the process with this mark, of this machine, is certainly no more."""
    machine, _, rest = mark.rpartition("/")[0].rpartition("/")
    if machine != this_machine(os.getpid()) or not rest.isdecimal():
        return False
    return _started(int(rest)) not in {mark.rpartition("/")[2], _HIDDEN}


def _started(process: int) -> str | None:
    """Return when a process started, in ticks; ``None`` if there is none, or it is dead."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _HIDDEN if _is_there(process) else None
    # The second field is the name in brackets, which may contain anything.
    fields = told.rpartition(")")[2].split()
    return None if fields[0] in _DEAD_STATES else fields[19]


def _is_there(process: int) -> bool:
    """Whether there is a process with this number, also one that only the kernel will tell of."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # of another user
    return True
