"""What every conformance test may ask for."""

from unittest import mock

import pytest

from firefly_jobs import declarations
from firefly_jobs.declarations import Declaration
from tests.conformance import tasks


@pytest.fixture
def jobs(settings):
    """Change ``FIREFLY_JOBS`` for this test."""

    def change(**values):
        settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, **values}

    return change


@pytest.fixture
def declare():
    """Declare schedules as modules do, for one test."""
    with mock.patch.object(declarations, "_declarations", {}):
        yield lambda name="nightly", call=None, **words: declarations._declarations.update(
            {name: Declaration(name=name, call=call or tasks.nothing.job, **words)}
        )
