"""The example app of the documentation: a package ``shop`` with one model and its table."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.db import connection
from django.test.utils import modify_settings

from firefly_jobs import declarations, job_registry, registry

PROJECT = Path(__file__).parent / "project"


@pytest.fixture
def shop(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the app of the examples; forget its tasks afterwards."""
    monkeypatch.syspath_prepend(PROJECT)
    for name in ("firefly_jobs.contrib.jobs", "firefly_jobs.contrib.celery.jobs"):
        import_module(name)  # its types stay known
    tables: list[dict[str, Any]] = [
        registry._tasks,
        job_registry._jobs,
        declarations._declarations,
    ]
    known = [dict(table) for table in tables]
    with modify_settings(INSTALLED_APPS={"append": "shop"}):
        order = import_module("shop.models").Order
        with connection.schema_editor() as editor:
            editor.create_model(order)
        try:
            yield
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(order)
            if admin.site.is_registered(order):
                admin.site.unregister(order)
            for table, before in zip(tables, known, strict=True):
                table.clear()
                table.update(before)
            for name in [name for name in sys.modules if name.startswith("shop.tasks")]:
                del sys.modules[name]
