"""Databases to measure on: one per kind, made for the run and dropped after it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.servers import SERVERS, PrivateServer, ServerMissingError

ROOT = Path(__file__).resolve().parent.parent
# Two runs at the same time do not meet.
NAME = f"firefly_benchmark_{os.getpid()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An empty, migrated database; ``server`` if this run started it and may restart it."""

    kind: str
    url: str
    server: PrivateServer | None = None


def environment(url: str) -> dict[str, str]:
    """Return what a process that works on ``url`` needs in its environment."""
    return {
        "FIREFLY_DATABASE": url,
        "DJANGO_SETTINGS_MODULE": "benchmarks.settings",
        # The benchmarks' settings, not those that tests have.
        "FIREFLY_TESTING": "0",
        "PYTHONWARNINGS": "ignore",
    }


@contextmanager
def database(kind: str) -> Iterator[Place]:
    """Make a database of ``kind`` on the server of this machine; drop it afterwards."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory(prefix="firefly-benchmark-") as folder:
            yield _migrated(Place(kind=kind, url=f"sqlite:///{folder}/benchmark.sqlite3"))
        return
    drop = f"DROP DATABASE IF EXISTS {NAME}"
    if kind == "postgresql":
        drop += " WITH (FORCE)"
    _execute(kind, drop)
    _execute(kind, f"CREATE DATABASE {NAME}{' CHARACTER SET utf8mb4' * (kind == 'mariadb')}")
    try:
        yield _migrated(Place(kind=kind, url=f"{_server(kind)}/{NAME}"))
    finally:
        _execute(kind, drop)


@contextmanager
def private_database(kind: str) -> Iterator[Place]:
    """Make a database on a server that is started for it; on the usual one if that cannot be."""
    with ExitStack() as stack:
        if kind != "sqlite":
            try:
                server = stack.enter_context(SERVERS[_vendor(kind)]())
            except ServerMissingError as error:
                print(f"No server of our own, so no restarts: {error}", file=sys.stderr)
            else:
                url = server.create_database(is_migrated=False)
                yield _migrated(Place(kind=kind, url=url, server=server))
                return
        yield stack.enter_context(database(kind))


def _migrated(place: Place) -> Place:
    # The benchmarks' own tables have no migrations.
    command = [sys.executable, "-m", "django", "migrate", "--run-syncdb", "-v0", "--skip-checks"]
    subprocess.run(command, env=os.environ | environment(place.url), cwd=ROOT, check=True)
    return place


def _vendor(kind: str) -> str:
    return {"mariadb": "mysql"}.get(kind, kind)


def _server(kind: str) -> str:
    if kind == "postgresql":
        return os.environ.get("FIREFLY_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432")
    return os.environ.get("FIREFLY_MARIADB", "mysql://root@127.0.0.1:3306")


def _execute(kind: str, statement: str) -> None:
    if kind == "postgresql":
        import psycopg  # noqa: PLC0415 - only what is measured has to be installed

        with psycopg.connect(f"{_server(kind)}/postgres", autocommit=True) as connection:
            connection.execute(statement.encode())
        return
    import MySQLdb  # noqa: PLC0415 - only what is measured has to be installed

    parts = urlsplit(_server(kind))
    connection = MySQLdb.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=parts.username,
        password=parts.password or "",
    )
    try:
        connection.query(statement)
    finally:
        connection.close()
