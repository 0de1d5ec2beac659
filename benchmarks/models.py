"""Tables of the benchmarks; made by ``migrate --run-syncdb``, since nobody migrates them."""

from __future__ import annotations

from django.db import models


class Inserted(models.Model):
    """What the inserting task inserts."""

    value = models.IntegerField()

    objects: models.Manager[Inserted] = models.Manager()

    def __str__(self) -> str:
        return str(self.value)


class LoopJob(models.Model):
    """What the hand-written loop works on: the least a queue needs, indexed as ours."""

    queue = models.CharField(max_length=100, default="default")
    status = models.CharField(max_length=10, default="created")
    priority = models.SmallIntegerField(default=0)
    run_at = models.DateTimeField()
    params = models.TextField()
    returned = models.TextField(null=True)  # noqa: DJ001 - NULL means no result yet
    started = models.DateTimeField(null=True)
    completed = models.DateTimeField(null=True)

    objects: models.Manager[LoopJob] = models.Manager()

    def __str__(self) -> str:
        return f"job {self.pk}"


class ChaosEffect(models.Model):
    """One committed execution under chaos.  Nothing is unique, so that a double is visible."""

    task = models.BigIntegerField()

    objects: models.Manager[ChaosEffect] = models.Manager()

    def __str__(self) -> str:
        return f"effect of task {self.task}"
