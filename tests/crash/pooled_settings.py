"""Settings of a project whose web processes use Django's connection pool."""

from testproject.settings import *  # noqa: F403 - the same project
from testproject.settings import DATABASES

for entry in DATABASES.values():
    entry["OPTIONS"]["pool"] = True
