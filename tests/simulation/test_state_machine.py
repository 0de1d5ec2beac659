"""Everything that changes rows, in any order, against a plain dictionary.

The model knows nothing of SQL, of :func:`~firefly_jobs.attempts.decide` or of the table of
transitions: it says in a few lines what each step means.  After every step every row is
compared with it, so a statement that changes a row too many, or a stale fence that changes
anything, is found at the step that did it, and Hypothesis shrinks the way there.
"""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from django.db import transaction
from django.db.models import Exists, OuterRef
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from firefly_jobs import fencing, leases, lifecycle, serializers
from firefly_jobs.attempts import Claim, Outcome, decide
from firefly_jobs.databases import Completion
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.exceptions import Cancel, LeaseLost, Retry, Snooze, StopRequested
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from tests.testapp.tasks import echo

USING = "default"
MAX_RESCUES = 3
LEASE_SECONDS = 30.0
RETRY_DELAY = 3600
QUEUES = ("mail", "slow")
PRIORITIES = (0, 50)
PAST = datetime(2001, 1, 1, tzinfo=UTC)
FUTURE = datetime(2101, 1, 1, tzinfo=UTC)


@dataclass
class Row:
    """What the model expects of one row."""

    queue: str
    priority: int
    max_retries: int
    is_due: bool
    status: str = "created"
    fence: int = 0
    consumer: int | None = None
    retries: int = 0
    rescues: int = 0
    lost_alone: int = 0
    returned: int | None = None
    history: list[str] = field(default_factory=list)
    # Under which fence history tells last that it was cancelled.
    cancelled_fence: int = 0

    def end(self, how: str) -> None:
        """Take note of how an attempt ended."""
        self.history.append(how)
        if how == "cancelled":
            self.cancelled_fence = self.fence

    def withdraw(self) -> None:
        """Be cancelled while it waits, which is an end if it was claimed since the last one."""
        self.status = "cancelled"
        if self.fence != self.cancelled_fence:
            self.end("cancelled")

    @property
    def can_start(self) -> bool:
        return self.status == "created" and self.is_due


@dataclass
class Consumer:
    """What the model expects of one consumer."""

    is_late: bool = False
    is_suspected: bool = False


class QueueMachine(RuleBasedStateMachine):
    """Consumers, people and accidents, one step at a time."""

    claims = Bundle("claims")
    consumers = Bundle("consumers")

    def __init__(self) -> None:
        super().__init__()
        # One connection does it all, so nothing needs a commit: an example is rolled back
        # at its end, and a thousand steps do not wait for the disk a thousand times.
        self.block = transaction.atomic()
        self.block.__enter__()
        self.rows: dict[int, Row] = {}
        self.live: dict[int, Consumer] = {}

    def teardown(self) -> None:
        transaction.set_rollback(True)
        self.block.__exit__(None, None, None)

    # --- the model's few rules

    def holds(self, claim: Claim) -> bool:
        row = self.rows.get(claim.id)
        return row is not None and (row.status, row.fence) == ("running", claim.fence)

    def was_completed_by(self, claim: Claim) -> bool:
        """Whether it was this claim that completed the row: settling twice is no loss."""
        row = self.rows.get(claim.id)
        return row is not None and (row.status, row.fence) == ("completed", claim.fence)

    def end_attempt(self, claim: Claim, status: str, how: str, *, due: bool | None = None) -> Row:
        row = self.rows[claim.id]
        row.status = status
        row.end(how)
        if status == "created":
            row.consumer = None
        if due is not None:
            row.is_due = due
        return row

    def settle(self, claim: Claim, error: BaseException, **facts: Any) -> bool:
        """Settle like the consumer does; return whether the claim still held."""
        outcome = Outcome(claim=claim, duration=0.1, error=error, **facts)
        settlement = decide(outcome, max_rescues=MAX_RESCUES)
        if self.holds(claim):
            lifecycle.settle(settlement, using=USING, consumer=self.rows[claim.id].consumer)
            return True
        with pytest.raises(LeaseLost):
            lifecycle.settle(settlement, using=USING, consumer=1)
        return False

    # --- people and programs

    @rule(
        queue=st.sampled_from(QUEUES),
        priority=st.sampled_from(PRIORITIES),
        eta=st.sampled_from([None, None, PAST, FUTURE]),
        max_retries=st.integers(0, 2),
    )
    def enqueue(self, queue: str, priority: int, eta: datetime | None, max_retries: int) -> None:
        row = echo.using(
            queue=queue,
            priority=priority,
            eta=eta,
            max_retries=max_retries,
            retry_delay=RETRY_DELAY,
        ).schedule(1)
        self.rows[row.pk] = Row(queue, priority, max_retries, is_due=eta != FUTURE)

    @rule(queue=st.sampled_from(QUEUES))
    def enqueue_and_roll_back(self, queue: str) -> None:
        with transaction.atomic():
            echo.using(queue=queue).schedule(1)
            transaction.set_rollback(True)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.rows)), max_size=3, unique=True))
        hit = [pk for pk in ids if self.rows[pk].status == "created"]

        assert lifecycle.cancel(ids, using=USING) == len(hit)

        for pk in hit:
            self.rows[pk].withdraw()

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.rows)), max_size=3, unique=True))
        hit = [pk for pk in ids if self.rows[pk].status in {"failed", "cancelled"}]

        assert lifecycle.retry(ids, using=USING) == len(hit)

        for pk in hit:
            row = self.rows[pk]
            row.status, row.is_due, row.consumer = "created", True, None
            row.retries = row.rescues = row.lost_alone = 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.rows)), max_size=2, unique=True))
        hit = [pk for pk in ids if self.rows[pk].status in {"completed", "failed", "cancelled"}]

        assert lifecycle.delete(ids, using=USING) == len(hit)

        for pk in hit:
            del self.rows[pk]

    # --- consumers

    @initialize(target=consumers, rows=st.integers(1, 4))
    def start(self, rows: int) -> Any:
        for _ in range(rows):
            self.enqueue(queue="mail", priority=0, eta=None, max_retries=2)
        return multiple(self.register(), self.register())

    @rule(target=consumers)
    def register_another(self) -> int:
        return self.register()

    def register(self) -> int:
        pk = leases.register(
            name="test:1",
            queues=QUEUES,
            lease_seconds=LEASE_SECONDS,
            process=None,
            using=USING,
        )
        self.live[pk] = Consumer()
        return pk

    @rule(target=claims, consumer=consumers, limit=st.integers(1, 3), data=st.data())
    def claim(self, consumer: int, limit: int, data: st.DataObject) -> Any:
        # Mostly where something is due; now and then where nothing is.
        ranges = sorted({(row.queue, row.priority) for row in self.rows.values() if row.can_start})
        anywhere = st.tuples(st.sampled_from(QUEUES), st.sampled_from(PRIORITIES))
        queue, priority = data.draw(st.sampled_from(ranges) if ranges else anywhere)
        return multiple(*self.claim_from(consumer, queue, priority, limit))

    @rule(
        target=claims,
        claim=claims,
        consumer=consumers,
        how=st.sampled_from(["released", "interrupted", "retried", "snoozed"]),
    )
    def give_back_and_claim_again(self, claim: Claim, consumer: int, how: str) -> Any:
        """After this the former claim is stale, while its row runs under a newer one."""
        if how == "released":
            self.release(claim)
        elif how == "interrupted":
            self.interrupt(claim)
        elif how == "retried":
            self.fail(claim, 0)
        else:
            self.snooze(claim, 0)
        return multiple(*self.claim_from(consumer, claim.queue, claim.priority, 5))

    def claim_from(self, consumer: int, queue: str, priority: int, limit: int) -> list[Claim]:
        # The order among due rows is the database's run_at, which only it knows.
        due = [
            pk
            for pk in TaskModel.objects.order_by("run_at", "id").values_list("pk", flat=True)
            if (row := self.rows[pk]).can_start and (row.queue, row.priority) == (queue, priority)
        ]

        claims = lifecycle.claim(
            using=USING, consumer=consumer, queue=queue, priority=priority, limit=limit
        )

        assert [claim.id for claim in claims] == due[:limit]
        for claim in claims:
            row = self.rows[claim.id]
            row.status, row.consumer, row.fence = "running", consumer, row.fence + 1
            assert (claim.fence, claim.queue, claim.priority) == (row.fence, queue, priority)
            assert (claim.retry_attempts, claim.max_retries) == (row.retries, row.max_retries)
            assert (claim.rescues, claim.lost_alone) == (row.rescues, row.lost_alone)
        return claims

    @rule(consumer=consumers)
    def renew(self, consumer: int) -> None:
        is_alive = consumer in self.live

        assert leases.renew(consumer, using=USING) == is_alive

        if is_alive:
            self.live[consumer] = Consumer()

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        is_held = self.holds(claim)

        assert lifecycle.release([claim], using=USING) == int(is_held)

        if is_held:
            self.rows[claim.id].status = "created"
            self.rows[claim.id].consumer = None

    @rule(claim=claims, value=st.integers(0, 2), is_batch=st.booleans())
    def complete(self, claim: Claim, value: int, is_batch: bool) -> None:
        text = serializers.dumps_returned(value, task_name=echo.name, serializer="pickle")
        done = Completion(id=claim.id, fence=claim.fence, duration=0.1, returned=text)
        is_held, was_us = self.holds(claim), self.was_completed_by(claim)

        if is_batch:
            lost = lifecycle.complete_many([done], using=USING)
            assert lost == ([] if is_held or was_us else [done])
        else:
            with nullcontext() if is_held else pytest.raises(LeaseLost), transaction.atomic():
                lifecycle.complete(done, using=USING)

        if is_held:
            self.rows[claim.id].status, self.rows[claim.id].returned = "completed", value

    @rule(held=st.lists(claims, min_size=2, max_size=4, unique_by=lambda claim: claim.id))
    def complete_batch(self, held: list[Claim]) -> None:
        text = serializers.dumps_returned(0, task_name=echo.name, serializer="pickle")
        batch = [Completion(id=c.id, fence=c.fence, duration=0.1, returned=text) for c in held]
        completed = [c for c in held if self.holds(c)]
        expected = {c.id for c in held if c not in completed and not self.was_completed_by(c)}

        lost = lifecycle.complete_many(batch, using=USING)

        assert {c.id for c in lost} == expected
        for c in completed:
            self.rows[c.id].status, self.rows[c.id].returned = "completed", 0

    @rule(claim=claims, asked=st.sampled_from([None, 0, 3600]))
    def fail(self, claim: Claim, asked: float | None) -> None:
        error = ValueError("no") if asked is None else Retry(asked)
        if not self.settle(claim, error):
            return
        if self.rows[claim.id].retries < self.rows[claim.id].max_retries:
            row = self.end_attempt(claim, "created", "retried", due=asked == 0)
            row.retries += 1
            row.rescues = row.lost_alone = 0
        else:
            self.end_attempt(claim, "failed", "failed")

    @rule(claim=claims, delay=st.sampled_from([0, 3600]))
    def snooze(self, claim: Claim, delay: int) -> None:
        if self.settle(claim, Snooze(delay)):
            row = self.end_attempt(claim, "created", "snoozed", due=delay == 0)
            row.rescues = row.lost_alone = 0

    @rule(claim=claims)
    def cancel_from_inside(self, claim: Claim) -> None:
        if self.settle(claim, Cancel("enough")):
            self.end_attempt(claim, "cancelled", "cancelled")

    @rule(claim=claims)
    def interrupt(self, claim: Claim) -> None:
        if self.settle(claim, StopRequested(), is_interrupted=True):
            self.end_attempt(claim, "created", "released")

    # --- accidents

    @rule(consumer=consumers)
    def expire(self, consumer: int) -> None:
        ConsumerModel.objects.filter(pk=consumer).update(renewed_at=SecondsFromNow(-3600))
        if consumer in self.live:
            self.live[consumer].is_late = True

    @rule(consumer=consumers)
    def unregister(self, consumer: int) -> None:
        strays = fencing.strays_of(consumer, held=set(), using=USING)
        held = {(claim.id, claim.fence) for claim in strays}
        assert held == {
            (pk, row.fence)
            for pk, row in self.rows.items()
            if (row.status, row.consumer) == ("running", consumer)
        }
        if not held:
            leases.unregister(consumer, using=USING)
            self.live.pop(consumer, None)

    def look(self, looker: int) -> list[ConsumerModel]:
        """Take the first look, and check whom it marks."""
        found = leases.suspects(using=USING, besides=looker)

        for pk, consumer in self.live.items():
            consumer.is_suspected |= pk != looker and consumer.is_late
        marked = {pk for pk, it in self.live.items() if it.is_suspected and pk != looker}
        assert {suspect.pk for suspect in found} == marked
        return found

    @rule(looker=consumers, between=st.sampled_from(["nothing", "nothing", "renewed", "late"]))
    def rescue(self, looker: int, between: str) -> None:
        for suspect in self.look(looker):
            if between == "renewed":
                self.renew(suspect.pk)
            elif between == "late":
                # Renewed, and late again: the second look must not take it for the first.
                self.renew(suspect.pk)
                self.expire(suspect.pk)
                self.look(looker)
            settlements = leases.rescue(suspect, using=USING)
            if between != "nothing":
                assert settlements is None
                continue
            assert settlements is not None
            self.check_rescued(suspect.pk, [it.claim.id for it in settlements])

    def check_rescued(self, consumer: int, rescued: list[int]) -> None:
        held = [
            pk
            for pk, row in self.rows.items()
            if (row.status, row.consumer) == ("running", consumer)
        ]
        assert sorted(rescued) == held
        for pk in held:
            row = self.rows[pk]
            row.lost_alone += len(held) == 1 and row.rescues >= 2
            row.rescues += 1
            is_over = row.lost_alone > MAX_RESCUES
            row.status = "failed" if is_over else "created"
            row.history.append("failed" if is_over else "lost")
            row.consumer = row.consumer if is_over else None
        del self.live[consumer]

    @rule(consumer=consumes(consumers), times=st.integers(1, 6))
    def keeps_killing_its_consumers(self, consumer: int, times: int) -> None:
        """The same row lost again and again, alone: this is how a task is found out."""
        self.unregister(consumer)
        pk = echo.using(queue="killer").schedule(1).pk
        self.rows[pk] = Row("killer", 0, 0, is_due=True)
        for _ in range(times):
            victim = self.register()
            self.claim_from(victim, "killer", 0, 1)
            self.expire(victim)
            suspects = self.look(0)
            for suspect in suspects:
                if suspect.pk == victim:
                    settlements = leases.rescue(suspect, using=USING)
                    assert settlements is not None
                    self.check_rescued(victim, [it.claim.id for it in settlements])
        # Out of the way of the other rules, in whatever state it is.
        lifecycle.cancel([pk], using=USING)
        if self.rows[pk].status == "created":
            self.rows[pk].withdraw()

    # --- after every step

    @invariant()
    def every_row_is_as_the_model_says(self) -> None:
        is_due = Exists(TaskModel.objects.due().filter(pk=OuterRef("pk")))
        history: dict[int, list[str]] = {}
        for pk, outcome in TaskAttempt.objects.values_list("task_id", "outcome").order_by("id"):
            history.setdefault(pk, []).append(outcome)
        found: dict[int, Any] = {row.pk: row for row in TaskModel.objects.annotate(is_due=is_due)}

        assert {pk: self.seen(row, history) for pk, row in found.items()} == {
            pk: self.expected(row) for pk, row in self.rows.items()
        }
        for pk, row in found.items():
            assert row.is_due == self.rows[pk].can_start
            assert (row.completed is not None) == (row.status == "completed")
            assert (row.failed is not None) == (row.status == "failed")

    @invariant()
    def every_consumer_is_as_the_model_says(self) -> None:
        assert {
            pk: suspected_at is not None
            for pk, suspected_at in ConsumerModel.objects.values_list("pk", "suspected_at")
        } == {pk: consumer.is_suspected for pk, consumer in self.live.items()}

    def seen(self, row: TaskModel, history: dict[int, list[str]]) -> dict[str, Any]:
        return {
            "queue": row.queue,
            "priority": row.priority,
            "max_retries": row.max_retries,
            "status": row.status,
            "fence": row.fence,
            "consumer": row.consumer if row.status == "running" else None,
            "retries": row.retry_attempts,
            "rescues": row.rescues,
            "lost_alone": row.lost_alone,
            "returned": row.returned,
            "history": history.get(row.pk, []),
        }

    def expected(self, row: Row) -> dict[str, Any]:
        values = asdict(row)
        del values["is_due"], values["cancelled_fence"]
        if row.status != "running":
            values["consumer"] = None
        return values


# Bounded for CI.  A longer search: raise max_examples here and run it overnight.
BOUNDS = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# It takes seconds; but once it fails, Hypothesis shrinks for up to five minutes.
@pytest.mark.timeout(400)
@pytest.mark.django_db
def test_every_row_is_at_every_moment_what_a_plain_dictionary_says():
    run_state_machine_as_test(QueueMachine, settings=BOUNDS)
