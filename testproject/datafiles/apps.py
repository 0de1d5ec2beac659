"""The app."""

from django.apps import AppConfig


class DatafilesConfig(AppConfig):
    """Files of projects."""

    name = "testproject.datafiles"
    verbose_name = "Data files"
    default_auto_field = "django.db.models.BigAutoField"
