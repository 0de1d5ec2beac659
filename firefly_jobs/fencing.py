"""The one way to a running row: its id, its state and its fence; and who holds which.

Whoever finds no row has lost the lease and changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from django.db import connections
from django.db.models import BooleanField, ExpressionWrapper, Q, QuerySet

from . import databases
from .attempts import Claim
from .databases import Completion
from .exceptions import LeaseLost
from .models import ConsumerModel, TaskModel
from .states import Status

# All but what is told to who starts it.
_HELD = [name for name in Claim._fields if name not in {"withdrawn", "start_by"}]
_HAS_LIMITS = Q(
    Q(concurrency_key__isnull=False) | Q(rate_key__isnull=False) | Q(limit_key__isnull=False)
)


def held(using: str, fence: int, *ids: int) -> QuerySet[TaskModel]:
    """Return the rows that are still held under ``fence``."""
    return TaskModel.objects.using(using).filter(pk__in=ids, status=Status.RUNNING, fence=fence)


def held_among(claims: Collection[Claim], *, using: str) -> list[Claim]:
    """Return those of ``claims`` whose rows are still held under their fences."""
    rows = TaskModel.objects.using(using).filter(
        pk__in=[item.id for item in claims], status=Status.RUNNING
    )
    found = set(rows.values_list("id", "fence"))
    return [item for item in claims if (item.id, item.fence) in found]


def lock_held(completions: Collection[Completion], *, using: str) -> list[Completion]:
    """Lock the rows of ``completions`` that are still held, and return those."""
    rows = TaskModel.objects.using(using).filter(
        pk__in=[item.id for item in completions], status=Status.RUNNING
    )
    found = set(rows.order_by("pk").select_for_update().values_list("id", "fence"))
    return [item for item in completions if (item.id, item.fence) in found]


def was_completed(claim: Claim, *, using: str) -> bool:
    """Whether the row was completed under this claim's fence: by nobody else, then.

    Waits for the row's lock: the COMMIT in question may still be under way on the server.
    """
    rows = TaskModel.objects.using(using).select_for_update()
    with databases.of(using).write_transaction(connections[using]):
        found = rows.filter(pk=claim.id).values_list("fence", "status").first()
    return found == (claim.fence, Status.COMPLETED)


def was_settled(claim: Claim | Completion, *, using: str) -> bool:
    """Whether the row was already settled under this claim's fence.

    Then it is no surprise that it is not held any more: either the answer to our own
    statement got lost on the way, or a rescuer or a person ended what had been taken from us.
    """
    return (
        TaskModel.objects.using(using)
        .filter(pk=claim.id, fence=claim.fence, status__in=[s for s in Status if s.is_terminal])
        .exists()
    )


def lease_lost(claim: Claim | Completion) -> LeaseLost:
    """Return the event that a claim does not hold any more."""
    return LeaseLost(
        f"Task {claim.id} is no longer held under fence {claim.fence}: this consumer was rescued, "
        f"or the row was changed by hand. Its outcome was dropped and its transaction rolled back."
    )


# --- who holds what


def claims_of(rows: QuerySet[TaskModel, TaskModel]) -> list[Claim]:
    """Return running rows as their holders have them; who frees a row does not start it."""
    rows = rows.annotate(is_limited=ExpressionWrapper(_HAS_LIMITS, BooleanField()))
    return [Claim(*values) for values in rows.order_by("id").values_list(*_HELD)]


def strays_of(consumer: int, *, held: set[tuple[int, int]], using: str) -> list[Claim]:
    """Return what the database thinks that ``consumer`` holds, and that is not in ``held``.

    Args:
        consumer: Its id.
        held: ``(id, fence)`` of what it knows that it holds.
        using: Database alias.
    """
    rows = TaskModel.objects.using(using).filter(consumer=consumer, status=Status.RUNNING)
    # Mostly there are none, and payloads may be large: so the keys first.
    strays = set(rows.values_list("id", "fence")) - held
    claims = claims_of(rows.filter(pk__in=[pk for pk, _ in strays])) if strays else []
    return [claim for claim in claims if (claim.id, claim.fence) in strays]


def orphans(*, using: str) -> list[Claim]:
    """Return running rows whose consumer has no row: claimed by one that was already rescued."""
    consumers = ConsumerModel.objects.using(using).values("pk")
    rows = TaskModel.objects.using(using).filter(status=Status.RUNNING)
    return claims_of(rows.exclude(consumer__in=consumers))
