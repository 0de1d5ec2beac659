"""Run the tests once per database that answers: SQLite, PostgreSQL, MariaDB or MySQL.

They run at the same time and are shown one after the other, so that the last
lines are pytest's own.  With ``REQUIRE_DATABASES=1`` a database
or a broker that does not answer is a failure.  ``TEST_POSTGRESQL_URL`` and ``TEST_MYSQL_URL``
name other servers, or another database name for a second run at the same time;
``TEST_REDIS_URL`` and ``TEST_RABBITMQ_URL`` other brokers.
Arguments go to pytest.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import IO

from testproject.databases import database_from_url
from tests.support import brokers

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


def start(
    target: Target, arguments: list[str], output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """Start pytest on ``target``; it prints to ``output``, or to our own."""
    environment = os.environ.copy()
    environment.pop("FIREFLY_DATABASE", None)
    if target.url is not None:
        environment["FIREFLY_DATABASE"] = target.url
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        env=environment,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
    )


def run_all(targets: list[Target], arguments: list[str]) -> list[int]:
    """Run pytest on all targets at the same time; show one after the other.

    Most of the time a test waits for a lease or a process, so together they take little
    longer than the slowest.
    """
    print(f"Running at the same time: {', '.join(target.name for target in targets)}.", flush=True)
    with ExitStack() as stack:
        outputs = [
            None if target is targets[0] else stack.enter_context(tempfile.TemporaryFile())
            for target in targets
        ]
        running = [
            start(target, arguments, output)
            for target, output in zip(targets, outputs, strict=True)
        ]
        codes = []
        for target, process, output in zip(targets, running, outputs, strict=True):
            print(f"\n=== {target.name} ===", flush=True)
            codes.append(process.wait())
            if output is not None:
                output.seek(0)
                shutil.copyfileobj(output, sys.stdout.buffer)
            if target is not targets[-1]:
                result = "passed" if codes[-1] == 0 else f"exit code {codes[-1]}"
                print(f"=== {target.name}: {result} ===", flush=True)
    return codes


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
    for broker in brokers.BROKERS:
        if reason := brokers.why_unreachable(broker):
            print(f"Left out what needs {broker.name}: {reason}", flush=True)
            if os.environ.get("REQUIRE_DATABASES") == "1":
                failures.append(1)
    if failures:
        print("REQUIRE_DATABASES=1, so what is left out is a failure.", flush=True)
    ignored = {0, NOTHING_TO_RUN} if arguments else {0}
    failures += [code for code in run_all(reachable, arguments) if code not in ignored]
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
