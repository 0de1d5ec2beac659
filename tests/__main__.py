"""Run the tests once per database that answers: SQLite, PostgreSQL, MariaDB or MySQL.

What is left out, and the result of earlier runs, is told before a run starts,
so that the last lines are pytest's own.  With ``REQUIRE_DATABASES=1`` a database
that does not answer is a failure.  ``TEST_POSTGRESQL_URL`` and ``TEST_MYSQL_URL``
name other servers, or another database name for a second run at the same time.
Arguments go to pytest.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

from testproject.databases import database_from_url

# pytest's exit code for "no tests collected": with arguments such as '-m mysql' no failure.
NOTHING_TO_RUN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A database to run the tests on; ``url`` is ``None`` for files of the run's own."""

    name: str
    url: str | None


TARGETS = (
    Target(name="SQLite", url=None),
    Target(
        name="PostgreSQL",
        url=os.environ.get("TEST_POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:5432/firefly"),
    ),
    Target(
        name="MariaDB",
        url=os.environ.get("TEST_MYSQL_URL", "mysql://root@127.0.0.1:3306/firefly"),
    ),
)


def why_unreachable(target: Target) -> str | None:
    """Return the reason why no test can run on ``target``, or ``None`` if one can."""
    if target.url is None:
        return None
    settings = database_from_url(target.url)
    try:
        if settings["ENGINE"].endswith(".postgresql"):
            _connect_postgresql(settings)
        else:
            _connect_mysql(settings)
    except ImportError as error:
        return f"its driver is not installed ({error})"
    except Exception as error:  # noqa: BLE001 - each driver has errors of its own; all mean "no"
        return str(error).strip().splitlines()[0]
    return None


def run(target: Target, arguments: list[str]) -> int:
    """Run pytest on ``target`` and return its exit code."""
    environment = os.environ.copy()
    environment.pop("FIREFLY_DATABASE", None)
    if target.url is not None:
        environment["FIREFLY_DATABASE"] = target.url
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], env=environment, check=False
    ).returncode


def main(arguments: list[str]) -> int:
    """Run the tests on every target and return the first exit code that is not zero."""
    reachable, failures = [], []
    for target in TARGETS:
        reason = why_unreachable(target)
        if reason is None:
            reachable.append(target)
            continue
        print(f"Left out {target.name}: {reason}", flush=True)
        if os.environ.get("REQUIRE_DATABASES") == "1":
            failures.append(1)
    if failures:
        print("REQUIRE_DATABASES=1, so a database left out is a failure.", flush=True)
    for target in reachable:
        print(f"\n=== {target.name} ===", flush=True)
        code = run(target, arguments)
        if code and not (arguments and code == NOTHING_TO_RUN):
            failures.append(code)
        if target is not reachable[-1]:
            print(f"=== {target.name}: {'passed' if code == 0 else f'exit code {code}'} ===")
    return failures[0] if failures else 0


def _connect_postgresql(settings: dict[str, str]) -> None:
    import psycopg

    psycopg.connect(
        host=settings["HOST"],
        port=settings["PORT"],
        user=settings["USER"],
        password=settings["PASSWORD"] or None,
        dbname="postgres",
        connect_timeout=5,
    ).close()


def _connect_mysql(settings: dict[str, str]) -> None:
    import MySQLdb

    MySQLdb.connect(
        host=settings["HOST"],
        port=int(settings["PORT"]),
        user=settings["USER"],
        password=settings["PASSWORD"],
        connect_timeout=5,
    ).close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
