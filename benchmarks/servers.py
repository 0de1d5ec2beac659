"""Databases to measure on: one per kind, made for the run and dropped after it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "firefly_benchmark"
KINDS = ("postgresql", "mariadb", "sqlite")


def environment(url: str) -> dict[str, str]:
    """Return the environment of a process that works on ``url``."""
    return {**os.environ, "FIREFLY_DATABASE": url, "DJANGO_SETTINGS_MODULE": "benchmarks.settings"}


def django(url: str, *arguments: str) -> None:
    """Run a management command on ``url``."""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "django", *arguments],
        env=environment(url),
        cwd=ROOT,
        check=True,
    )


@contextmanager
def database(kind: str) -> Iterator[str]:
    """Make an empty, migrated database of ``kind``; yield its URL; drop it."""
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{folder}/benchmark.sqlite3"
            django(url, "migrate", "--run-syncdb", "-v0", "--skip-checks")
            yield url
        return
    url, drop, create = _server(kind)
    _execute(kind, drop)
    _execute(kind, create)
    try:
        django(url, "migrate", "--run-syncdb", "-v0", "--skip-checks")
        yield url
    finally:
        _execute(kind, drop)


def _server(kind: str) -> tuple[str, str, str]:
    drop = f"DROP DATABASE IF EXISTS {NAME}"
    if kind == "postgresql":
        base = os.environ.get("FIREFLY_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432")
        return f"{base}/{NAME}", f"{drop} WITH (FORCE)", f"CREATE DATABASE {NAME}"
    base = os.environ.get("FIREFLY_MARIADB", "mysql://root@127.0.0.1:3306")
    return f"{base}/{NAME}", drop, f"CREATE DATABASE {NAME} CHARACTER SET utf8mb4"


def _execute(kind: str, statement: str) -> None:
    if kind == "postgresql":
        import psycopg  # noqa: PLC0415 - only what is measured has to be installed

        base = os.environ.get("FIREFLY_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432")
        with psycopg.connect(f"{base}/postgres", autocommit=True) as connection:
            connection.execute(statement)
        return
    import MySQLdb  # noqa: PLC0415 - only what is measured has to be installed

    connection = MySQLdb.connect(**mariadb_arguments())
    try:
        connection.cursor().execute(statement)
    finally:
        connection.close()


def mariadb_arguments() -> dict[str, object]:
    """Return the driver's connection arguments for the MariaDB server."""
    from urllib.parse import urlsplit  # noqa: PLC0415 - used here only

    parts = urlsplit(os.environ.get("FIREFLY_MARIADB", "mysql://root@127.0.0.1:3306"))
    return {
        "host": parts.hostname,
        "port": parts.port or 3306,
        "user": parts.username,
        "password": parts.password or "",
    }
