"""The app's registration with Django."""

from django.apps import AppConfig


class CodeIndexConfig(AppConfig):
    """Keeps the index of source code."""

    name = "testproject.codeindex"
    label = "codeindex"
    verbose_name = "Code index"
    default_auto_field = "django.db.models.BigAutoField"
