"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig, apps
from django.conf import settings


class FireflyJobsConfig(AppConfig):
    """Registers the system checks; imports nothing else of the project."""

    name = "firefly_jobs"
    verbose_name = "Firefly jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks, and give admins the jobs that a setting names."""
        from . import checks  # noqa: F401, PLC0415 - registering is the import's effect
        from .conf import SETTING  # noqa: PLC0415 - as above

        asks_for = getattr(settings, SETTING, {}).get("JOB_ADMIN_ACTIONS")
        if asks_for and apps.is_installed("django.contrib.admin"):
            from django.contrib import admin  # noqa: PLC0415 - not every project has it

            from .admin.jobs import apply_setting  # noqa: PLC0415 - as above

            # Others register theirs when this is called, now or before.
            admin.autodiscover()
            apply_setting()
