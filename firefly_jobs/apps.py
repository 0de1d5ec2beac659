"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class FireflyJobsConfig(AppConfig):
    """Registers the system checks; imports nothing else of the project."""

    name = "firefly_jobs"
    verbose_name = "Firefly jobs"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks."""
        from . import checks  # noqa: F401, PLC0415 - registering is the import's effect
