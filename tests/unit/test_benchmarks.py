"""What benchmarks print: marks, lines, JSON and the table of the documentation."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.catalogue import BENCHMARKS, KINDS
from benchmarks.figures import Figure, Mark, as_markdown, number, share
from tests.support.nursery import PROJECT_DIRECTORY

DRAIN = Figure(
    benchmark="drain",
    database="postgresql",
    case="no-op, 2 processes, 1 thread",
    unit="tasks/s",
    value=24_000.4,
    reference=40_000.0,
    reference_name="SQL loop",
    marks=(Mark(of="ratio", at_least=0.6),),
    samples=(23_000.0, 24_000.4, 25_000.0),
    details={"kills": 3},
)


@pytest.mark.parametrize(
    ("mark", "measured", "is_met"),
    [
        (Mark(at_least=10), 10, True),
        (Mark(at_least=10), 9.9, False),
        (Mark(below=3), 2.9, True),
        (Mark(below=3), 3, False),
        (Mark(at_least=1, below=3), 2, True),
        (Mark(at_least=1, below=3), 0.5, False),
        (Mark(of="ratio", at_least=0.6), None, False),
    ],
)
def test_mark_is_met_within_its_bounds(mark, measured, is_met):
    assert mark.is_met(measured) is is_met


def test_mark_of_a_ratio_is_shown_in_percent():
    assert Mark(of="ratio", at_least=0.6).text == "≥ 60%"
    assert Mark(below=0.5).text == "< 0.5"
    assert Mark(at_least=2_500).text == "≥ 2,500"


@pytest.mark.parametrize(
    ("value", "text"),
    [(12_345.6, "12,346"), (123.4, "123"), (12.34, "12.3"), (1.234, "1.23"), (2.0, "2"), (0, "0")],
)
def test_number_has_the_digits_that_tell_something(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("ratio", "text"), [(0.6, "60%"), (9.9, "990%"), (46.4, "x 46")])
def test_ratio_is_in_percent_as_long_as_one_can_read_that(ratio, text):
    assert share(ratio) == text


def test_figure_without_a_mark_neither_reaches_nor_misses_it():
    figure = Figure(benchmark="bulk", database="sqlite", case="all", unit="rows/s", value=1.0)
    assert figure.is_reached is None
    assert figure.ratio is None


def test_figure_reaches_its_marks_only_together():
    marks = (Mark(of="ratio", at_least=0.6), Mark(at_least=30_000))
    figure = replace(DRAIN, marks=marks)
    assert DRAIN.is_reached is True
    assert figure.is_reached is False


def test_figure_survives_json():
    assert Figure.from_json(json.loads(json.dumps(DRAIN.as_json()))) == DRAIN


def test_table_is_markdown_with_a_row_per_figure():
    heading, line, row = as_markdown([DRAIN]).splitlines()
    assert heading.count("|") == line.count("|") == row.count("|")
    assert row == (
        "| drain | postgresql | no-op, 2 processes, 1 thread | 24,000 tasks/s | 40,000 tasks/s "
        "| 60% | ≥ 60% | yes |"
    )


def test_table_is_made_of_files_and_the_last_one_counts(tmp_path: Path):
    machine = {
        **dict.fromkeys(("date", "processor", "cores", "memory", "system"), "?"),
        "python": "3.11.9",
        "django": "5.2",
    }
    files = []
    for name, value in (("first", 1_000.0), ("second", 32_000.0)):
        figure = replace(DRAIN, value=value)
        files.append(tmp_path / f"{name}.json")
        found = {
            "machine": machine,
            "databases": {"postgresql": {"server": "15.4", "driver": "psycopg 3.2", "fsync": "on"}},
            "figures": [figure.as_json()],
        }
        files[-1].write_text(json.dumps(found), encoding="utf-8")

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "table", *map(str, files)],
        cwd=PROJECT_DIRECTORY,
        capture_output=True,
        text=True,
        check=True,
    )

    assert "- postgresql: 15.4, psycopg 3.2; `fsync=on`." in done.stdout
    assert "32,000 tasks/s" in done.stdout
    assert "1,000 tasks/s" not in done.stdout


def test_names_of_benchmarks_are_unique_and_their_modules_are_there():
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len(set(names)) == len(names)
    for benchmark in BENCHMARKS:
        assert (PROJECT_DIRECTORY / "benchmarks" / f"{benchmark.module}.py").exists()
        assert set(benchmark.databases) <= set(KINDS)
