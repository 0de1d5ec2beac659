"""Which database a process or an alias of this process talks to, and over which port."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from urllib.parse import parse_qsl, urlsplit

from django.conf import settings
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from testproject.databases import database_from_url, url_from_database


def url_of_test_database(*, port: int | None = None) -> str:
    """Return the URL of the test database, for a process of its own.

    Args:
        port: Another port on loopback, for example that of a proxy.
    """
    entry = dict(connections["default"].settings_dict)
    options = dict(parse_qsl(urlsplit(settings.DATABASE_URL).query))
    if port is not None:
        entry |= _over(port)
        options |= _in_clear(entry)
    return url_from_database(entry, options=options)


@contextmanager
def private_alias(url: str, *, alias: str = "private") -> Iterator[str]:
    """Make the database of ``url`` an alias of this process, in every thread, for one block.

    It is open to a test even if the test may use no other database.
    """
    closed_to_tests = BaseDatabaseWrapper.ensure_connection

    def ensure_connection(wrapper: Any) -> None:
        # Django and pytest-django let a test reach only aliases that were known when it began.
        if wrapper.alias != alias:
            closed_to_tests(wrapper)
        elif wrapper.connection is None:
            with wrapper.wrap_database_errors:
                wrapper.connect()

    entry = {"default": {}, alias: database_from_url(url)}
    connections.settings[alias] = connections.configure_settings(entry)[alias]
    try:
        with mock.patch.object(BaseDatabaseWrapper, "ensure_connection", ensure_connection):
            yield alias
    finally:
        connections[alias].close()
        del connections[alias]
        del connections.settings[alias]


@contextmanager
def routed_over(port: int, *, alias: str = "default") -> Iterator[None]:
    """Let every new connection of ``alias`` in this process go over ``port`` of loopback."""
    # All threads share this dictionary.
    entry = connections.settings[alias]
    options = entry["OPTIONS"] | _in_clear(entry)
    with mock.patch.dict(entry, _over(port) | {"OPTIONS": options}):
        connections[alias].close()
        try:
            yield
        finally:
            connections[alias].close()


def _over(port: int) -> dict[str, str]:
    return {"HOST": "127.0.0.1", "PORT": str(port)}


def _in_clear(entry: dict[str, Any]) -> dict[str, str]:
    """Return the option that keeps TLS off, since a proxy reads what passes through it."""
    # MariaDB's client library asks for TLS only if it is told to.
    return {"sslmode": "disable"} if entry["ENGINE"].endswith(".postgresql") else {}
