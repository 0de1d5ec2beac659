"""``CeleryJob`` without a worker: which call a row waits for, and what cannot be asked of it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from celery import Celery

from firefly_jobs import Job, lifecycle
from firefly_jobs.attempts import decide_rescued
from firefly_jobs.contrib.celery import CeleryJob, install
from firefly_jobs.contrib.celery import app as bridge
from firefly_jobs.models import TaskAttempt, TaskModel
from tests.conformance.support import ago, claim_one, outcomes, run_burst

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def unserved() -> Iterator[Celery]:
    """Install an application that nobody works for."""
    app = Celery("unserved", broker="memory://", backend="cache+memory://", set_as_current=False)
    install(app)
    yield app
    app.close()
    bridge._installed.clear()


def look(row: TaskModel) -> str:
    """Make a row due and consume it; return the id of the Celery call that it waits for."""
    TaskModel.objects.filter(status="created").update(not_before=None)
    run_burst()
    row.refresh_from_db()
    return row.error.rpartition(" ")[2]


def ends(app: Celery, celery_id: str, row: TaskModel, result: str) -> None:
    """Do what a worker does that has ended a call."""
    app.backend.store_result(celery_id, result, "SUCCESS")
    request = {bridge.HEADER: ["default", row.pk], "id": celery_id}
    bridge._ended(task=SimpleNamespace(request=request), state="SUCCESS")


def test_a_call_that_is_replaced_while_it_waits_has_the_result_of_its_new_arguments(unserved):
    job = CeleryJob("tests.add", [1], unique_key="k", on_conflict="replace")
    row = job.schedule()
    former = look(row)
    assert look(row) == former
    assert job.with_args("tests.add", [2], {}).with_eta(ago(-600)).schedule().pk == row.pk

    # Reported to nobody: the row is not due before its time.
    ends(unserved, former, row, "of [1]")
    assert not TaskModel.objects.due().exists()
    latter = look(row)
    ends(unserved, latter, row, "of [2]")
    run_burst()
    row.refresh_from_db()

    assert (row.status, row.params["args"]) == ("completed", ("tests.add", [2], {}))
    assert row.returned == {"celery_task_id": latter, "result": "of [2]"}
    assert outcomes(row) == ["snoozed", "cancelled", "snoozed"]
    assert latter != former


def test_a_call_that_was_cancelled_and_is_revived_is_made_again(unserved):
    row = CeleryJob("tests.add", [1], silence=60).schedule()
    former = look(row)
    assert row.cancel()
    TaskAttempt.objects.update(ended=ago(3_600))
    ends(unserved, former, row, "of the former")
    assert row.retry_now()

    latter = look(row)

    assert (row.status, row.error) == ("created", f"handed over to Celery as {latter}")
    assert latter != former
    assert look(row) == latter


def test_a_loss_while_a_call_is_waited_for_does_not_make_it_again(unserved):
    row = CeleryJob("tests.add", [1]).schedule()
    celery_id = look(row)
    TaskModel.objects.update(not_before=None)
    lifecycle.settle(
        decide_rescued(claim_one(), was_alone=False, consumer="c", max_rescues=3),
        using="default",
        consumer=1,
    )

    assert look(row) == celery_id
    ends(unserved, celery_id, row, "of the call")
    run_burst()
    row.refresh_from_db()

    assert (row.status, outcomes(row)) == ("completed", ["snoozed", "lost"])


def test_looks_that_find_nothing_new_are_no_events(unserved, settings):
    settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, "KEEP_EVENTS": True}
    row = CeleryJob("tests.add", [1]).schedule()
    handed_over = look(row)
    assert look(row) == look(row) == handed_over
    ends(unserved, handed_over, row, "of the call")
    run_burst()

    attempt = ["claimed", "started"]
    found = list(row.events.all())
    assert [e.kind for e in found] == [
        *("scheduled", *attempt, "snoozed"),
        *(*attempt, "completed"),
    ]
    assert all(e.consumer is not None for e in found[1:])
    assert max(found[1].at, found[2].at) <= found[3].at


def test_the_loss_of_a_look_is_an_event(unserved, settings):
    settings.FIREFLY_JOBS = {**settings.FIREFLY_JOBS, "KEEP_EVENTS": True}
    row = CeleryJob("tests.add", [1]).schedule()
    lost = decide_rescued(claim_one(), was_alone=False, consumer="c", max_rescues=3)
    lifecycle.settle(lost, using="default", consumer=7)

    assert [e.kind for e in row.events.all()] == ["scheduled", "claimed", "rescued"]


@pytest.mark.parametrize("word", ["concurrency", "rate_limit"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **limit: CeleryJob("tests.add", **limit),
        lambda **limit: CeleryJob("tests.add").with_options(**limit),
        CeleryJob.task.using,
        lambda **limit: Job(CeleryJob.task, **limit),
        lambda **limit: type("Limited", (CeleryJob,), {"__module__": __name__, **limit}),
    ],
)
def test_a_limit_that_would_do_nothing_is_refused_where_it_is_given(make, word):
    limit = {"concurrency": 1, "rate_limit": "1/s"}[word]

    with pytest.raises(ValueError, match=rf"{word} would do nothing for .*Limit it there"):
        make(**{word: limit})
