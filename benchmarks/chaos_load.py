"""The load of ``chaos``: a thread that schedules a mix of tasks, and survives restarts."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from asgiref.sync import async_to_sync
from django.db import Error, connection
from django.utils import timezone

from firefly_jobs import schedule_many
from firefly_jobs.decorators import AsyncTask, BaseTask
from firefly_jobs.models import TaskModel

from . import chaos_tasks

PER_SECOND = 50.0
RETRY_SECONDS = 0.2
ETA_SECONDS_MAX = 5.0
# How many of a hundred are of which kind.
MIX: tuple[tuple[BaseTask[Any, Any], int], ...] = (
    (chaos_tasks.write, 35),
    (chaos_tasks.awrite, 20),
    (chaos_tasks.idle, 10),
    (chaos_tasks.aidle, 5),
    (chaos_tasks.fail, 10),
    (chaos_tasks.succeed_later, 10),
    (chaos_tasks.asucceed_later, 10),
)
ETA_SHARE = 0.15
# So often many short tasks come at once: what is at hand together can share a COMMIT.
BURST_SHARE = 0.02
BURST = 20


class Load(threading.Thread):
    """Schedule tasks until told to stop, at most ``most``.

    Attributes:
        acknowledged: Ids of the rows whose ``schedule`` came back.
        errors: How often it did not, because the database was away or busy.
    """

    def __init__(self, *, most: int) -> None:
        super().__init__(name="load", daemon=True)
        self._most = most
        self._ending = threading.Event()
        # A fixed seed: two runs differ in their kills, not in their load.
        self._random = random.Random("chaos")
        self.acknowledged: set[int] = set()
        self.errors = 0

    def run(self) -> None:
        """Schedule, with a pause after each."""
        pause = 1 / PER_SECOND
        while not self._ending.wait(pause) and len(self.acknowledged) < self._most:
            try:
                rows = self._schedule()
                self.acknowledged.update(row.pk for row in rows)
                pause = len(rows) / PER_SECOND
            except Error:
                # It may have been committed all the same: then there are more rows.
                self.errors += 1
                pause = RETRY_SECONDS
                connection.close()
        connection.close()

    def end(self) -> None:
        """Stop, and wait for what is under way."""
        self._ending.set()
        self.join()

    def _schedule(self) -> list[TaskModel]:
        if self._random.random() < BURST_SHARE:
            return schedule_many([chaos_tasks.write_at_once] * BURST)
        return [self._schedule_one()]

    def _schedule_one(self) -> TaskModel:
        tasks, weights = zip(*MIX, strict=True)
        (task,) = self._random.choices(tasks, weights)
        if self._random.random() < ETA_SHARE:
            ahead = timedelta(seconds=self._random.uniform(0, ETA_SECONDS_MAX))
            task = task.using(eta=timezone.now() + ahead)
        schedule: Callable[[], TaskModel] = task.schedule
        if isinstance(task, AsyncTask):
            schedule = async_to_sync(task.schedule)
        return schedule()
