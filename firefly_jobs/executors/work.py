"""What executors ask of the consumer, and what they tell it."""

from __future__ import annotations

from typing import Protocol

from firefly_jobs.attempts import Claim, Outcome
from firefly_jobs.databases import Completion

# How long a claim is kept for which there was no connection.
NO_CONNECTION_SECONDS = 0.5


class Work(Protocol):
    """Where a lane gets claims from and reports to; the consumer's side of the lane."""

    def owner(self) -> int:
        """Return the consumer's id."""

    def may_start(self) -> bool:
        """Whether the lease is fresh, so that nobody can have rescued what was claimed."""

    def next_sync(self) -> Claim | None:
        """Return the next claim to start, waiting for one; ``None`` ends the lane."""

    def may_join_group(self, claim: Claim) -> bool:
        """Whether ``claim`` may share a transaction with others; see ``executors.groups``."""

    def left_group(self, claim: Claim) -> None:
        """Take note that calls of this task cannot share a transaction."""

    def next_for_group(self) -> Claim | None:
        """Return the next claim if it is at hand and may join a group, without waiting."""

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note of a call that was settled in its own transaction."""

    def dropped(self, claim: Claim) -> None:
        """Take note of a call whose lease was lost."""

    def ended(self, outcome: Outcome, *, is_urgent: bool) -> None:
        """Take over an outcome that is still to be settled."""

    def outgrew(self) -> None:
        """Take note that this process keeps more memory than one of its calls may."""

    def crashed(self) -> None:
        """Stop with an error: an executor ended by a mistake of its own."""
