"""A call that has not started in time is cancelled, by whoever would start it."""

from datetime import timedelta
from time import monotonic

import pytest
from django.utils import timezone

from firefly_jobs import Snooze, lifecycle
from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.exceptions import Withdrawn
from firefly_jobs.executors.calls import refuse_if_withdrawn
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    ago,
    claim_one,
    effects,
    outcomes,
    run_burst,
    run_until_ended,
    schedule,
)
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)


def late(body=tasks.nothing, **options):
    """Schedule a call that has expired a minute ago."""
    row = body.using(**options).schedule() if body is tasks.nothing else body()
    TaskModel.objects.filter(pk=row.pk).update(expires_at=ago(60))
    return row


def ended(row):
    row.refresh_from_db()
    return row.status, row.error


def test_a_call_that_expired_is_cancelled_and_not_called():
    row = late(lambda: schedule(lambda: Effect.objects.create(task_key="x", value=1)))

    run_burst()

    assert ended(row) == ("cancelled", "expired")
    assert effects() == []
    assert outcomes(row) == ["cancelled"]
    assert row.attempts.get().number == 0
    assert row.attempts.get().error == "expired"
    assert row.started is None
    assert not row.already_run


def test_coroutines_and_groups_expire_as_well():
    async def body():
        raise AssertionError

    rows = [
        late(lambda: schedule(body)),
        late(tasks.insert_in_groups.schedule),
        late(lambda: schedule(lambda: None, atomic=False)),
    ]

    run_burst(group_commit=True)

    assert [ended(row) for row in rows] == [("cancelled", "expired")] * 3


def test_a_function_that_no_consumer_knows_expires_all_the_same():
    row = late()
    TaskModel.objects.filter(pk=row.pk).update(func_name="gone.function")

    run_burst()

    assert ended(row) == ("cancelled", "expired")


def test_a_call_that_is_started_in_time_runs():
    row = tasks.nothing.using(expires=60).schedule()

    run_burst()

    assert ended(row) == ("completed", "")


def test_a_call_that_was_given_back_expires_later():
    row = tasks.nothing.using(expires=0.5).schedule()
    held = claim_one()
    assert held.start_by is not None
    lifecycle.release([held], using="default")
    eventually(_assert_late)

    run_burst()

    assert ended(row) == ("cancelled", "expired")


def _assert_late():
    assert TaskModel.objects.filter(expires_at__lt=DatabaseNow()).exists()


def test_the_seconds_left_are_counted_by_the_clock_of_the_database():
    tasks.nothing.using(expires=100).schedule()

    before = monotonic()
    start_by = claim_one().start_by

    assert start_by is not None
    assert 60 < start_by - before <= 100.01


def test_a_call_is_not_started_once_its_moment_has_passed():
    tasks.nothing.using(expires=100).schedule()
    held = claim_one()

    refuse_if_withdrawn(held)
    refuse_if_withdrawn(held._replace(start_by=None))
    with pytest.raises(Withdrawn):
        refuse_if_withdrawn(held._replace(start_by=monotonic()))


def test_once_started_it_does_not_expire():
    runs = []

    def body():
        runs.append(1)
        if len(runs) == 1:
            raise Snooze(0)

    row = schedule(body, expires=0.5)
    run_until_ended(row)

    assert ended(row) == ("completed", "")
    assert row.expires_at is None


def test_seconds_count_from_the_moment_that_it_is_due():
    eta = timezone.now() + timedelta(hours=1)

    later = tasks.nothing.using(expires=60).schedule(eta=eta)
    now = tasks.nothing.using(expires=timedelta(minutes=1)).schedule()

    assert later.expires_at == eta + timedelta(minutes=1)
    now.refresh_from_db()
    assert now.expires_at is not None
    assert now.expires_at - now.created == timedelta(minutes=1)


def test_an_expiry_before_the_eta_is_refused():
    soon = timezone.now() + timedelta(minutes=1)

    with pytest.raises(ValueError, match="expires must be after eta"):
        tasks.nothing.using(expires=soon).schedule(eta=soon)

    assert not TaskModel.objects.exists()


def test_an_expired_call_that_a_person_revives_runs():
    row = late()
    run_burst()

    row.refresh_from_db()
    assert row.retry_now()
    run_burst()

    assert ended(row) == ("completed", "")
