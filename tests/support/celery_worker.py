"""Celery workers, as processes that a test can kill; also the script that they run."""

import os
from typing import Any

from tests.support.celery_app import BROKER, QUEUE
from tests.support.consumer_process import ManageProcess

START_SECONDS = 60.0


class CeleryWorker(ManageProcess):
    """``celery worker`` in a process of its own, on the database of the test.

    Args:
        broker: Its URL.
        queue: The queue of this run.
        pool: Celery's word for how it runs tasks.
        options: As for :class:`ManageProcess`.
    """

    def __init__(self, broker: str, queue: str, *, pool: str = "solo", **options: Any) -> None:
        environment = {BROKER: broker, QUEUE: queue} | options.pop("environment", {})
        super().__init__(
            *("worker", f"--pool={pool}", "--concurrency=1", "--loglevel=INFO"),
            f"--hostname={queue}-{os.getpid()}",
            *("--without-gossip", "--without-mingle", "--without-heartbeat"),
            script="tests/support/celery_worker.py",
            environment=environment,
            **options,
        )

    def wait_until_ready(self) -> None:
        """Wait until it takes tasks."""
        self.wait_for_line(r"\bready\.", timeout_seconds=START_SECONDS)


if __name__ == "__main__":
    import sys

    from tests.support import celery_app

    celery_app.app.worker_main(sys.argv[1:])
