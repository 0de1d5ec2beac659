"""Consumers, and other commands of the project, as processes that a test can kill.

A process works on the database of the test that starts it: its URL travels in
``FIREFLY_DATABASE``, the same way for every vendor.  It runs in a process group
of its own, so that :meth:`ManageProcess.close` ends its children with it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tests.support import nursery
from tests.support.databases import url_of_test_database
from tests.support.waiting import eventually

LINES_MAX = 100_000


class ManageProcess:
    """A ``manage.py`` command in a process of its own.

    Args:
        arguments: The command and its arguments, for example ``"migrate", "--no-input"``.
        database_url: Another database than that of the test.
        checkpoint: ``NAME:kill`` or ``NAME:stop``: what it does to itself, and where.
        jobs_settings: Merged into ``FIREFLY_JOBS``, for example ``{"LEASE_SECONDS": 2}``.
        environment: More variables.
        script: Another script than ``manage.py``, relative to the project's directory.

    Attributes:
        pid: Its process id, which is also that of its process group.
        lines: What it has printed so far to stdout and stderr.
    """

    def __init__(
        self,
        *arguments: str,
        database_url: str | None = None,
        checkpoint: str | None = None,
        jobs_settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        script: str = "manage.py",
    ) -> None:
        variables = os.environ | {
            "DJANGO_SETTINGS_MODULE": "testproject.settings",
            "FIREFLY_TESTING": "1",
            "FIREFLY_DATABASE": database_url or url_of_test_database(),
            "FIREFLY_JOBS_SETTINGS": json.dumps(dict(jobs_settings or {})),
            "PYTHONUNBUFFERED": "1",
        }
        if checkpoint is not None:
            variables["FIREFLY_CHECKPOINT"] = checkpoint
        self._process = nursery.start([script, *arguments], variables | dict(environment or {}))
        self.pid = self._process.pid
        self.lines: list[str] = []
        self._printed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def output(self) -> str:
        """What it has printed so far, as one text."""
        return "\n".join(self.lines)

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs or is stopped."""
        return self._process.poll()

    def wait_for_line(
        self, pattern: str, *, timeout_seconds: float = 20.0, after: int = 0
    ) -> re.Match[str]:
        """Return the match of the first printed line in which ``pattern`` is found.

        Args:
            pattern: A regular expression.
            timeout_seconds: How long to wait for it.
            after: Number of lines to leave out, as in ``after=len(consumer.lines)``.

        Raises:
            AssertionError: If it was not printed in time, or the process ended without it.
        """
        expression = re.compile(pattern)
        deadline = time.monotonic() + timeout_seconds
        looked_at = after
        with self._printed:
            while True:
                for line in self.lines[looked_at:]:
                    looked_at += 1
                    if match := expression.search(line):
                        return match
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    break
                # The end of the output is notified as well; a lost one costs a tenth of a second.
                self._printed.wait(min(left, 0.1))
        if not self._reader.is_alive():
            # The output ends a moment before the process does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        state = "is running" if self.returncode is None else f"ended with {self.returncode}"
        message = f"No line matched {pattern!r}; the process {state}. Output:\n{self.output}"
        raise AssertionError(message)

    def kill9(self) -> int:
        """Kill it with SIGKILL, wait for its end and return the exit code."""
        self._signal(signal.SIGKILL)
        return self._process.wait()

    def pause(self) -> None:
        """Stop it with SIGSTOP; it holds its connections and does nothing."""
        self._signal(signal.SIGSTOP)
        self.wait_until_stopped()

    def resume(self) -> None:
        """Let a stopped process go on."""
        self._signal(signal.SIGCONT)

    def wait_until_stopped(self, *, timeout_seconds: float = 20.0) -> None:
        """Wait until it is stopped, by :meth:`pause` or by a checkpoint of its own."""

        def is_stopped() -> None:
            assert self._process.is_stopped, self.output

        eventually(is_stopped, timeout_seconds=timeout_seconds)

    def terminate(self) -> None:
        """Ask it to end, with SIGTERM."""
        self._signal(signal.SIGTERM)

    def wait(self, *, timeout_seconds: float = 30.0) -> int:
        """Return the exit code once it has ended, negative for a signal.

        Raises:
            AssertionError: If it is still running after ``timeout_seconds``.
        """
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            message = f"Still running after {timeout_seconds} s. Output:\n{self.output}"
            raise AssertionError(message) from None
        # Its children may hold the pipe open, so the rest of the output is waited for briefly.
        self._reader.join(1.0)
        return code

    def close(self) -> None:
        """Kill it and its children, whatever state they are in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(5.0)
        self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def _read(self) -> None:
        for line in self._process.stdout:
            with self._printed:
                if len(self.lines) < LINES_MAX:
                    self.lines.append(line.rstrip("\n"))
                self._printed.notify_all()
        with self._printed:
            self._printed.notify_all()


class ConsumerProcess(ManageProcess):
    """``manage.py consume_tasks`` in a process of its own; arguments as for the command."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        super().__init__("consume_tasks", *arguments, **options)
