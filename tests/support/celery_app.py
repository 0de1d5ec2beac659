"""The Celery applications of the tests, and what their workers can do.

Every run has a queue of its own name, so that runs at the same time do not meet on the
brokers.  In a worker, and in a consumer that a test starts, the environment tells which.
"""

import os
from pathlib import Path

from celery import Celery, shared_task
from kombu import Queue

from firefly_jobs.contrib.celery import install
from tests.support.brokers import REDIS
from tests.support.waiting import eventually

BROKER, QUEUE = "FIREFLY_CELERY_BROKER", "FIREFLY_CELERY_QUEUE"
# What a run leaves on a broker goes by itself.
EXPIRE_SECONDS = 600


def make_app(broker: str, queue: str) -> Celery:
    """Return an application for one broker and queue, its results in Redis."""
    app = Celery("tests", set_as_current=False)
    app.conf.update(
        broker_url=broker,
        result_backend=REDIS.url,
        result_expires=EXPIRE_SECONDS,
        task_default_queue=queue,
        task_queues=[Queue(queue, expires=EXPIRE_SECONDS)],
        # On RabbitMQ a queue that is not declared is made, and stays.
        task_create_missing_queues=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options={"global_keyprefix": queue} if "redis" in broker else {},
    )
    return app


@shared_task(name="tests.add")
def add(a: int, b: int = 0) -> int:
    """Add."""
    return a + b


@shared_task(name="tests.fail")
def fail(text: str) -> None:
    """Raise."""
    raise LookupError(text)


@shared_task(name="tests.note")
def note(path: str) -> str:
    """Add a line to a file, so that executions can be counted."""
    with Path(path).open("a") as file:
        file.write("x\n")
    return "noted"


@shared_task(name="tests.wait_for")
def wait_for(path: str) -> str:
    """Wait until a file is there."""

    def is_there() -> None:
        assert Path(path).exists()

    eventually(is_there, timeout_seconds=60.0)
    return "waited"


if BROKER in os.environ:
    app = make_app(os.environ[BROKER], os.environ[QUEUE])
    install(app)
