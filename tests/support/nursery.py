"""Start commands in processes forked from one that has imported Django already.

A run starts some 1,500 commands, and most of what each costs is importing libraries.  The
nursery is a process that has imported those which need no settings, and nothing of
this project: a child reads its environment, its settings and the project by itself.  It
starts no thread and opens no connection, so there is nothing that a fork could break.

This module is both sides: tests call :func:`start`, and ``python -m tests.support.nursery
FD`` is the nursery.  They talk over a socket: a request with the child's output, and
back come its process id, its stops and its end.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TextIO

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
MESSAGE_BYTES_MAX = 128 * 1024
IMPORTED = (
    *("asyncio", "concurrent.futures", "multiprocessing.spawn", "sqlite3", "zoneinfo"),
    *("asgiref.sync", "django", "django.core.management", "django.db.models", "django.urls"),
    *("django.core.checks", "django.core.handlers.wsgi", "django.core.mail", "django.forms"),
    *("django.core.cache", "django.core.paginator", "django.core.serializers", "django.http"),
    *("django.core.management.commands.check", "django.contrib.messages", "django.template"),
    *("django.core.files.storage", "django.middleware.csrf", "django.template.loader"),
    *("django.db.backends.sqlite3.base", "django.db.migrations.executor", "django.shortcuts"),
    *("django.db.backends.postgresql.base", "django.db.backends.mysql.base"),
    *("django.templatetags.static", "django.views.generic", "django.views.i18n"),
    *("django.contrib.staticfiles.finders", "django.utils.autoreload", "psycopg", "MySQLdb"),
)


# --- the side of the tests


class Child:
    """A process of the nursery, with what tests need of ``subprocess.Popen``.

    Attributes:
        pid: Its process id, and that of its process group.
        stdout: What it prints to stdout and stderr.
        returncode: Negative for a signal; ``None`` while it lives.
        is_stopped: Whether a signal has stopped it.
    """

    def __init__(self, pid: int, stdout: TextIO) -> None:
        self.pid = pid
        self.stdout = stdout
        self.returncode: int | None = None
        self.is_stopped = False
        self._changed = threading.Condition()

    def poll(self) -> int | None:
        """Return the exit code, ``None`` while it lives."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended; raise ``subprocess.TimeoutExpired``."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired("a child of the nursery", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        with self._changed:
            if self.returncode is None:
                os.kill(self.pid, number)

    def told(self, event: dict[str, Any]) -> None:
        """Take note of what the nursery says of this child."""
        with self._changed:
            self.returncode = event.get("returncode")
            self.is_stopped = event.get("stopped", False)
            self._changed.notify_all()


class _Nursery:
    """The running nursery of this process."""

    def __init__(self) -> None:
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.nursery", str(other.fileno())],
                cwd=PROJECT_DIRECTORY,
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._lock = threading.Lock()
        self._outputs: SimpleQueue[TextIO] = SimpleQueue()
        self._started: SimpleQueue[Child] = SimpleQueue()
        self._children: dict[int, Child] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        atexit.register(self._close)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
        request = json.dumps({"argv": list(arguments), "environment": dict(environment)})
        readable, writable = os.pipe()
        with self._lock:
            self._outputs.put(os.fdopen(readable, encoding="utf-8", errors="replace"))
            try:
                socket.send_fds(self._channel, [request.encode()], [writable])
            finally:
                os.close(writable)
            return self._started.get(timeout=30.0)

    def _close(self) -> None:
        self._channel.shutdown(socket.SHUT_RDWR)
        self._process.wait(10.0)
        self._listener.join(10.0)
        self._channel.close()

    def _listen(self) -> None:
        while message := self._channel.recv(MESSAGE_BYTES_MAX):
            event = json.loads(message)
            if "started" in event:
                child = Child(event["started"], self._outputs.get())
                self._children[child.pid] = child
                self._started.put(child)
            elif event.get("returncode") is not None:
                self._children.pop(event["pid"]).told(event)
            else:
                self._children[event["pid"]].told(event)
        # Whatever ended the nursery, nobody will tell of its children any more.
        for child in list(self._children.values()):
            child.told({"returncode": -signal.SIGKILL})


_nursery = cache(_Nursery)


def start(arguments: Sequence[str], environment: Mapping[str, str]) -> Child:
    """Start a script of the project as the leader of a session of its own.

    Args:
        arguments: The script, relative to the project's directory, and its arguments.
        environment: All of its variables.  Of those that the interpreter reads when it
            starts, ``PYTHONUNBUFFERED`` is taken as set, and ``PYTHONPATH`` and
            ``PYTHONDONTWRITEBYTECODE`` have their effect.
    """
    return _nursery().start(arguments, environment)


# --- the nursery's side


def _tell(channel: socket.socket, event: dict[str, Any]) -> None:
    # Without a reader the run is over, and what became of the child is nobody's concern.
    with contextlib.suppress(BrokenPipeError):
        channel.send(json.dumps(event).encode())


def _tell_of_children(channel: socket.socket) -> None:
    """Pass on what has become of the children since the last time."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if os.WIFSTOPPED(status):
            _tell(channel, {"pid": pid, "stopped": True})
        elif os.WIFCONTINUED(status):
            _tell(channel, {"pid": pid, "stopped": False})
        else:
            _tell(channel, {"pid": pid, "returncode": os.waitstatus_to_exitcode(status)})


def _serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork whenever asked to; return the request in the child, ``None`` at the end."""
    bell, striker = socket.socketpair()
    bell.setblocking(False)
    striker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(striker.fileno(), warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([channel, bell], [], [])
        if bell in ready:
            with contextlib.suppress(BlockingIOError):
                bell.recv(4096)
            _tell_of_children(channel)
        if channel not in ready:
            continue
        message, outputs, _, _ = socket.recv_fds(channel, MESSAGE_BYTES_MAX, 1)
        if not message:
            return None
        request: dict[str, Any] = json.loads(message)
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (bell, striker, channel):
                end.close()
            os.setsid()
            os.dup2(outputs[0], 1)
            os.dup2(outputs[0], 2)
            os.close(outputs[0])
            return request
        os.close(outputs[0])
        _tell(channel, {"started": pid})


def _become(request: dict[str, Any]) -> None:
    """Run the script as a fresh interpreter would."""
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = list(request["argv"])
    script = str(PROJECT_DIRECTORY / sys.argv[0])
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:1] = [str(PROJECT_DIRECTORY), *(place for place in places if place)]
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for stream in (sys.stdout, sys.stderr):
        assert hasattr(stream, "reconfigure")
        stream.reconfigure(write_through=True)
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    """Import, then serve until the tests have ended."""
    for name in IMPORTED:
        # A driver that is not installed, or what a Django version wants settings for.
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    channel = socket.socket(fileno=int(sys.argv[1]))
    request = _serve(channel)
    if request is not None:
        _become(request)


if __name__ == "__main__":
    main()
