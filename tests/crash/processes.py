"""A supervisor and its processes, as a test sees them from outside."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

from firefly_jobs.models import ConsumerModel, TaskModel
from tests.crash.conftest import describe_rows
from tests.support.consumer_process import ManageProcess
from tests.support.waiting import eventually

# Long enough that nothing in these tests can be explained by a lease that ran out.
LONG_LEASE = {
    "LEASE_SECONDS": 300.0,
    "IMPORTS": ["tests.crash.tasks", "tests.crash.process_tasks"],
}


def started(supervisor: ManageProcess) -> list[int]:
    """Return the process ids of all children so far, in order of their start."""
    lines = (re.search(r"Started process (\d+)", line) for line in list(supervisor.lines))
    return [int(match.group(1)) for match in lines if match]


def group(supervisor: ManageProcess) -> list[int]:
    """Return what is alive in the supervisor's process group, itself and helpers included."""
    alive = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (path / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == supervisor.pid and state != "Z":
            alive.append(int(path.name))
    return alive


def nothing_is_left(supervisor: ManageProcess, *, timeout_seconds: float = 10.0) -> None:
    """Wait until no process of the group is alive."""

    def is_over() -> None:
        assert group(supervisor) == [], supervisor.output

    eventually(is_over, timeout_seconds=timeout_seconds)


def consumers_are(count: int) -> None:
    """Wait until so many consumers are registered."""

    def are_registered() -> None:
        assert ConsumerModel.objects.count() == count, describe_rows()

    eventually(are_registered, timeout_seconds=20.0)


def holder_of(row: TaskModel) -> int:
    """Return the process id of the consumer that runs ``row``, waiting for one."""

    def running() -> ConsumerModel:
        row.refresh_from_db()
        assert row.status == "running", describe_rows()
        return ConsumerModel.objects.get(pk=row.consumer or 0)

    return int(eventually(running, timeout_seconds=20.0).name.rpartition(":")[2])


def kill9(pid: int) -> None:
    """Kill one process of a supervisor."""
    os.kill(pid, signal.SIGKILL)


def tcp_sockets(pid: int) -> set[str]:
    """Return the inodes of the TCP sockets that a process has open."""
    inodes = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        # What is a file may be closed meanwhile.
        with suppress(FileNotFoundError):
            if match := re.fullmatch(r"socket:\[(\d+)\]", str(path.readlink())):
                inodes.add(match.group(1))
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    lines = [line for table in tables if table.exists() for line in table.read_text().splitlines()]
    return inodes & {line.split()[9] for line in lines}
