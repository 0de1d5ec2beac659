"""Import the modules that define tasks; never one because a row names it."""

from __future__ import annotations

from importlib import import_module

from django.utils.module_loading import autodiscover_modules

from .conf import get_settings


def import_tasks() -> None:
    """Import ``tasks.py`` of every installed app, and ``FIREFLY_JOBS["IMPORTS"]``."""
    autodiscover_modules("tasks")
    for name in get_settings().IMPORTS:
        import_module(name)
