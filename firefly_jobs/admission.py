"""Let limited calls start: a second, short step between their claim and their execution.

Whoever schedules, claims or ends other rows pays nothing.  A claimed row that has limits is
*admitted*, if each of them has room for it, or it goes into the line of the one that has
not; see ``lines``.  Both are decided under the locks of all the limits of a batch, slots
before tokens, so that no token is taken in vain.

What is lost in spite of all locks (rows that were deleted or changed by hand, a cancelling
that was rolled back) is found by :func:`sweep`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from time import monotonic
from typing import Any, NamedTuple

from django.db import Error, connections
from django.db.models import Exists, OuterRef, QuerySet, Value
from django.db.models.functions import Concat

from . import databases, events
from .attempts import Claim
from .databases.functions import DatabaseMicroseconds
from .event_models import EventKind
from .fencing import held
from .history import note_withdrawn
from .limits import BUCKET, SLOT, bucket_line, slot_line
from .lines import Limited, Lines, Slots, as_datetime, free, line
from .models import ConcurrencySlot, RateBucket, TaskModel
from .states import Status
from .wakeup import announce

logger = logging.getLogger("firefly_jobs")

# Lines, and rows of limits, that one sweep looks at; the next one goes on behind them.
SWEEP_MAX = 500
_AT_LIMIT = "it waits for a limit"


# --- starting


def admit(claims: Sequence[Claim], *, using: str) -> list[Claim]:
    """Return those of ``claims`` that may start; the rest goes into its lines.

    What has no limits may start, and so may what is too late to, or whose workflow stops: it
    takes no place and no token, and is cancelled in a moment.
    """
    now = monotonic()
    limited = {item.id for item in claims if item.is_limited and _is_wanted(item, now)}
    if not limited:
        return list(claims)
    rows = _limits_of(claims, limited, using)
    lines = Lines((name for row in rows for name in (row.limit_key, *_limits(row))), using=using)
    admitted = _admit(rows, lines, using)
    return [item for item in claims if item.id not in limited or item.id in admitted]


def _admit(rows: Sequence[Limited], lines: Lines, using: str) -> set[int]:
    database, connection = databases.of(using), connections[using]
    with database.own_transaction(connection):
        if lines.try_lock():
            return _Admission(rows, lines, using).run()
    # By itself: those who insert the same keys in longer transactions meet in a deadlock on
    # InnoDB.
    lines.create()
    with database.own_transaction(connection):
        lines.lock()
        return _Admission(rows, lines, using).run()


def _is_wanted(claim: Claim, now: float) -> bool:
    return not claim.withdrawn and (claim.start_by is None or now < claim.start_by)


def _limits(row: Limited) -> list[str]:
    """Return the names of a row's lines; the slot's first, so that no token is taken in vain."""
    slot = [] if row.concurrency_key is None else [slot_line(row.concurrency_key)]
    return slot if row.rate_key is None else [*slot, bucket_line(row.rate_key)]


def _limits_of(claims: Sequence[Claim], ids: Collection[int], using: str) -> list[Limited]:
    """Read the limits of claimed rows; those that have waited come before those that have not."""
    order = {(item.id, item.fence): place for place, item in enumerate(claims)}
    found = TaskModel.objects.using(using).filter(pk__in=ids, status=Status.RUNNING)
    rows = (Limited(*values) for values in found.values_list(*Limited._fields))
    # What another consumer has rescued meanwhile is not ours to admit.
    ours = [row for row in rows if (row.id, row.fence) in order]
    return sorted(ours, key=lambda row: (row.limit_key is None, order[row.id, row.fence]))


class _Admission:
    """Decide about the rows of one batch, in order, under the locks of their limits.

    Args:
        rows: What was claimed.
        lines: Those of its limits and those that it comes from, locked.
        using: Database alias.
    """

    def __init__(self, rows: Sequence[Limited], lines: Lines, using: str) -> None:
        self._rows = rows
        self._lines = lines
        self._using = using
        for each in lines:
            each.count(besides=[row.id for row in rows])

    def run(self) -> set[int]:
        """Write what becomes of the rows, and return the ids of those that may start."""
        stands: dict[int, str | None] = {}
        admitted: set[int] = set()
        for row in self._rows:
            wanted = [self._lines[name] for name in _limits(row)]
            full = next((each for each in wanted if not each.has_room_for(row)), None)
            if full is not None:
                full.refuse()
                stands[row.id] = full.name
            else:
                for each in wanted:
                    each.take(row)
                admitted.add(row.id)
                stands[row.id] = next((e.name for e in wanted if isinstance(e, Slots)), None)
            if row.limit_key not in {None, stands[row.id]}:
                # Its place there is free, or its token was taken.
                self._lines[str(row.limit_key)].is_moving = True
        for each in self._lines:
            each.write()
        self._write(stands, admitted)
        self._lines.let_go(only_moving=True)
        return admitted

    def _write(self, stands: dict[int, str | None], admitted: Collection[int]) -> None:
        groups: defaultdict[Any, list[int]] = defaultdict(list)
        for row in self._rows:
            is_rated = row.rate_key is not None
            groups[row.fence, stands[row.id], row.id in admitted, is_rated].append(row.id)
        for (fence, name, is_admitted, is_rated), ids in groups.items():
            if not is_admitted:
                rows = held(self._using, fence, *ids)
                events.changing(rows, EventKind.RELEASED, _AT_LIMIT, using=self._using)
                rows.update(status=Status.BLOCKED, consumer=None, started=None, limit_key=name)
            elif is_rated:
                # So that what the rows tell is what the bucket has counted.
                moment = as_datetime(self._lines.now)
                held(self._using, fence, *ids).update(limit_key=name, started=moment)
            else:
                held(self._using, fence, *ids).update(limit_key=name)


# --- leaving a line otherwise


class Place(NamedTuple):
    """The place of a row that was let go and will not start."""

    line: str
    not_before: datetime | None


def places_of(rows: QuerySet[TaskModel]) -> list[Place]:
    """Lock those of ``rows`` that stand in a line, and return the places of those let go."""
    standing = rows.filter(limit_key__isnull=False).select_for_update().order_by("pk")
    found = standing.values_list("limit_key", "not_before", "status")
    return [
        Place(str(name), not_before)
        for name, not_before, status in found
        if status == Status.CREATED
    ]


def pass_on(places: Iterable[Place], *, using: str) -> None:
    """Let the next ones go in the place of others; locks no row of a limit."""
    queues: set[str] = set()
    for place in places:
        queues.update(line(place.line, using=using).pass_on(place.not_before))
    if queues:
        announce(using, queues)


def start_over(pk: int, values: Mapping[str, Any], *, key: str | None, using: str) -> bool:
    """Make another call of a row that was claimed, or stands in a line, for the former one.

    Args:
        pk: Its id.
        values: What it says now.
        key: Its unique key; if it has another one, or has started, nothing is changed.
        using: Database alias.

    Returns:
        Whether it was changed.
    """
    waits = [Status.CREATED, Status.BLOCKED]
    rows = TaskModel.objects.using(using).filter(pk=pk, active_key=key, status__in=waits)
    with databases.of(using).write_transaction(connections[using]):
        note_withdrawn(rows, "replaced by a later call", using=using)
        # Before the change: the place that is free is that of the former call.
        places = places_of(rows)
        changed = rows.update(**values, status=Status.CREATED, limit_key=None)
        pass_on(places, using=using)
    return changed == 1


# --- what is lost in spite of all locks


def sweep(after: str, *, using: str) -> str:
    """Let go whom everybody has forgotten, and delete rows of limits that nobody needs.

    Args:
        after: What the last sweep returned; at first an empty text.
        using: Database alias.

    Returns:
        Behind which line the next sweep goes on.
    """
    blocked = TaskModel.objects.using(using).filter(status=Status.BLOCKED, limit_key__gt=after)
    names = blocked.order_by("limit_key").values_list("limit_key", flat=True).distinct()
    found = [str(name) for name in names[:SWEEP_MAX]]
    for name in found:
        try:
            freed = free([name], using=using)
        except Error as error:
            if not databases.of(using).is_conflict(error):
                raise
            # One lock is enough to wait for.
            return name
        if freed:
            logger.warning("Let %s tasks go that a limit held back although there was room", freed)
    _prune(using)
    return found[-1] if len(found) == SWEEP_MAX else ""


def _prune(using: str) -> None:
    """Delete slots that nobody stands at, and buckets that are full again."""
    slots = _unused(ConcurrencySlot.objects.using(using), SLOT, using)
    full = RateBucket.objects.using(using).filter(spent_until__lt=DatabaseMicroseconds())
    buckets = _unused(full, BUCKET, using)
    if not slots and not buckets:
        return
    with databases.of(using).own_transaction(connections[using]):
        # Whoever has locked one uses it; who waits for it meanwhile inserts it again.
        locked_slots = _locked(ConcurrencySlot, slots, using)
        locked_buckets = _locked(RateBucket, buckets, using) & full
        slots = _unused(locked_slots, SLOT, using)
        buckets = _unused(locked_buckets, BUCKET, using)
        ConcurrencySlot.objects.using(using).filter(pk__in=slots).delete()
        RateBucket.objects.using(using).filter(pk__in=buckets).delete()


def _locked(model: Any, keys: Collection[str], using: str) -> QuerySet[Any]:
    """Lock rows that nobody has locked, and return them."""
    rows = model.objects.using(using).filter(pk__in=keys).order_by("pk")
    locked = rows.select_for_update(skip_locked=databases.of(using).can_skip_locked)
    keys = list(locked.values_list("pk", flat=True))
    found: QuerySet[Any] = model.objects.using(using).filter(pk__in=keys)
    return found


def _unused(rows: QuerySet[Any], kind: str, using: str) -> list[str]:
    """Return the keys of rows whose line nobody stands in or has been let go from."""
    standing = TaskModel.objects.using(using).filter(limit_key=Concat(Value(kind), OuterRef("pk")))
    return list(rows.filter(~Exists(standing)).values_list("pk", flat=True)[:SWEEP_MAX])
