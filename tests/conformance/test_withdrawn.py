"""What waits and was claimed before leaves a trace in history when its call is given up."""

import pytest
from django.db import transaction

from firefly_jobs import lifecycle
from firefly_jobs.models import TaskAttempt, TaskModel
from tests.conformance.support import claim_one, outcomes
from tests.testapp import tasks

pytestmark = pytest.mark.django_db(transaction=True)

KEYED = tasks.add.using(unique_key="k", on_conflict="replace")


def claimed_and_released(row: TaskModel) -> TaskModel:
    lifecycle.release([claim_one()], using="default")
    row.refresh_from_db()
    assert (row.status, row.fence > 0) == ("created", True)
    return row


def test_what_was_never_claimed_leaves_nothing():
    KEYED.schedule(1, 2)
    row = KEYED.schedule(3, 4)

    assert row.cancel()
    assert not TaskAttempt.objects.exists()


def test_cancelling_what_was_claimed_is_kept_once_for_each_claim():
    row = claimed_and_released(tasks.add.schedule(1, 2))
    for _ in range(2):
        assert row.cancel()
        assert row.retry_now()
    claimed_and_released(row)
    assert row.cancel()

    assert outcomes(row) == ["cancelled", "cancelled"]
    assert list(row.attempts.values_list("number", "fence", "error")) == [
        (0, 1, "cancelled while it waited"),
        (0, 2, "cancelled while it waited"),
    ]


def test_replacing_what_was_claimed_is_kept_once_for_each_claim():
    row = claimed_and_released(KEYED.schedule(1, 2))
    for _ in range(2):
        assert KEYED.schedule(3, 4).pk == row.pk

    attempt = row.attempts.get()
    assert (attempt.outcome, attempt.error) == ("cancelled", "replaced by a later call")
    row.refresh_from_db()
    assert (row.status, row.params["args"]) == ("created", (3, 4))


def test_a_cancelling_that_is_rolled_back_leaves_nothing():
    row = claimed_and_released(tasks.add.schedule(1, 2))

    def cancel() -> None:
        with transaction.atomic():
            assert row.cancel()
            undo = RuntimeError("undo")
            raise undo

    with pytest.raises(RuntimeError, match="undo"):
        cancel()

    row.refresh_from_db()
    assert (row.status, outcomes(row)) == ("created", [])


def test_what_runs_or_has_ended_is_not_withdrawn():
    row = tasks.add.schedule(1, 2)
    held = claim_one()

    assert not row.cancel()
    lifecycle.release([held], using="default")
    assert row.cancel()
    assert not row.cancel()

    assert outcomes(row) == ["cancelled"]
