"""The message brokers that the tests of the Celery bridge need: Redis and RabbitMQ."""

import os
import socket
from dataclasses import dataclass
from urllib.parse import urlsplit

CONNECT_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """A broker: its name, the marker of tests that need it, and its URL."""

    name: str
    marker: str
    url: str


REDIS = Broker(
    name="Redis",
    marker="redis",
    url=os.environ.get("TEST_REDIS_URL", "redis://127.0.0.1:6379/0"),
)
RABBITMQ = Broker(
    name="RabbitMQ",
    marker="rabbitmq",
    url=os.environ.get("TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:5672//"),
)
BROKERS = (REDIS, RABBITMQ)


def why_unreachable(broker: Broker) -> str | None:
    """Return the reason why a broker cannot be used, or ``None`` if something answers."""
    parts = urlsplit(broker.url)
    address = parts.hostname or "127.0.0.1", parts.port or 0
    try:
        socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None
