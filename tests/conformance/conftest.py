"""What every conformance test may ask for."""

import pytest


@pytest.fixture
def jobs(settings):
    """Change ``FIREFLY_JOBS`` for this test."""

    def change(**values):
        settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, **values}

    return change
