"""Benchmarks run: those that write rows past the queue have to keep up with its columns."""

import json
import subprocess
import sys

import pytest

from tests.conftest import VENDOR
from tests.support.nursery import PROJECT_DIRECTORY

SECONDS_MAX = 120
DATABASES = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mariadb"}

pytestmark = pytest.mark.timeout(SECONDS_MAX + 30)


@pytest.mark.parametrize(
    ("name", "sizes", "figures"),
    [
        ("backlog", ["--rows", "20000", "--tasks", "50", "--rounds", "1"], {3, 4}),
        ("memory", ["--tasks", "50"], {2}),
    ],
)
def test_benchmark_of_small_size_gives_its_figures(name, sizes, figures):
    options = ["--json", "--database", DATABASES[VENDOR], *sizes]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", name, *options],
        cwd=PROJECT_DIRECTORY,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )

    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)["figures"]
    assert len(found) in figures
    assert {figure["database"] for figure in found} == {DATABASES[VENDOR]}
