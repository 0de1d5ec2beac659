"""Fixtures for every test, and what runs on which database.

``tests/environment.py`` has set the environment by now.  A test that is true of
one vendor only is deselected on the others, not skipped: a skip means that
something is missing on this machine.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest
from django.conf import settings
from django.db import connections
from pytest_django.plugin import DjangoDbBlocker

from tests.support import flushing
from tests.support.brokers import BROKERS, Broker, why_unreachable
from tests.support.consumer_process import ConsumerProcess, ManageProcess
from tests.support.servers import SERVERS, PrivateServer, ServerMissingError
from tests.support.tcp_proxy import TcpProxy

VENDOR: str = settings.DATABASES["default"]["ENGINE"].rsplit(".", 1)[1].removesuffix("3")

# An example that talks to a database takes as long as the database does.
hypothesis.settings.register_profile("firefly", deadline=None, print_blob=True)
hypothesis.settings.load_profile("firefly")

flushing.install()

# True or false without a database server, so once is enough.
ONCE = {"unit", "docs", "typing"}

# Fixtures that start commands of the project.
PROCESSES = {"start_manage", "start_consumer"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what does not concern the database of this run."""
    for item in items:
        if PROCESSES & set(getattr(item, "fixturenames", ())):
            # Some of Django's checks connect to every alias when a command starts.
            item.add_marker(pytest.mark.django_db(transaction=True, databases=["default", "other"]))
    selected = [item for item in items if _concerns_this_database(item)]
    if len(selected) < len(items):
        kept = set(selected)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = selected


def _concerns_this_database(item: pytest.Item) -> bool:
    is_once = ONCE & set(_folders(item.path)) or item.get_closest_marker("once") is not None
    if VENDOR != "sqlite" and is_once:
        return False
    if VENDOR == "sqlite" and item.get_closest_marker("server") is not None:
        return False
    for broker in BROKERS:
        if item.get_closest_marker(broker.marker) is not None and _is_missing(broker):
            return False
    vendors = {
        vendor
        for vendor in ("sqlite", "postgresql", "mysql")
        if item.get_closest_marker(vendor) is not None
    }
    return not vendors or VENDOR in vendors


@cache
def _is_missing(broker: Broker) -> bool:
    return os.environ.get("REQUIRE_DATABASES") != "1" and why_unreachable(broker) is not None


def _folders(path: Path) -> tuple[str, ...]:
    tests = Path(__file__).parent
    return path.relative_to(tests).parts[:-1] if path.is_relative_to(tests) else ()


@pytest.fixture(scope="session")
def django_db_setup(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> None:
    """Give the test databases of PostgreSQL a zone other than UTC.

    Django sets its own sessions to UTC, so this is what every other connection sees.  A
    session of MariaDB gets its zone in the settings.
    """
    with django_db_blocker.unblock():
        for connection in connections.all():
            name = connection.settings_dict["NAME"]
            if connection.vendor != "postgresql" or not name.startswith("test_"):
                continue
            with connection.cursor() as cursor:
                quoted = connection.ops.quote_name(name)
                cursor.execute(f"ALTER DATABASE {quoted} SET timezone = 'America/New_York'")
            connection.close()


class StartManage(Protocol):
    """Starts a command of the project; options as for :class:`ManageProcess`."""

    def __call__(self, *arguments: str, **options: Any) -> ManageProcess: ...


class StartConsumer(Protocol):
    """Starts a consumer; options as for :class:`ManageProcess`."""

    def __call__(self, *arguments: str, **options: Any) -> ConsumerProcess: ...


@pytest.fixture
def start_manage(transactional_db: None) -> Iterator[StartManage]:
    """Return a function that starts ``manage.py`` on the test database; killed afterwards."""
    with ExitStack() as processes:

        def start(*arguments: str, **options: Any) -> ManageProcess:
            return processes.enter_context(ManageProcess(*arguments, **options))

        yield start


@pytest.fixture
def start_consumer(transactional_db: None) -> Iterator[StartConsumer]:
    """Return a function that starts a consumer on the test database; killed afterwards."""
    with ExitStack() as processes:

        def start(*arguments: str, **options: Any) -> ConsumerProcess:
            return processes.enter_context(ConsumerProcess(*arguments, **options))

        yield start


@pytest.fixture
def database_proxy() -> Iterator[TcpProxy]:
    """Return a proxy before the server of the test database.  For tests marked ``server``."""
    entry = connections["default"].settings_dict
    with TcpProxy(entry["HOST"], int(entry["PORT"])) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def _private_server() -> Iterator[PrivateServer]:
    with ExitStack() as stack:
        try:
            server = stack.enter_context(SERVERS[VENDOR]())
        except ServerMissingError as error:
            if os.environ.get("REQUIRE_DATABASES") == "1":
                raise
            pytest.skip(str(error))
        yield server


@pytest.fixture
def private_server(_private_server: PrivateServer) -> PrivateServer:
    """Return a running server of this run's vendor that the test may restart or kill.

    For tests marked ``server``.  Its databases come from ``create_database()``.
    """
    if not _private_server.is_running:
        _private_server.start()
    return _private_server
