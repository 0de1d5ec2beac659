"""The tests' own app."""

from django.apps import AppConfig


class TestAppConfig(AppConfig):
    """Registers the app under the label ``testapp``."""

    name = "tests.testapp"
    label = "testapp"
    default_auto_field = "django.db.models.BigAutoField"
