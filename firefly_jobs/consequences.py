"""What the ends of rows mean for others: workflows go on, schedules count, who waits is told.

Called by ``lifecycle`` in the transaction that writes the ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import dependencies, tallies
from .attempts import Settlement
from .databases import Completion
from .dependencies import End
from .states import Status
from .wakeup import announce, announce_ended


def follow(settlements: Sequence[Settlement], *, using: str) -> None:
    """Do what some outcomes, just written, mean for others."""
    ends = [
        End(
            item.claim.id,
            item.claim.workflow,
            item.status,
            item.error or "",
            item.ignores_failure,
        )
        for item in settlements
        if item.claim.workflow is not None and item.status.is_terminal
    ]
    if ends:
        dependencies.follow(ends, using=using)
    again = [item.claim.workflow for item in settlements if not item.status.is_terminal]
    dependencies.finish_later(again, using=using)
    tallies.count_settled(settlements, using=using)


def follow_completed(completions: Sequence[Completion], *, using: str) -> None:
    """Do the same for calls that have returned."""
    ends = [
        End(item.id, item.workflow, Status.COMPLETED)
        for item in completions
        if item.workflow is not None
    ]
    if ends:
        dependencies.follow(ends, using=using)
    tallies.count_completed(completions, using=using)


def tell(settlements: Sequence[Settlement], *, using: str) -> None:
    """Tell consumers what is due again, and those who wait what has ended."""
    announce(using, {item.claim.queue for item in settlements if item.status is Status.CREATED})
    announce_ended(using, [item.claim.id for item in settlements if item.status.is_terminal])
