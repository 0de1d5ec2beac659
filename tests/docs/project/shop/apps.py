"""The Django app of the examples."""

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """An app without migrations; the tests make its tables."""

    name = "shop"
    default_auto_field = "django.db.models.BigAutoField"
