"""A running row changes only for the holder of its fence."""

import logging

import pytest
from django.db import transaction

from firefly_jobs import current_task, fencing, leases, lifecycle
from firefly_jobs.attempts import Ended, Settlement
from firefly_jobs.databases import Completion
from firefly_jobs.exceptions import LeaseLost
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from firefly_jobs.states import Status
from tests.conformance import tasks
from tests.conformance.support import (
    claim,
    claim_one,
    dead_consumer,
    effects,
    outside,
    run_burst,
    schedule,
    take_over,
)
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def state_of(row):
    return TaskModel.objects.values().get(pk=row.pk)


def completion(held):
    return Completion(held.id, held.fence, 0.5, "result")


def settlement(held, ended, status, **values):
    return Settlement(claim=held, ended=ended, status=status, duration=0.5, **values)


SETTLEMENTS = [
    (Ended.COMPLETED, Status.COMPLETED, {"returned": "result"}),
    (Ended.FAILED, Status.FAILED, {"error": "ValueError"}),
    (Ended.CANCELLED, Status.CANCELLED, {"error": "no"}),
    (Ended.RETRIED, Status.CREATED, {"delay_seconds": 5.0, "retries": 1}),
    (Ended.SNOOZED, Status.CREATED, {"delay_seconds": 5.0}),
    (Ended.LOST, Status.CREATED, {"delay_seconds": 5.0, "rescues": 1}),
    (Ended.RELEASED, Status.CREATED, {}),
]


def stolen_claim():
    """Return a claim whose row another consumer holds by now, and the row's state."""
    row = tasks.nothing.schedule()
    stale = claim_one()
    current = take_over(stale)
    assert current.fence == stale.fence + 1
    return stale, current, row, state_of(row)


def test_completing_under_an_old_fence_changes_nothing():
    stale, _, row, before = stolen_claim()

    with pytest.raises(LeaseLost), transaction.atomic():
        lifecycle.complete(completion(stale), using="default")

    assert state_of(row) == before


@pytest.mark.parametrize(("ended", "status", "values"), SETTLEMENTS)
def test_settling_under_an_old_fence_changes_nothing(ended, status, values):
    stale, _, row, before = stolen_claim()

    with pytest.raises(LeaseLost):
        lifecycle.settle(settlement(stale, ended, status, **values), using="default", consumer=1)

    assert state_of(row) == before
    assert not TaskAttempt.objects.exists()


@pytest.mark.parametrize(("ended", "status", "values"), SETTLEMENTS)
def test_settling_twice_under_one_fence_changes_nothing_the_second_time(ended, status, values):
    row = tasks.nothing.schedule()
    held = claim_one()
    outcome = settlement(held, ended, status, **values)
    lifecycle.settle(outcome, using="default", consumer=1)
    before, attempts = state_of(row), TaskAttempt.objects.count()

    with pytest.raises(LeaseLost):
        lifecycle.settle(outcome, using="default", consumer=1)

    assert state_of(row) == before
    assert TaskAttempt.objects.count() == attempts


def test_releasing_under_an_old_fence_changes_nothing():
    stale, _, row, before = stolen_claim()

    assert lifecycle.release([stale], using="default") == 0

    assert state_of(row) == before


def test_the_holder_of_the_newest_fence_settles():
    _, current, row, _ = stolen_claim()

    lifecycle.complete(completion(current), using="default")

    assert state_of(row)["status"] == "completed"


def test_a_running_row_never_becomes_blocked_by_settling():
    row = tasks.nothing.schedule()
    held = claim_one()
    before = state_of(row)

    with pytest.raises(ValueError, match="cannot become blocked"):
        lifecycle.settle(
            settlement(held, Ended.RELEASED, Status.BLOCKED), using="default", consumer=1
        )

    assert state_of(row) == before


# --- many at once


def test_a_stale_member_is_reported_and_the_others_are_completed():
    rows = [tasks.nothing.schedule() for _ in range(5)]
    held = claim()
    assert lifecycle.release([held[2]], using="default") == 1
    claim_one(consumer=2)
    before = state_of(rows[2])

    lost = lifecycle.complete_many([completion(item) for item in held], using="default")

    assert lost == [completion(held[2])]
    assert state_of(rows[2]) == before
    others = [state_of(row)["status"] for row in rows if row.pk != rows[2].pk]
    assert others == ["completed"] * 4


def test_a_stale_member_that_another_has_completed_is_reported():
    stale, current, row, _ = stolen_claim()
    lifecycle.complete(completion(current), using="default")
    before = state_of(row)

    assert lifecycle.complete_many([completion(stale)], using="default") == [completion(stale)]

    assert state_of(row) == before


def test_completing_the_same_batch_twice_reports_nobody_as_lost():
    tasks.nothing.schedule()
    tasks.nothing.schedule()
    batch = [completion(item) for item in claim()]
    assert lifecycle.complete_many(batch, using="default") == []

    assert lifecycle.complete_many(batch, using="default") == []


def test_a_batch_keeps_results_of_any_length_and_alphabet():
    for _ in range(3):
        tasks.nothing.schedule()
    values = ["", "ünïcode \N{SNOWMAN}", "x" * 70_000]
    batch = [
        Completion(item.id, item.fence, 0.25, value)
        for item, value in zip(claim(), values, strict=True)
    ]

    assert lifecycle.complete_many(batch, using="default") == []

    stored = TaskModel.objects.order_by("id").values_list("raw_returned", "duration")
    assert list(stored) == [(value, 0.25) for value in values]


# --- was it settled?


def test_was_settled_is_true_only_under_the_fence_that_settled():
    stale, current, _, _ = stolen_claim()
    assert not fencing.was_settled(stale, using="default")
    assert not fencing.was_settled(current, using="default")

    lifecycle.complete(completion(current), using="default")

    assert fencing.was_settled(current, using="default")
    assert fencing.was_settled(completion(current), using="default")
    assert not fencing.was_settled(stale, using="default")


def test_was_settled_is_false_of_a_retry_since_the_row_goes_on():
    tasks.nothing.schedule()
    held = claim_one()
    retried = settlement(held, Ended.RETRIED, Status.CREATED, delay_seconds=5.0, retries=1)
    lifecycle.settle(retried, using="default", consumer=1)

    assert not fencing.was_settled(held, using="default")


# --- rescue


def test_a_second_rescue_changes_nothing():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    claim_one(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    assert len(leases.rescue(suspect, using="default") or []) == 1
    before = state_of(row)

    assert leases.rescue(suspect, using="default") is None

    assert state_of(row) == before
    assert (before["status"], before["rescues"], before["consumer"]) == ("created", 1, None)
    assert TaskAttempt.objects.count() == 1


def test_a_rescue_takes_no_row_that_another_consumer_has_claimed_since():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    held = claim_one(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    take_over(held, consumer=dead.pk + 1)
    before = state_of(row)

    assert leases.rescue(suspect, using="default") == []

    assert state_of(row) == before
    assert not ConsumerModel.objects.filter(pk=dead.pk).exists()


def test_the_rescued_consumer_changes_nothing_afterwards():
    row = tasks.nothing.schedule()
    dead = dead_consumer()
    held = claim_one(consumer=dead.pk)
    (suspect,) = leases.suspects(using="default", besides=0)
    leases.rescue(suspect, using="default")
    before = state_of(row)

    with pytest.raises(LeaseLost), transaction.atomic():
        lifecycle.complete(completion(held), using="default")
    assert lifecycle.release([held], using="default") == 0
    assert not leases.renew(dead.pk, using="default")

    assert state_of(row) == before


# --- a running call whose row is taken over


def lose_lease():
    """Let the row of the running call be claimed by another, before its first query."""

    def take() -> None:
        row = TaskModel.objects.get(pk=task_id)
        TaskModel.objects.filter(pk=task_id).update(fence=row.fence + 1, consumer=999)

    task_id = current_task().id
    outside(take)


def test_effects_of_a_call_that_lost_its_lease_are_rolled_back(caplog):
    def body():
        lose_lease()
        Effect.objects.create(task_key="late", value=1)

    row = schedule(body)
    with caplog.at_level(logging.WARNING, "firefly_jobs"):
        run_burst(max_tasks=1)

    assert effects() == []
    row.refresh_from_db()
    assert (row.status, row.fence, row.consumer) == ("running", 2, 999)
    assert "LeaseLost" in caplog.text


@pytest.mark.parametrize("raises", [False, True])
def test_the_outcome_of_an_untouched_call_that_lost_its_lease_is_dropped(caplog, raises):
    def body():
        lose_lease()
        if raises:
            raise ValueError("late")

    row = schedule(body)
    with caplog.at_level(logging.WARNING, "firefly_jobs"):
        run_burst(max_tasks=1)

    row.refresh_from_db()
    assert (row.status, row.fence, row.consumer) == ("running", 2, 999)
    assert row.raw_returned is None
    assert not TaskAttempt.objects.exists()
    assert "LeaseLost" in caplog.text


def test_a_lost_lease_keeps_on_commit_callbacks_from_running():
    ran = []

    def body():
        transaction.on_commit(lambda: ran.append("callback"))
        lose_lease()

    schedule(body)
    run_burst(max_tasks=1)

    assert ran == []
