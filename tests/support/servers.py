"""Database servers of the tests' own, which a test may restart or kill.

They listen on a free port of 127.0.0.1 and live in a temporary directory.
Neither server runs as root, so as root they run as ``postgres`` and ``mysql``.
Nothing waits for a disk, but what was committed survives the end of the
process, also by SIGKILL; it is the machine that must not crash.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.consumer_process import ManageProcess
from tests.support.waiting import eventually

START_SECONDS = 60.0


class ServerMissingError(Exception):
    """The programs of this server, or its user, are not on this machine."""


class PrivateServer(ABC):
    """A server that belongs to this test run.  Entering it starts it, leaving it ends it.

    Attributes:
        port: Its port on 127.0.0.1, the same after a restart.
    """

    user: str
    immediate_signal: signal.Signals
    orderly_signal: signal.Signals

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="firefly-server-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._database_count = 0
        self.port = free_port()

    def __enter__(self) -> Self:
        if os.geteuid() == 0:
            try:
                entry = pwd.getpwnam(self.user)
            except KeyError:
                message = f"there is no user {self.user!r} to run it as"
                raise ServerMissingError(message) from None
            os.chown(self._directory, entry.pw_uid, entry.pw_gid)
        self._initialise()
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                **self._identity(),
            )

        def answers() -> None:
            assert self.is_running, self._log()
            try:
                self._execute("SELECT 1")
            except self._connection_error() as error:
                raise AssertionError(error) from error

        eventually(answers, timeout_seconds=START_SECONDS)

    def stop(self, *, immediate: bool = False) -> None:
        """End it and wait for its end.

        Args:
            immediate: As a crash does: no session is told, nothing is flushed.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(self.immediate_signal if immediate else self.orderly_signal)
        try:
            self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def restart(self, *, immediate: bool = False) -> None:
        """Stop it and start it again, on the same port with the same data."""
        self.stop(immediate=immediate)
        self.start()

    def create_database(self, *, is_migrated: bool = True, port: int | None = None) -> str:
        """Create a database of its own and return its URL.

        Args:
            is_migrated: Whether the project's tables are created in it.
            port: The port in the URL, if it is that of a proxy before this server.
        """
        self._database_count += 1
        name = f"firefly_{self._database_count}"
        self._execute(f"CREATE DATABASE {name}")
        # The alias "other" of the processes: since 6.1 Django's own checks connect to it.
        self._execute(f"CREATE DATABASE {name}_other")
        url = self._url(name, port=port or self.port)
        if is_migrated:
            arguments = ("migrate", "--no-input", "--verbosity=0")
            with ManageProcess(*arguments, database_url=url) as process:
                assert process.wait(timeout_seconds=START_SECONDS) == 0, process.output
        return url

    @abstractmethod
    def _initialise(self) -> None:
        """Create the data directory."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Return the command that runs the server in the foreground."""

    @abstractmethod
    def _url(self, name: str, *, port: int) -> str:
        """Return the URL of a database of this server."""

    @abstractmethod
    def _execute(self, statement: str) -> None:
        """Execute one statement on a connection of its own."""

    @abstractmethod
    def _connection_error(self) -> type[Exception]:
        """Return what the driver raises while the server does not answer."""

    def _identity(self) -> dict[str, Any]:
        if os.geteuid() != 0:
            return {}
        group = pwd.getpwnam(self.user).pw_gid
        return {"user": self.user, "group": group, "extra_groups": []}

    def _run(self, command: list[str]) -> None:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self._directory,
            check=False,
            **self._identity(),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _log(self) -> str:
        with suppress(OSError):
            return (self._directory / "server.log").read_text(errors="replace")
        return ""


class PrivatePostgreSQL(PrivateServer):
    """A PostgreSQL server whose zone is not UTC."""

    user = "postgres"
    immediate_signal = signal.SIGQUIT
    orderly_signal = signal.SIGINT

    def _initialise(self) -> None:
        self._programs = postgresql_programs()
        self._run(
            [
                str(self._programs / "initdb"),
                f"--pgdata={self._directory / 'data'}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
            ]
        )

    def _command(self) -> list[str]:
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "off",
            "timezone": "America/New_York",
        }
        settings = (f"--{name}={value}" for name, value in options.items())
        return [str(self._programs / "postgres"), "-D", str(self._directory / "data"), *settings]

    def _url(self, name: str, *, port: int) -> str:
        return f"postgresql://postgres@127.0.0.1:{port}/{name}"

    def _execute(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user="postgres", dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())

    def _connection_error(self) -> type[Exception]:
        import psycopg

        return psycopg.OperationalError


class PrivateMariaDB(PrivateServer):
    """A MariaDB server whose zone is not UTC."""

    user = "mysql"
    immediate_signal = signal.SIGKILL
    orderly_signal = signal.SIGTERM

    def _initialise(self) -> None:
        self._program = _program("mariadbd")
        self._run(
            [
                _program("mariadb-install-db"),
                "--no-defaults",
                f"--datadir={self._directory / 'data'}",
                "--auth-root-authentication-method=normal",
                "--skip-test-db",
            ]
        )

    def _command(self) -> list[str]:
        return [
            self._program,
            "--no-defaults",
            f"--datadir={self._directory / 'data'}",
            f"--socket={self._directory / 'server.sock'}",
            f"--pid-file={self._directory / 'server.pid'}",
            "--bind-address=127.0.0.1",
            f"--port={self.port}",
            # 0 would lose the last second's commits with the process; 2 needs the machine to crash.
            "--innodb-flush-log-at-trx-commit=2",
            "--default-time-zone=-05:00",
            "--innodb-rollback-on-timeout=1",
        ]

    def _url(self, name: str, *, port: int) -> str:
        return f"mysql://root@127.0.0.1:{port}/{name}"

    def _execute(self, statement: str) -> None:
        import MySQLdb

        connection = MySQLdb.connect(host="127.0.0.1", port=self.port, user="root")
        try:
            connection.query(statement)
        finally:
            connection.close()

    def _connection_error(self) -> type[Exception]:
        import MySQLdb

        error: type[Exception] = MySQLdb.OperationalError
        return error


def postgresql_programs() -> Path:
    """Return the directory of PostgreSQL's server programs, of the newest version there is.

    Raises:
        ServerMissingError: If there is none.
    """
    candidates = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name)
    )
    if pg_config := shutil.which("pg_config"):
        done = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False)
        candidates.insert(0, Path(done.stdout.strip()))
    for candidate in reversed(candidates):
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            return candidate
    message = "PostgreSQL's initdb and postgres are not on this machine"
    raise ServerMissingError(message)


def _program(name: str) -> str:
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        message = f"{name} is not on this machine"
        raise ServerMissingError(message)
    return path


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


SERVERS: dict[str, Callable[[], AbstractContextManager[PrivateServer]]] = {
    "postgresql": PrivatePostgreSQL,
    "mysql": PrivateMariaDB,
}
