"""The test project's settings, with the benchmarks' own tables, task and no DEBUG."""

from testproject.settings import *  # noqa: F403 - settings are a flat namespace
from testproject.settings import INSTALLED_APPS as _APPS

INSTALLED_APPS = [*_APPS, "benchmarks"]
DEBUG = False
