"""Mixed load while consumers are killed at any moment: a short run of the benchmark ``chaos``."""

import json
import subprocess
import sys

import pytest

from tests.conftest import VENDOR
from tests.support.nursery import PROJECT_DIRECTORY

SECONDS = 10
RESTARTS = 2
# It gives the rest two minutes to end by itself.
SECONDS_MAX = 240
DATABASES = {"sqlite": "sqlite", "postgresql": "postgresql", "mysql": "mariadb"}

pytestmark = pytest.mark.timeout(SECONDS_MAX + 60)


def test_every_task_ends_once_and_effects_are_there_once_after_kills_and_restarts(request):
    restarts = 0
    if VENDOR != "sqlite":
        # The run starts its own; this skips, or fails, where that cannot be.
        request.getfixturevalue("private_server")
        restarts = RESTARTS

    options = ["--database", DATABASES[VENDOR], "--seconds", str(SECONDS)]
    run = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "chaos", "--json", *options],
        cwd=PROJECT_DIRECTORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with run:
        try:
            output, errors = run.communicate(timeout=SECONDS_MAX)
        except BaseException:
            # Then it ends what it has started; SIGKILL would leave consumers behind.
            run.terminate()
            raise

    assert run.returncode == 0, errors + output
    (figure,) = json.loads(output)["figures"]
    found = figure["details"]
    assert figure["value"] == 0, errors
    assert found["restarts"] == restarts
    assert found["kills"] > 0
    assert set(found["by status"]) == {"completed", "failed"}
    assert found["effects"] > 0
