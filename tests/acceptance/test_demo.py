"""The demo as a newcomer runs it: one command, a table, a database to look into."""

import io
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest

from testproject.codeindex.console import ProgressBar
from testproject.codeindex.library import library_directory, source_files
from testproject.codeindex.parsing import parse_file

PROJECT_DIRECTORY = Path(__file__).resolve().parents[2]
BROKEN = "test/tokenizedata/*"

# It makes a database of its own, so another server would change nothing.
pytestmark = pytest.mark.sqlite


def run_demo(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the demo as on a fresh machine: none of the tests' own environment."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("FIREFLY_") and name != "DJANGO_SETTINGS_MODULE"
    }
    return subprocess.run(
        [sys.executable, "-m", "testproject.demo", *arguments],
        cwd=PROJECT_DIRECTORY,
        env=environment | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=100,
    )


def numbers(output: str) -> dict[str, float]:
    """Return the table's numbers by label."""
    rows = re.findall(r"^  ([a-z ]+?) +([\d,]+(?:\.\d)?)$", output, re.MULTILINE)
    return {label: float(number.replace(",", "")) for label, number in rows}


def select(file: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(query).fetchall()


def test_demo_indexes_the_library_and_reports_it(tmp_path: Path) -> None:
    parsed = [parse_file(path) for path in islice(source_files(), 200)]

    demo = run_demo("--limit", "200", "--directory", str(tmp_path))

    assert demo.returncode == 0, demo.stdout + demo.stderr
    expected = {
        "files": 200,
        "classes": sum(len(file.classes) for file in parsed),
        "functions": sum(len(file.functions) for file in parsed),
        "lines": sum(file.lines for file in parsed),
        "tasks": 400,
        "completed": 400,
        "retried": 0,
        "failed": 0,
    }
    assert expected.items() <= numbers(demo.stdout).items()
    assert numbers(demo.stdout)["tasks per second"] > 0
    assert "100%  400 of 400" in demo.stdout
    assert demo.stderr == ""
    file = tmp_path / "demo.sqlite3"
    assert select(file, "SELECT count(*) FROM codeindex_function") == [(expected["functions"],)]
    assert select(file, "SELECT count(*) FROM codeindex_filemetadata") == [(200,)]
    assert select(file, "SELECT username, is_superuser FROM auth_user") == [("admin", 1)]
    assert f"FIREFLY_DATABASE=sqlite:///{file}" in demo.stdout
    assert "runserver" in demo.stdout
    assert "admin / admin, a user of this demo database only" in demo.stdout


def test_demo_names_the_files_that_failed_by_reason(tmp_path: Path) -> None:
    paths = list(source_files(BROKEN))
    if not paths:
        pytest.skip(f"{library_directory()} comes without its tests ({BROKEN})")
    broken = []
    for path in paths:
        try:
            parse_file(path)
        except SyntaxError:
            broken.append(path.relative_to(library_directory()).as_posix())

    demo = run_demo("--only", BROKEN, "--no-metadata", "--directory", str(tmp_path))

    assert demo.returncode == 0, demo.stdout + demo.stderr
    table = numbers(demo.stdout)
    assert table["failed"] == table["retried"] == len(broken) > 0
    assert table["completed"] == table["files"] == len(paths) - len(broken)
    assert "  1 x SyntaxError: unknown encoding: uft-8\n" in demo.stdout
    for name in broken:
        assert name in demo.stdout


def test_demo_starts_anew_and_deletes_nothing_else(tmp_path: Path) -> None:
    bystander = tmp_path / "db.sqlite3"
    bystander.write_text("mine")
    run_demo("--limit", "3", "--directory", str(tmp_path))

    demo = run_demo("--limit", "2", "--directory", str(tmp_path))

    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert select(tmp_path / "demo.sqlite3", "SELECT count(*) FROM codeindex_sourcefile") == [(2,)]
    assert bystander.read_text() == "mine"


def test_demo_keeps_what_is_in_a_database_it_is_given(tmp_path: Path) -> None:
    file = tmp_path / "mine.sqlite3"
    url = f"sqlite:///{file}"
    run_demo("--limit", "2", FIREFLY_DATABASE=url)

    demo = run_demo("--limit", "3", "--no-metadata", FIREFLY_DATABASE=url)

    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert numbers(demo.stdout)["tasks"] == 3
    assert select(file, "SELECT count(*) FROM firefly_jobs_taskmodel") == [(2 * 2 + 3,)]
    assert select(file, "SELECT count(*) FROM auth_user") == [(0,)]
    assert "createsuperuser" in demo.stdout


def test_demo_whose_consumer_dies_says_so_and_exits_with_1(tmp_path: Path) -> None:
    demo = run_demo(
        *("--limit", "5", "--directory", str(tmp_path)),
        FIREFLY_CHECKPOINT="claimed:kill",
    )

    assert demo.returncode == 1, demo.stdout + demo.stderr
    assert "The consumer ended with exit code -9." in demo.stderr
    assert "10 tasks have not ended." in demo.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_redrawn_in_place_on_a_terminal() -> None:
    out = Terminal()
    bar = ProgressBar(2_000, out=out)

    bar.show(1_000, "1 failed")
    bar.show(2_000)
    bar.close()

    first, second = out.getvalue().removeprefix("\r").split("\r")
    assert first == "[" + "#" * 15 + "." * 15 + "]  50%  1,000 of 2,000  0 s  1 failed"
    assert second.rstrip() == "[" + "#" * 30 + "] 100%  2,000 of 2,000  0 s"
    # Nothing of the longer line stays visible, and the next output has a line of its own.
    assert len(second) == len(first) + len("\n")


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end() -> None:
    out = io.StringIO()
    bar = ProgressBar(2, out=out)

    for done in (0, 1, 1, 2, 2):
        bar.show(done)
    bar.close()

    assert re.findall(r"\d of \d", out.getvalue()) == ["0 of 2", "2 of 2"]


def test_demo_says_when_no_file_matches(tmp_path: Path) -> None:
    demo = run_demo("--only", "no/such/*", "--directory", str(tmp_path))

    assert demo.returncode == 2
    assert "no file of the standard library matches 'no/such/*'" in demo.stderr
