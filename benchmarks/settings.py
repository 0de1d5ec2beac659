"""The test project's settings, with the benchmarks' own tables and tasks and no DEBUG.

``FIREFLY_JOBS_SETTINGS`` (JSON) is ``FIREFLY_JOBS``.
"""

import json
import os

from testproject.settings import *  # noqa: F403 - settings are a flat namespace
from testproject.settings import INSTALLED_APPS as _APPS

INSTALLED_APPS = [*_APPS, "benchmarks"]
DEBUG = False
FIREFLY_JOBS = json.loads(os.environ.get("FIREFLY_JOBS_SETTINGS", "{}"))
