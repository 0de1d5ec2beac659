"""The demo: index the interpreter's standard library in the background.

``make demo``, or ``python -m testproject.demo``.  It works in a database file of
its own, ``demo.sqlite3``, which it deletes first.  If ``FIREFLY_DATABASE`` names
a database, that one is used instead: it is migrated and filled, nothing in it is
deleted, and no user is created.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import django
from django.contrib.auth import get_user_model
from django.core.management import call_command

from testproject.codeindex.console import ProgressBar, few, table
from testproject.codeindex.library import library_directory, source_files

if TYPE_CHECKING:
    from testproject.codeindex.rebuild import Progress, Rebuild

PROJECT_DIR = Path(__file__).resolve().parent.parent
DATABASE_FILE = "demo.sqlite3"
DATABASE_VARIABLE = "FIREFLY_DATABASE"
SQLITE_SUFFIXES = ("", "-wal", "-shm", "-journal")
# Name and password alike; the file holds nothing but this index.
ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDatabase:
    """The database of a run; ``file`` is ``None`` if it is not the demo's own."""

    url: str
    file: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit code: 0 if every task has ended.

    It is 1 if one has not, or if a consumer ended with an error.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    paths = list(islice(source_files(options.only), options.limit))
    if not paths:
        parser.error(f"no file of the standard library matches {options.only!r}")
    database = _choose_database(options.directory)
    _prepare(database)
    # Models can be imported only after the settings are read.
    from testproject.codeindex import rebuild  # noqa: PLC0415

    started = time.monotonic()
    run = rebuild.schedule_files(paths, metadata=options.metadata)
    print(
        f"Scheduled {run.scheduled:,} tasks in {time.monotonic() - started:.1f} s "
        f"for the standard library in {library_directory()}"
    )
    bar = ProgressBar(run.scheduled, out=sys.stdout)

    def show(progress: "Progress") -> None:
        bar.show(progress.ended, f"{progress.failed} failed" if progress.failed else "")

    trouble = None
    try:
        rebuild.consume(run, on_progress=show)
    except rebuild.ConsumerStoppedError as error:
        trouble = str(error)
    except KeyboardInterrupt:
        trouble = "Interrupted."
    seconds = bar.seconds
    bar.close()
    if trouble is not None:
        print(trouble, file=sys.stderr)
    is_finished = _report(run, seconds=seconds)
    _print_ways_in(database)
    return 0 if is_finished and trouble is None else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m testproject.demo",
        description="Index the interpreter's standard library with background tasks.",
        epilog=f"{DATABASE_VARIABLE}=URL uses that database instead of a file of the demo's own.",
    )
    parser.add_argument("--limit", type=_positive, metavar="N", help="index only the first N files")
    parser.add_argument(
        "--only",
        default="*",
        metavar="PATTERN",
        help="index only files whose path in the library matches, such as 'asyncio/*'",
    )
    parser.add_argument(
        "--metadata",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also read each file's size and time of change, in async tasks",
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=PROJECT_DIR,
        help=f"where {DATABASE_FILE} is made anew (default: beside manage.py)",
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        message = f"must be 1 or more, got {number}"
        raise argparse.ArgumentTypeError(message)
    return number


def _choose_database(directory: Path) -> DemoDatabase:
    if url := os.environ.get(DATABASE_VARIABLE):
        return DemoDatabase(url=url, file=None)
    file = directory.resolve() / DATABASE_FILE
    return DemoDatabase(url=f"sqlite:///{quote(str(file))}", file=file)


def _prepare(database: DemoDatabase) -> None:
    """Start Django on an empty, migrated database, with a superuser if it is our own."""
    # The consumer is told the same way.
    os.environ[DATABASE_VARIABLE] = database.url
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")
    if database.file is not None:
        for suffix in SQLITE_SUFFIXES:
            database.file.with_name(database.file.name + suffix).unlink(missing_ok=True)
    django.setup()
    call_command("migrate", verbosity=0)
    if database.file is not None:
        get_user_model().objects.create_superuser(username=ADMIN, password=ADMIN)


def _report(run: "Rebuild", *, seconds: float) -> bool:
    """Print what came of the run; return whether every task has ended."""
    from testproject.codeindex.models import index_totals  # noqa: PLC0415 - see main()

    progress = run.progress()
    print()
    print(table(index_totals().items()))
    print()
    print(
        table(
            {
                "tasks": progress.scheduled,
                "completed": progress.completed,
                "retried": run.retried(),
                "failed": progress.failed,
                "seconds": round(seconds, 1),
                "tasks per second": round(progress.ended / seconds, 1),
            }.items()
        )
    )
    failures = run.failures()
    if failures:
        print("\nFailed, by reason:")
    for group in failures:
        print(f"  {len(group.files)} x {group.reason}")
        print(f"      {few(group.files)}")
    if not progress.is_finished:
        print(f"\n{progress.scheduled - progress.ended:,} tasks have not ended.")
    return progress.is_finished


def _print_ways_in(database: DemoDatabase) -> None:
    setting = f"{DATABASE_VARIABLE}={shlex.quote(database.url)}"
    command = shlex.join([sys.executable, str(PROJECT_DIR / "manage.py"), "runserver"])
    print(f"\nTo look around:\n  {setting} {command}")
    print("  http://127.0.0.1:8000/        the index")
    print("  http://127.0.0.1:8000/admin/  the tasks", end="")
    if database.file is None:
        print(" (manage.py createsuperuser makes a user)")
    else:
        print(f": {ADMIN} / {ADMIN}, a user of this demo database only")


if __name__ == "__main__":
    sys.exit(main())
