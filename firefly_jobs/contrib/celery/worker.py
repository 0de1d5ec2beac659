"""Execute a claim in a Celery worker, as a lane of its consumer would.

The message names a row and a fence and nothing else: arguments do not leave the
database, and a message that is late or delivered twice finds that the fence is not held
any more.  If two workers begin at the same moment, settling lets one of them commit.

Each claim gets a thread, and so a connection, of its own: nothing that a call leaves
behind is there for the worker's other tasks.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from time import monotonic

from firefly_jobs import fencing, leftovers, registry
from firefly_jobs.attempts import Claim, Outcome, Settlement
from firefly_jobs.autodiscovery import import_tasks
from firefly_jobs.databases import Completion
from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.executors.allowances import Allowances
from firefly_jobs.executors.coroutines import CoroutineLoop
from firefly_jobs.executors.threads import SyncLane
from firefly_jobs.membership import KeptConnection
from firefly_jobs.models import TaskModel
from firefly_jobs.reporting import log_completed
from firefly_jobs.settling import Settler
from firefly_jobs.states import Status

logger = logging.getLogger("firefly_jobs")

# A database that restarts is back by then; if not, the consumer takes the row back.
SETTLE_SECONDS = 30.0
_RETRY_SECONDS = 0.5


class Errand:
    """The consumer's side of an executor that has just one claim; see ``executors.work``."""

    def __init__(self, claim: Claim, *, consumer: int) -> None:
        self._claims = [claim]
        self._consumer = consumer
        self._over = threading.Event()
        self.outcome: Outcome | None = None

    def wait(self) -> None:
        """Wait until the call has ended."""
        self._over.wait()

    def owner(self) -> int:
        """Return the consumer's id."""
        return self._consumer

    def may_start(self) -> bool:
        """Return ``True``: the fence was looked at a moment ago."""
        return True

    def next_sync(self) -> Claim | None:
        """Return the claim, once."""
        return self._claims.pop() if self._claims else None

    def may_join_group(self, _: Claim) -> bool:
        """Return ``False``: there are no others."""
        return False

    def left_group(self, _: Claim) -> None:
        """Do nothing: there is no group."""

    def next_for_group(self) -> Claim | None:
        """Return ``None``, likewise."""

    def settled(self, completion: Completion, claim: Claim) -> None:
        """Take note that the call was settled in its own transaction."""
        log_completed(claim, completion.duration)
        self._over.set()

    def dropped(self, _: Claim) -> None:
        """Take note that the lease was lost."""
        self._over.set()

    def ended(self, outcome: Outcome, *, is_urgent: bool) -> None:  # noqa: ARG002 - all are, here
        """Keep the outcome, to be settled."""
        self.outcome = outcome
        self._over.set()

    def outgrew(self) -> None:
        """Do nothing: when a worker's process is replaced, Celery decides."""

    def crashed(self) -> None:
        """Give up; the consumer takes the row back when it has been silent for too long."""
        self._over.set()


def execute(*, using: str, consumer: int, pk: int, fence: int) -> None:
    """Execute the claim of a row, if it is still held, and settle it.

    Args:
        using: Database alias.
        consumer: The consumer that holds it.
        pk: The row's id.
        fence: The claim's fence.
    """
    _import_once()
    connection = KeptConnection(using, owner=lambda: consumer)
    try:
        connection.ensure()
        claim = held_claim(pk, fence, using=using)
        # Not kept while the call runs.
        connection.close()
        if claim is None:
            logger.info("A message about task %s came too late", pk, extra={"task_id": pk})
            return
        errand = Errand(claim, consumer=consumer)
        _call(errand, claim, using)
        if errand.outcome is not None:
            _settle(errand.outcome, connection, using=using, consumer=consumer)
    finally:
        connection.close()


@lru_cache(maxsize=1)
def _import_once() -> None:
    import_tasks()


def held_claim(pk: int, fence: int, *, using: str) -> Claim | None:
    """Return the claim of a row as its holder has it; ``None`` if it is not held any more."""
    rows = TaskModel.objects.using(using).filter(pk=pk, fence=fence, status=Status.RUNNING)
    found = fencing.claims_of(rows)
    if not found:
        return None
    (claim,) = found
    is_too_late = rows.filter(expires_at__lte=DatabaseNow()).exists()
    is_step = claim.workflow is not None
    return claim._replace(
        start_by=monotonic() if is_too_late else None,
        withdrawn=leftovers.why_withdrawn(pk, using=using) if is_step else "",
    )


@lru_cache(maxsize=1)
def _allowances() -> Allowances:
    # One for all calls, so that what it warns of is said once.
    return Allowances(on_outgrown=lambda: None)


def _call(errand: Errand, claim: Claim, using: str) -> None:
    if registry.is_async(claim.func_name):
        loop = CoroutineLoop(errand, _allowances(), using=using, connections=1)
        loop.start()
        loop.start_call(claim)
        errand.wait()
        loop.stop()
        loop.join()
    else:
        lane = SyncLane(errand, _allowances(), using=using, name="firefly-celery-lane")
        lane.start()
        lane.join()


def _settle(outcome: Outcome, connection: KeptConnection, *, using: str, consumer: int) -> None:
    def forget(_: Claim, __: Settlement | None) -> None:
        """Nobody asks."""

    settler = Settler(using=using, on_settled=forget)
    settler.add(outcome, is_urgent=True)
    pause, deadline = threading.Event(), monotonic() + SETTLE_SECONDS
    while monotonic() < deadline:
        connection.insist(lambda: settler.flush(consumer=consumer, is_last=True))
        if not len(settler):
            return
        pause.wait(_RETRY_SECONDS)
    logger.error("The outcome of task %s could not be settled", outcome.claim.id)
