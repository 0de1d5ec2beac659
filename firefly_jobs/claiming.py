"""Decide which ranges of the claim index to claim from, and in which order.

A range is one queue at one priority.  Queues come in the order they were listed, then
priorities, highest first; within a range the database answers in order of ``run_at``.
Which priorities there are, of those that the consumer serves, is read by repeated index
look-ups and remembered for a second, so that a claim is usually one statement; an empty
claim reads them again.  A consumer of all priorities that wakes up tries the highest of
its first queue before it reads anything, where the database can find that one within the
claim.

On PostgreSQL rows that were claimed leave dead entries at the front of the index, and
while any transaction holds the horizon open nobody may clear them away.  A low-water
mark steps over them: each claim starts where the last one of its range ended, less a
margin.  What appears below the mark (a late commit, a release) is found by a claim that
came back short, and once a second by one without the mark; more rarely where that is
slow, so that it takes a twentieth of the time at most.  Rows that a limit held back come
back below the mark as well: while such are about, it is as often as that share allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal, get_args

from django.db import connections

from . import admission, databases, dependencies, lifecycle
from .attempts import Claim
from .consumer_options import ALL_QUEUES, check_word
from .databases import ALL_BANDS
from .priorities import Band

QueueOrder = Literal["strict", "fair"]

REMEMBER_SECONDS = 1.0
# How often more is claimed in place of what limits refused, before signals are looked at.
ROUNDS_MAX = 50
# So long after a limited row was claimed others of its kind are taken to be about.
LIMITED_SECONDS = 60.0
# A claim without the mark reads all dead entries: 0.3 s where 300,000 rows were claimed
# under an old snapshot.
UNMARKED_SHARE, UNMARKED_SECONDS_MAX = 20.0, 15.0


class Claimer:
    """Claim due rows for one consumer.

    Args:
        queues: Names in strict order of preference; ``"*"`` stands for all others.
        using: Database alias.
        order: ``"strict"``: the queues in the order given, at every claim.  ``"fair"``: every
            claim starts one queue further on.
        bands: The priorities to claim from, highest first; all of them by default.
    """

    def __init__(
        self,
        queues: Sequence[str],
        *,
        using: str,
        order: QueueOrder = "strict",
        bands: Sequence[Band] = ALL_BANDS,
    ) -> None:
        check_word("queue_order", order, get_args(QueueOrder))
        self._queues = list(queues)
        self._bands = bands
        self._order = order
        self._turn = 0
        self._using = using
        self._database = databases.of(using)
        self._ranges: list[tuple[str, int]] = []
        self._ranges_read_at = float("-inf")
        self._marks: dict[tuple[str, int], Any] = {}
        self._next_unmarked_at = self._affordable_at = self._limited_until = float("-inf")
        self._was_empty = False
        self.has_given_up = False

    def claim(self, limit: int, *, consumer: int) -> list[Claim]:
        """Claim up to ``limit`` rows that may start, best first.

        An empty list means that nothing is due; or, if ``has_given_up``, that limits refused
        so many that others should have a turn.
        """
        admitted: list[Claim] = []
        for _ in range(ROUNDS_MAX):
            claims = self._claim(limit - len(admitted), consumer)
            if not any(claim.is_limited for claim in claims):
                self.has_given_up = False
                return [*admitted, *claims]
            self._limited_until = monotonic() + LIMITED_SECONDS
            passed = admission.admit(claims, using=self._using)
            if len(passed) < len(claims):
                # Those wait again, and their workflows may have stopped since the claim.
                refused = set(claims).difference(passed)
                dependencies.finish_later((one.workflow for one in refused), using=self._using)
            admitted += passed
            if len(passed) == len(claims) or len(admitted) >= limit:
                break
        self.has_given_up = not admitted
        return admitted

    def _claim(self, limit: int, consumer: int) -> list[Claim]:
        if claims := self._claim_on_waking(limit, consumer):
            return claims
        were_remembered = monotonic() - self._ranges_read_at < REMEMBER_SECONDS
        if not were_remembered:
            self._read_ranges()
        claims = self._claim_from_ranges(limit, consumer)
        if not claims and were_remembered:
            self._read_ranges()
            claims = self._claim_from_ranges(limit, consumer)
        self._was_empty = not claims
        return claims

    def _claim_on_waking(self, limit: int, consumer: int) -> list[Claim]:
        # Only after a pause: a claim without a mark is not for draining a queue.
        queue, was_empty, self._was_empty = self._queues[0], self._was_empty, False
        if not was_empty or queue == ALL_QUEUES or not self._database.can_claim_highest:
            return []
        if self._bands is not ALL_BANDS:
            return []  # the highest of the queue may be another consumer's
        return self._ask(queue, None, limit, consumer, None)

    def seconds_until_due(self) -> float | None:
        """Return how long the first row has to wait, right after a claim that found nothing.

        Such a claim has just read which ranges there are.
        """
        connection = connections[self._using]
        waits = (self._database.seconds_until_due(connection, *item) for item in self._ranges)
        return min((wait for wait in waits if wait is not None), default=None)

    def forget(self) -> None:
        """Read everything anew at the next claim; for reconnecting."""
        self._ranges_read_at = self._next_unmarked_at = float("-inf")
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
            for priority in self._database.priorities(connection, queue, self._bands)
        ]
        self._ranges_read_at = monotonic()

    def _claim_from_ranges(self, limit: int, consumer: int) -> list[Claim]:
        claims: list[Claim] = []
        for queue, priority in self._ordered_ranges():
            claims += self._claim_from(queue, priority, limit - len(claims), consumer)
            if len(claims) >= limit:
                break
        return claims

    def _ordered_ranges(self) -> list[tuple[str, int]]:
        if self._order == "strict":
            return self._ranges
        names = list(dict.fromkeys(queue for queue, _ in self._ranges))
        first = self._turn % max(len(names), 1)
        self._turn += 1
        place = {name: (n - first) % len(names) for n, name in enumerate(names)}
        # Stable, so priorities stay in order within their queue.
        return sorted(self._ranges, key=lambda item: place[item[0]])

    def _claim_from(self, queue: str, priority: int, limit: int, consumer: int) -> list[Claim]:
        mark = self._mark(queue, priority)
        if mark is None:
            claims = self._ask_without_mark(queue, priority, limit, consumer)
        else:
            claims = self._ask(queue, priority, limit, consumer, mark)
        if mark is not None and len(claims) < limit:
            self._marks.pop((queue, priority), None)
            claims += self._ask_without_mark(queue, priority, limit - len(claims), consumer)
        if self._database.needs_low_water_mark and len(claims) == limit:
            self._marks[queue, priority] = claims[-1].run_at
        return claims

    def _mark(self, queue: str, priority: int) -> Any:
        now = monotonic()
        is_wanted = now < self._limited_until and now >= self._affordable_at
        if is_wanted or now >= self._next_unmarked_at:
            self._next_unmarked_at = now + REMEMBER_SECONDS
            self._marks.clear()
        return self._marks.get((queue, priority))

    def _ask_without_mark(
        self, queue: str, priority: int, limit: int, consumer: int
    ) -> list[Claim]:
        """Claim from the very beginning of a range, and do so the less often the more it costs."""
        started = monotonic()
        claims = self._ask(queue, priority, limit, consumer, None)
        ended = monotonic()
        pause = min((ended - started) * UNMARKED_SHARE, UNMARKED_SECONDS_MAX)
        self._affordable_at = ended + pause
        self._next_unmarked_at = max(self._next_unmarked_at, self._affordable_at)
        return claims

    def _ask(
        self, queue: str, priority: int | None, limit: int, consumer: int, mark: Any
    ) -> list[Claim]:
        return lifecycle.claim(
            using=self._using,
            consumer=consumer,
            queue=queue,
            priority=priority,
            limit=limit,
            not_below=mark,
        )
