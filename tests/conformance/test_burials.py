"""A supervisor frees the rows of its dead at once, and blames whom it knows to be guilty."""

import threading

import pytest
from django.db import OperationalError, connection, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from firefly_jobs import leases, lifecycle
from firefly_jobs.attempts import Ended, Settlement, Verdict
from firefly_jobs.burials import Burials, Death
from firefly_jobs.exceptions import LeaseLost, TimeLimitExceeded
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from firefly_jobs.states import Status
from tests.conformance import tasks
from tests.conformance.support import (
    TABLE,
    claim,
    claim_one,
    on_servers,
    outcomes,
    query,
    run_burst,
    second_connection,
)
from tests.support.waiting import eventually

pytestmark = pytest.mark.django_db(transaction=True)


def child(**fields):
    """Write the row of a consumer that has renewed its lease just now."""
    return ConsumerModel.objects.create(
        name="host:1", queues="default", **({"lease_seconds": 300.0} | fields)
    )


def limit_exceeded(claimed):
    error = TimeLimitExceeded("too long")
    return Verdict(task_id=claimed.id, fence=claimed.fence, error=error, duration=2.0)


def bury(consumer, **options):
    return leases.bury(consumer.pk, using="default", **options)


def counters(row):
    row.refresh_from_db()
    return row.status, row.retry_attempts, row.rescues, row.lost_alone


def test_rows_of_the_dead_are_freed_though_their_lease_is_fresh():
    rows = [tasks.nothing.schedule() for _ in range(3)]
    dead, other = child(), child()
    claim(consumer=dead.pk)
    held = tasks.nothing.schedule()
    claim_one(consumer=other.pk)

    settlements, are_all = bury(dead)

    assert (len(settlements), are_all) == (3, True)
    assert [counters(row) for row in rows] == [("created", 0, 1, 0)] * 3
    assert [outcomes(row) for row in rows] == [["lost"]] * 3
    assert counters(held)[0] == "running"
    assert list(ConsumerModel.objects.all()) == [other]


def test_what_the_dead_would_still_settle_changes_nothing():
    tasks.nothing.schedule()
    dead = child()
    claimed = claim_one(consumer=dead.pk)
    bury(dead)

    with pytest.raises(LeaseLost):
        lifecycle.settle(
            Settlement(claim=claimed, ended=Ended.FAILED, status=Status.FAILED, duration=0.0),
            using="default",
            consumer=dead.pk,
        )

    assert TaskModel.objects.get().status == "created"


def test_dead_consumer_that_others_have_rescued_is_no_surprise():
    assert leases.bury(12_345, using="default") == ([], True)


def test_rows_that_carry_the_id_of_a_rescued_consumer_are_freed_as_well():
    row = tasks.nothing.schedule()
    claim_one(consumer=12_345)

    leases.bury(12_345, using="default")

    assert counters(row)[0] == "created"


@pytest.mark.parametrize(("rescues", "blamed"), [(1, 0), (2, 1)])
def test_task_that_ran_alone_is_blamed_by_the_rules_of_rescue(rescues, blamed):
    row = tasks.nothing.schedule()
    TaskModel.objects.update(rescues=rescues)
    dead = child()
    claim_one(consumer=dead.pk)

    bury(dead)

    assert counters(row) == ("created", 0, rescues + 1, blamed)


def test_call_beyond_its_limit_has_failed_and_its_neighbours_count_nothing():
    guilty, innocent = tasks.nothing.schedule(), tasks.nothing.schedule()
    TaskModel.objects.update(rescues=2)
    TaskModel.objects.filter(pk=guilty.pk).update(max_retries=1, retry_delay=60)
    dead = child()
    claims = {claimed.id: claimed for claimed in claim(consumer=dead.pk)}

    settlements, _ = bury(dead, verdict=limit_exceeded(claims[guilty.pk]))

    assert len(settlements) == 2
    # It ended for reasons of its own, so its losses are forgotten, as with any retry.
    assert counters(guilty) == ("created", 1, 0, 0)
    assert guilty.error == "TimeLimitExceeded: too long"
    assert guilty.not_before is not None
    attempt = guilty.attempts.get()
    assert (attempt.outcome, attempt.duration, attempt.consumer) == ("retried", 2.0, dead.pk)
    assert counters(innocent) == ("created", 0, 2, 0)
    assert outcomes(innocent) == ["lost"]
    assert innocent.error.startswith("ConsumerLost")
    assert f"because of task {guilty.pk}" in innocent.error


def test_call_beyond_its_limit_fails_without_a_retry_left():
    row = tasks.nothing.schedule()
    dead = child()
    claimed = claim_one(consumer=dead.pk)

    bury(dead, verdict=limit_exceeded(claimed))

    assert counters(row) == ("failed", 0, 0, 0)
    assert row.failed is not None
    assert "TimeLimitExceeded: too long" in row.attempts.get().traceback


def test_verdict_about_a_former_fence_is_no_verdict_about_this_one():
    row = tasks.nothing.schedule()
    dead = child()
    claimed = claim_one(consumer=dead.pk)
    lifecycle.release([claimed], using="default")
    claim_one(consumer=dead.pk)

    bury(dead, verdict=limit_exceeded(claimed))

    assert counters(row) == ("created", 0, 0, 0)


def test_verdict_about_a_call_that_was_settled_in_time_changes_nothing():
    row = tasks.nothing.schedule()
    run_burst()
    row.refresh_from_db()
    verdict = Verdict(
        task_id=row.pk, fence=row.fence, error=TimeLimitExceeded("too long"), duration=2.0
    )

    assert bury(child(), verdict=verdict) == ([], True)

    assert counters(row)[0] == "completed"


@pytest.mark.parametrize("vendor", [pytest.param(m.name, marks=m) for m in on_servers])
def test_rows_that_a_transaction_has_locked_are_left_and_said_to_be(vendor):
    locked, free = tasks.nothing.schedule(), tasks.nothing.schedule()
    dead = child()
    claim(consumer=dead.pk)

    with second_connection() as other:
        other.set_autocommit(False)
        query(other, f"UPDATE {TABLE} SET error = 'x' WHERE id = {locked.pk}")
        settlements, are_all = bury(dead)
        other.rollback()
        other.set_autocommit(True)

    assert ([item.claim.id for item in settlements], are_all) == ([free.pk], False)
    assert counters(locked)[0] == "running"
    assert ConsumerModel.objects.filter(pk=dead.pk).exists()
    assert bury(dead)[1]
    assert counters(locked) == ("created", 0, 1, 0)
    assert not ConsumerModel.objects.exists()


# --- on the supervisor's thread


@pytest.fixture
def burials():
    """Return burials that run, and what they have reported."""
    reported: list[list[Settlement]] = []
    thread = Burials(using="default", on_buried=reported.append)
    thread.start()
    yield thread, reported
    thread.stop(timeout_seconds=10.0)
    assert not thread.is_alive()


def all_reported(reported, count):
    def are_reported() -> None:
        assert len(reported) == count

    eventually(are_reported)


def test_all_ids_of_a_process_are_dealt_with_and_the_connection_is_closed(burials):
    thread, reported = burials
    rows = [tasks.nothing.schedule() for _ in range(2)]
    former, latter = child(), child()
    claim("default", limit=1, consumer=former.pk)
    claim("default", limit=1, consumer=latter.pk)

    thread.add(Death(consumers=(former.pk, latter.pk)))

    all_reported(reported, 1)
    assert len(reported[0]) == 2
    assert {counters(row)[0] for row in rows} == {"created"}
    assert thread.pending == 0


@pytest.mark.parametrize("vendor", [pytest.param(m.name, marks=m) for m in on_servers])
def test_locked_rows_are_looked_for_again_until_they_are_free(burials, vendor):
    thread, reported = burials
    row = tasks.nothing.schedule()
    dead = child()
    claim_one(consumer=dead.pk)

    with transaction.atomic():
        query(connection, f"UPDATE {TABLE} SET error = 'x' WHERE id = {row.pk}")
        thread.add(Death(consumers=(dead.pk,)))
        threading.Event().wait(0.5)
        assert reported == []

    all_reported(reported, 1)
    assert counters(row) == ("created", 0, 1, 0)


def test_burial_that_the_database_refuses_is_left_to_others_and_the_next_is_not(
    burials, monkeypatch, caplog
):
    thread, reported = burials
    tasks.nothing.schedule()
    dead = child()
    claim_one(consumer=dead.pk)
    real = leases.bury

    def refuse(consumer, **options):
        if consumer != dead.pk:
            raise OperationalError
        return real(consumer, **options)

    monkeypatch.setattr(leases, "bury", refuse)

    thread.add(Death(consumers=(dead.pk + 1,)))
    thread.add(Death(consumers=(dead.pk,)))

    all_reported(reported, 2)
    assert f"The tasks of consumer {dead.pk + 1} are left to other consumers" in caplog.text
    assert [len(settlements) for settlements in reported] == [0, 1]
    assert TaskAttempt.objects.count() == 1


def test_next_burial_is_dealt_with_although_the_connection_could_not_be_closed(
    burials, monkeypatch, caplog
):
    thread, reported = burials
    row = tasks.nothing.schedule()
    dead = child()
    claim_one(consumer=dead.pk)
    real, failures = BaseDatabaseWrapper.close, [OperationalError("gone")]

    def close(wrapper):
        if threading.current_thread() is thread and failures:
            raise failures.pop()
        real(wrapper)

    monkeypatch.setattr(BaseDatabaseWrapper, "close", close)

    thread.add(Death(consumers=(dead.pk + 1,)))
    thread.add(Death(consumers=(dead.pk,)))

    all_reported(reported, 2)
    assert thread.pending == 0
    assert counters(row)[0] == "created"
    assert "The tasks of a dead process could not be rescued" in caplog.text


def test_burials_end_once_they_have_dealt_with_what_they_were_told(burials):
    thread, reported = burials
    rows = [tasks.nothing.schedule() for _ in range(3)]
    for _ in rows:
        dead = child()
        claim("default", limit=1, consumer=dead.pk)
        thread.add(Death(consumers=(dead.pk,)))

    thread.stop(timeout_seconds=20.0)

    assert not thread.is_alive()
    assert len(reported) == 3
    assert {counters(row)[0] for row in rows} == {"created"}
