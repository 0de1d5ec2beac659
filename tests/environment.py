"""Set the environment of a test run, before anything reads the settings.

Loaded by pytest as a plugin (``-p tests.environment``): pytest-django reads the
settings before it loads any conftest.  Without ``FIREFLY_DATABASE`` a run gets
SQLite files in a directory of its own, so that two runs never meet.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["FIREFLY_TESTING"] = "1"
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "testproject.settings")

if "FIREFLY_DATABASE" not in os.environ:
    directory = tempfile.mkdtemp(prefix="firefly-tests-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ["FIREFLY_DATABASE"] = f"sqlite:///{Path(directory) / 'firefly.sqlite3'}"
