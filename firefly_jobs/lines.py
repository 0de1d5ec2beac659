"""The lines before concurrency and rate limits: who stands there, and who is let go next.

A row that a limit refused is ``blocked`` and stands in that limit's *line*, outside of the
claim index.  When a place is free, the first of the line, by priority and ``run_at``, is
*let go*: it is ``created`` again, keeps the name of the line in ``limit_key``, and is
claimed and admitted like any other.

How many run is counted from the running rows, so a crash leaks nothing.  Who counts has
locked the key's row in ``ConcurrencySlot`` before, and keeps the lock until what follows
from the number is committed: two that count together would both find room, and a row that
is blocked while the last place is freed would be forgotten.  A bucket's number is changed
under the lock of its row.  Locks are taken in one order everywhere: slots by key, buckets
by key, then rows of tasks.

Whoever cancels may do so in a long transaction, so it locks none of these: a row that was
let go and is cancelled passes its place on to the next one.  That may let go one too many,
which is refused when it is claimed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar

from django.db import Error, connections, transaction
from django.db.models import Count, Model, QuerySet

from . import databases
from .databases.functions import DatabaseMicroseconds, Isolation
from .limits import BUCKET, SECOND, SLOT, Rate, moments, places
from .models import ConcurrencySlot, RateBucket, TaskModel
from .states import Status
from .wakeup import announce

# How many are let go at once, and how many may be on their way to one bucket.
LET_GO_MAX = 50
# How far ahead calls are told their moment; who comes later may still overtake the others.
AHEAD = 1 * SECOND
# So many more are looked at than are wanted, and then ever more: a person's transaction may
# have locked some.
_SPARE, _GROWTH = 3, 4
# A key's row may be pruned between two looks, but not for ever.
_LOCK_TRIES = 20
# Who waits for a person's transaction may meet the next one as well.
_DEADLOCK_TRIES = 5
_DEADLOCK_PAUSE_SECONDS, _DEADLOCK_PAUSE_SECONDS_MAX = 0.001, 0.25
# A moment must not come before its token, and SQLite's clock has milliseconds.
_MARGIN = timedelta(milliseconds=1)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_T = TypeVar("_T")


class Limited(NamedTuple):
    """What a row says about its limits."""

    id: int
    fence: int
    queue: str
    limit_key: str | None
    concurrency_key: str | None
    max_concurrent: int | None
    rate_key: str | None
    rate_limit: str | None


def as_datetime(moment: int) -> datetime:
    """Return a moment of the database's clock as rows carry it."""
    return _EPOCH + timedelta(microseconds=moment)


class Line:
    """One limit, and the rows that wait for it.

    Args:
        name: What the rows carry as ``limit_key``.
        using: Database alias.
    """

    # Whose row is locked; its primary key is ``name`` without what tells the kind.
    model: type[Model]

    def __init__(self, name: str, *, using: str) -> None:
        self.name = name
        self.key = name[len(SLOT) :]
        self._using = using
        self._running = self._let_go = 0
        self._is_waited_for: bool | None = None
        # Whether somebody has left, so that the next one may go.
        self.is_moving = False

    def _standing(self, *statuses: Status) -> QuerySet[TaskModel]:
        rows = TaskModel.objects.using(self._using)
        return rows.filter(limit_key=self.name, status__in=statuses)

    def count(self, *, besides: Collection[int] = ()) -> None:
        """Count those who run and those who were let go, but for some rows."""
        rows = self._standing(Status.RUNNING, Status.CREATED).exclude(pk__in=besides)
        counts = dict(rows.values_list("status").annotate(Count("pk")).order_by())
        self._running = counts.get(Status.RUNNING, 0)
        self._let_go = counts.get(Status.CREATED, 0)

    @property
    def _has_waiting(self) -> bool:
        if self._is_waited_for is None:
            self._is_waited_for = self._standing(Status.BLOCKED).exists()
        return self._is_waited_for

    def has_room_for(self, row: Limited) -> bool:
        """Whether a claimed row may start, as far as this limit is concerned."""
        raise NotImplementedError

    def take(self, row: Limited) -> None:
        """Let a claimed row start."""
        raise NotImplementedError

    def refuse(self) -> None:
        """Take note that a claimed row may not start, and will stand here."""
        self._is_waited_for = self.is_moving = True

    def write(self) -> None:
        """Write what was taken, where rows do not tell."""

    # --- the first of the line

    def let_go(self, now: int) -> list[str]:
        """Let those go for whom there is room; return their queues.

        Args:
            now: The moment, by the database's clock.
        """
        head = next(self._best(1), None)
        if head is None:
            return []
        self.count()
        if not (wanted := self._most(head)):
            return []
        return self._let_go_first(self._lock_best(wanted), now)

    def _lock_best(self, wanted: int) -> list[Limited]:
        """Lock the first of the line, and pass over whom others have locked.

        Those may leave in a moment, and nobody would come for the ones behind them.
        """
        count = wanted + _SPARE
        while True:
            best = [row.id for row in self._best(count)]
            found = self._lock(best)
            if len(found) >= wanted or len(best) < count:
                return found
            count *= _GROWTH

    def _best(self, count: int) -> Iterator[Limited]:
        """Yield the first ``count`` of the line, priority by priority."""
        line = self._standing(Status.BLOCKED)
        below = line
        while count > 0:
            highest = below.order_by("-priority").values("priority")[:1]
            rows = line.filter(priority=highest).order_by("run_at", "id")[:count]
            found = list(rows.values_list(*Limited._fields, "priority"))
            if not found:
                return
            for *values, _ in found:
                yield Limited(*values)
            count -= len(found)
            below = line.filter(priority__lt=found[-1][-1])

    def _lock(self, wanted: Sequence[int]) -> list[Limited]:
        """Lock rows of the line that nobody else has locked, and return them in order."""
        can_skip_locked = databases.of(self._using).can_skip_locked
        # By primary key only, and looked at here: a range that is read with locks keeps the
        # entry behind its end locked on InnoDB.
        rows = TaskModel.objects.using(self._using).filter(pk__in=wanted)
        locked = {
            row.id: row
            for row in (
                Limited(*values)
                for *values, status in rows.select_for_update(
                    skip_locked=can_skip_locked
                ).values_list(*Limited._fields, "status")
                if status == Status.BLOCKED
            )
            if row.limit_key == self.name
        }
        return [locked[pk] for pk in wanted if pk in locked]

    def _most(self, head: Limited) -> int:
        """Return how many may be let go at most, as the first of the line sees it."""
        raise NotImplementedError

    def _let_go_first(self, rows: list[Limited], now: int) -> list[str]:
        raise NotImplementedError

    def _write(self, rows: Iterable[Limited], **values: Any) -> None:
        ids = [row.id for row in rows]
        if ids:
            TaskModel.objects.using(self._using).filter(pk__in=ids, status=Status.BLOCKED).update(
                status=Status.CREATED, **values
            )

    def pass_on(self, not_before: datetime | None) -> list[str]:
        """Let the next one go in the place of one that was let go; without the line's lock."""
        found = self._lock_best(1)[:1]
        self._write(found, **self._moment_of(not_before))
        return [row.queue for row in found]

    def _moment_of(self, not_before: datetime | None) -> dict[str, Any]:  # noqa: ARG002 - a bucket's do
        """Return what who takes over a place is told about when."""
        return {}


class Slots(Line):
    """So many run at the same time."""

    model = ConcurrencySlot

    def has_room_for(self, row: Limited) -> bool:
        """Whether fewer run than the row itself says; and nobody else is to go first."""
        most = row.max_concurrent or 0
        if row.limit_key == self.name:
            return self._running < most
        if row.limit_key is None and self._has_waiting:
            return False
        return self._running + self._let_go < most

    def take(self, row: Limited) -> None:  # noqa: ARG002 - a bucket's does
        """Count one more."""
        self._running += 1

    def _most(self, head: Limited) -> int:
        most = (head.max_concurrent or 1) - self._running - self._let_go
        return min(max(most, 0), LET_GO_MAX)

    def _let_go_first(self, rows: list[Limited], now: int) -> list[str]:  # noqa: ARG002 - a bucket's does
        maxima = [row.max_concurrent or 1 for row in rows]
        found = rows[: places(maxima, occupied=self._running + self._let_go)]
        self._write(found)
        return [row.queue for row in found]


class Bucket(Line):
    """So many start in a period.

    Who runs has its token; so whoever carries the line's name has been let go.
    """

    model = RateBucket

    def __init__(self, name: str, *, using: str) -> None:
        super().__init__(name, using=using)
        self.spent_until = self.now = 0
        self._is_changed = False

    @property
    def _ahead(self) -> int:
        return self._running + self._let_go

    def has_room_for(self, row: Limited) -> bool:
        """Whether there is a token now; and nobody else is to go first."""
        if row.limit_key == self.name:
            ahead = 0
        elif row.limit_key is None and (self._ahead or self._has_waiting):
            return False
        else:
            ahead = self._ahead
        rate = self._rein(row)
        return rate.permitted_at(self.spent_until, now=self.now, ahead=ahead) <= self.now

    def _rein(self, row: Limited) -> Rate:
        """Rein the bucket in as a row's rate says; return the rate."""
        rate = Rate.from_text(str(row.rate_limit))
        reined = rate.reined(self.spent_until, now=self.now)
        self._is_changed |= reined != self.spent_until
        self.spent_until = reined
        return rate

    def take(self, row: Limited) -> None:
        """Take a token."""
        rate = Rate.from_text(str(row.rate_limit))
        self.spent_until = rate.taken(self.spent_until, now=self.now)
        self._is_changed = True

    def write(self) -> None:
        """Write how far tokens are spent."""
        if self._is_changed:
            rows = RateBucket.objects.using(self._using).filter(pk=self.key)
            rows.update(spent_until=self.spent_until)

    def _most(self, head: Limited) -> int:  # noqa: ARG002 - slots ask it
        return max(LET_GO_MAX - self._ahead, 0)

    def _let_go_first(self, rows: list[Limited], now: int) -> list[str]:
        for row in rows[:1]:
            self._rein(row)
            self.write()
        permitted = moments(
            [Rate.from_text(str(row.rate_limit)) for row in rows],
            self.spent_until,
            now=now,
            ahead=self._ahead,
            most=LET_GO_MAX,
            within=AHEAD,
        )
        going = list(zip(rows, permitted, strict=False))
        self._write(row for row, moment in going if moment <= now)
        for row, moment in going:
            if moment > now:
                self._write([row], not_before=as_datetime(moment) + _MARGIN)
        return [row.queue for row, _ in going]

    def _moment_of(self, not_before: datetime | None) -> dict[str, Any]:
        return {} if not_before is None else {"not_before": not_before}


_KINDS: dict[str, type[Line]] = {SLOT: Slots, BUCKET: Bucket}


def line(name: str, *, using: str) -> Line:
    """Return the line that rows carry the name of."""
    return _KINDS[name[: len(SLOT)]](name, using=using)


class Lines:
    """Several lines, locked together.

    Args:
        names: What rows carry as ``limit_key``; ``None`` among them is passed over.
        using: Database alias.
        can_count: Whether each statement of the open transaction sees what was committed
            before it.  If not, the next ones are let go once it has committed.
    """

    def __init__(self, names: Iterable[str | None], *, using: str, can_count: bool = True) -> None:
        self._using = using
        self._can_count = can_count
        # In the order in which they are locked: slots first.
        self._lines = {
            name: line(name, using=using) for name in sorted({n for n in names if n is not None})
        }
        self.now = 0

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def __getitem__(self, name: str) -> Line:
        return self._lines[name]

    def __contains__(self, name: object) -> bool:
        return name in self._lines

    def lock(self) -> None:
        """Wait until nobody else counts in these lines; ends with the transaction.

        Where nothing can be counted nothing is locked.
        """
        if not self._can_count:
            return
        for _ in range(_LOCK_TRIES):
            if self.try_lock():
                return
            self.create()
        message = f"A limit's row was deleted {_LOCK_TRIES} times while it was to be locked."
        raise RuntimeError(message)

    def try_lock(self) -> bool:
        """Lock the rows of these limits, if all of them are there; return whether they are."""
        for model, keys in self._keys():
            rows = model.objects.using(self._using).select_for_update().filter(pk__in=keys)
            if len(rows.order_by("pk").values_list("pk")) < len(keys):
                return False
        if any(isinstance(each, Bucket) for each in self):
            # Only now, since a statement that waits for a lock tells when it began to.
            self._look_at_buckets()
        return True

    def create(self) -> None:
        """Write the rows of limits that nobody has met yet."""
        for model, keys in self._keys():
            rows = [model(pk=key) for key in keys]
            model.objects.using(self._using).bulk_create(rows, ignore_conflicts=True)

    def _keys(self) -> Iterator[tuple[Any, list[str]]]:
        for model in (ConcurrencySlot, RateBucket):
            if keys := sorted(each.key for each in self if each.model is model):
                yield model, keys

    def _look_at_buckets(self) -> None:
        buckets = [each for each in self if isinstance(each, Bucket)]
        rows = RateBucket.objects.using(self._using).filter(pk__in=[each.key for each in buckets])
        found = {}
        for key, spent_until, now in rows.values_list("pk", "spent_until", DatabaseMicroseconds()):
            found[key], self.now = spent_until, int(now)
        for each in buckets:
            each.spent_until, each.now = found[each.key], self.now

    def let_go(self, *, only_moving: bool = False) -> int:
        """Let those go for whom there is room, and call who serves them; return how many.

        Args:
            only_moving: Only in lines that somebody has left, or stands in anew.
        """
        if not self._lines:
            return 0
        if not self._can_count:
            transaction.on_commit(partial(free, list(self._lines), using=self._using), self._using)
            return 0
        queues = [
            queue
            for each in self
            if each.is_moving or not only_moving
            for queue in each.let_go(self.now)
        ]
        if queues:
            announce(self._using, set(queues))
        return len(queues)


def lines_of(rows: QuerySet[TaskModel], *, using: str) -> Lines:
    """Return the lines of rows that are about to end or to be given back.

    Read before the transaction that does it, or in that of a call.
    """
    found = list(rows.filter(limit_key__isnull=False).values_list("limit_key", Isolation()))
    can_count = all(isolation == "read-committed" for _, isolation in found)
    in_call = connections[using].in_atomic_block
    return Lines({name for name, _ in found}, using=using, can_count=can_count or not in_call)


def without_waiting_for_ever(lines: Lines, work: Callable[[Lines], _T], *, using: str) -> _T:
    """Return what ``work`` does under the locks of ``lines``; without them if they are held.

    A consumer that was paused amid its last statements must keep nobody from rescuing what
    has nothing to do with these limits.
    """
    try:
        return work(lines)
    except Error as error:
        if not len(lines) or not databases.of(using).is_conflict(error):
            raise
    return work(Lines((), using=using))


def tried_again(work: Callable[[], _T], *, using: str) -> _T:
    """Return what ``work`` does; if it met others in a deadlock it is done anew.

    Inside of a transaction more than that was undone, and the error is raised.
    """
    for tries in range(1, _DEADLOCK_TRIES):
        try:
            return work()
        except Error as error:
            is_deadlock = databases.of(using).is_deadlock(error)
            if not is_deadlock or connections[using].in_atomic_block:
                raise
        pause_after_deadlock(tries)
    return work()


def pause_after_deadlock(tries: int) -> None:
    """Let the others go first: who comes back at once may be the one to go again.

    The pause is drawn from an interval that doubles with each try, up to a quarter of a second
    ("full jitter", https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/).
    """
    longest = min(_DEADLOCK_PAUSE_SECONDS * 2**tries, _DEADLOCK_PAUSE_SECONDS_MAX)
    time.sleep(random.uniform(0, longest))  # noqa: S311, TID251 - no secret; nobody wakes a caller


def free(names: Collection[str], *, using: str) -> int:
    """Let those go for whom there is room, in a transaction of its own; return how many."""
    lines = Lines(names, using=using)
    with databases.of(using).own_transaction(connections[using]):
        lines.lock()
        return lines.let_go()
