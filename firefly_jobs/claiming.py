"""Decide which ranges of the claim index to claim from, and in which order.

A range is one queue at one priority.  Queues come in the order they were listed, then
priorities, highest first; within a range the database answers in order of ``run_at``.
Which priorities there are is read by repeated index look-ups and remembered for a
second, so that a claim is usually one statement; an empty claim reads them again.

On PostgreSQL rows that were claimed leave dead entries at the front of the index, and
while any transaction holds the horizon open nobody may clear them away.  A low-water
mark steps over them: each claim starts where the last one of its range ended, less a
margin.  What appears below the mark (a late commit, a release) is found by a claim that
came back short, and once a second by one without the mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any

from django.db import connections

from . import databases, lifecycle
from .attempts import Claim

ALL_QUEUES = "*"
REMEMBER_SECONDS = 1.0


class Claimer:
    """Claim due rows for one consumer.

    Args:
        queues: Names in strict order of preference; ``"*"`` stands for all others.
        using: Database alias.
    """

    def __init__(self, queues: Sequence[str], *, using: str) -> None:
        self._queues = list(queues)
        self._using = using
        self._database = databases.of(using)
        self._ranges: list[tuple[str, int]] = []
        self._ranges_read_at = float("-inf")
        self._marks: dict[tuple[str, int], Any] = {}
        self._unmarked_at = float("-inf")

    def claim(self, limit: int, *, consumer: int) -> list[Claim]:
        """Claim up to ``limit`` rows, best first; an empty list means nothing is due."""
        were_remembered = monotonic() - self._ranges_read_at < REMEMBER_SECONDS
        if not were_remembered:
            self._read_ranges()
        claims = self._claim_from_ranges(limit, consumer)
        if not claims and were_remembered:
            self._read_ranges()
            claims = self._claim_from_ranges(limit, consumer)
        return claims

    def forget(self) -> None:
        """Read everything anew at the next claim; for reconnecting."""
        self._ranges_read_at = self._unmarked_at = float("-inf")
        self._marks.clear()

    def _read_ranges(self) -> None:
        connection = connections[self._using]
        names = []
        for name in self._queues:
            found = self._database.queues(connection) if name == ALL_QUEUES else [name]
            names += [queue for queue in found if queue not in names]
        self._ranges = [
            (queue, priority)
            for queue in names
            for priority in self._database.priorities(connection, queue)
        ]
        self._ranges_read_at = monotonic()

    def _claim_from_ranges(self, limit: int, consumer: int) -> list[Claim]:
        claims: list[Claim] = []
        for queue, priority in self._ranges:
            claims += self._claim_from(queue, priority, limit - len(claims), consumer)
            if len(claims) >= limit:
                break
        return claims

    def _claim_from(self, queue: str, priority: int, limit: int, consumer: int) -> list[Claim]:
        mark = self._mark(queue, priority)
        claims = self._ask(queue, priority, limit, consumer, mark)
        if mark is not None and len(claims) < limit:
            self._marks.pop((queue, priority), None)
            claims += self._ask(queue, priority, limit - len(claims), consumer, None)
        if self._database.needs_low_water_mark and len(claims) == limit:
            self._marks[queue, priority] = claims[-1].run_at
        return claims

    def _mark(self, queue: str, priority: int) -> Any:
        if monotonic() - self._unmarked_at >= REMEMBER_SECONDS:
            self._unmarked_at = monotonic()
            self._marks.clear()
        return self._marks.get((queue, priority))

    def _ask(self, queue: str, priority: int, limit: int, consumer: int, mark: Any) -> list[Claim]:
        return lifecycle.claim(
            using=self._using,
            consumer=consumer,
            queue=queue,
            priority=priority,
            limit=limit,
            not_below=mark,
        )
