"""A consumer that finds a connection pool configured has no more connections than without."""

import pytest

from tests.crash import tasks
from tests.crash.conftest import consumer_id, effects, rows_ended, schedule, stops_in_order
from tests.crash.processes import consumers_are, started, tcp_sockets
from tests.support.waiting import eventually

pytestmark = pytest.mark.postgresql

# The dispatcher's, the heartbeat's, and the one that listens; and the lane's once it has run.
IDLE, BUSY = 3, 4


@pytest.fixture
def pooled(consume):
    """Return a function that starts a consumer of a project with a pool."""
    pytest.importorskip("psycopg_pool")
    environment = {"DJANGO_SETTINGS_MODULE": "tests.crash.pooled_settings"}
    return lambda *arguments: consume(*arguments, environment=environment)


def connections_are(pid, count):
    def are_open() -> None:
        assert len(tcp_sockets(pid)) == count

    eventually(are_open)


def test_consumer_leaves_the_pool_with_all_its_connections(pooled):
    consumer = pooled()
    consumer_id(consumer)

    connections_are(consumer.pid, IDLE)

    schedule(tasks.write, "key")
    rows_ended()
    assert effects() == {"key": 1}
    connections_are(consumer.pid, BUSY)
    stops_in_order(consumer)


def test_supervisor_and_its_processes_leave_the_pool_with_all_its_connections(pooled):
    supervisor = pooled("--processes", "2")
    consumers_are(2)

    for child in started(supervisor):
        connections_are(child, IDLE)
    connections_are(supervisor.pid, 0)

    stops_in_order(supervisor)
