"""``enqueue``: how fast one task is scheduled, beside ``Model.objects.create`` of the same row.

Both write the same table, in autocommit.  The bare INSERT gets its values ready-made: what
``schedule`` adds is the check of the arguments, pickling, signing, and waking a consumer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from firefly_jobs.models import TaskModel

from . import tables, tasks
from .figures import Figure, Mark
from .run import Run, medians

MARKS = (Mark(of="ratio", at_least=0.85),)
# Rows in turn, so that a checkpoint or a busy moment of the machine meets both.
BLOCK = 50


def measure(run: Run) -> Iterator[Figure]:
    """Schedule and create in turns, a block of rows each."""
    values = _values(tasks.noop.row((0,), {}))
    yield run.figure(
        case="one schedule(), autocommit",
        unit="rows/s",
        reference_name="TaskModel.objects.create of the same row",
        marks=MARKS,
        **medians([_round(run.size("tasks"), values) for _ in range(run.rounds)]),
    )


def _values(row: TaskModel) -> dict[str, Any]:
    """Return the fields of a row as ``enqueue.build`` has set them."""
    kept = ("func_name", "queue", "priority", "not_before", "raw_params")
    retries = ("max_retries", "retry_delay", "retry")
    return {name: getattr(row, name) for name in kept + retries}


def _round(count: int, values: dict[str, Any]) -> tuple[float, float]:
    """Return rows per second of ``schedule`` and of ``create``."""
    tables.empty(tables.TASKS)
    tables.settle(tables.TASKS)
    ours = theirs = 0.0
    for first in range(0, count, BLOCK):
        numbers = range(first, min(first + BLOCK, count))
        theirs += _seconds(lambda _: TaskModel.objects.create(**values), numbers)
        ours += _seconds(tasks.noop.schedule, numbers)
    return count / ours, count / theirs


def _seconds(write: Callable[[int], object], numbers: range) -> float:
    begin = time.perf_counter()
    for number in numbers:
        write(number)
    return time.perf_counter() - begin
