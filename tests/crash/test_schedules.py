"""A consumer that is killed while it fires a schedule; others fire each occurrence once."""

import signal
from datetime import timedelta

import pytest
from django.db.models import F

from firefly_jobs.checkpoints import FIRING_CHECKPOINTS
from firefly_jobs.models import ScheduleModel
from firefly_jobs.recurring_jobs import recurring_job
from tests.crash import tasks
from tests.crash.conftest import describe_rows, effects, stops_in_order
from tests.support.waiting import eventually

MISSED = 5


def due_schedule(**options):
    """Write a schedule of whose occurrences some were missed."""
    job = tasks.write.job.with_args("fired")
    schedule = recurring_job(
        "often", job, every=3_600, misfire="all", overlap="allow", max_runs=MISSED, **options
    )
    back = timedelta(hours=MISSED, minutes=30)
    rows = ScheduleModel.objects.filter(pk=schedule.pk)
    rows.update(next_run=F("next_run") - back, created=F("created") - back)
    return schedule


@pytest.mark.parametrize("checkpoint", FIRING_CHECKPOINTS)
@pytest.mark.django_db(transaction=True)
def test_occurrences_of_a_consumer_that_was_killed_as_it_fired_them_fire_once(consume, checkpoint):
    schedule = due_schedule()
    dying = consume(checkpoint=f"{checkpoint}:kill")
    assert dying.wait() == -signal.SIGKILL

    survivor = consume()

    def is_done():
        schedule.refresh_from_db()
        found = (schedule.run_count, schedule.success_count, schedule.operation)
        assert found == (MISSED, MISSED, "idle"), describe_rows()

    eventually(is_done, timeout_seconds=20.0)
    assert effects() == {"fired": MISSED}
    moments = [task.occurrence for task in schedule.tasks]
    assert len(set(moments)) == len(moments) == MISSED
    stops_in_order(survivor)


@pytest.mark.django_db(transaction=True)
def test_occurrences_of_two_consumers_fire_once_each_second(consume):
    job = tasks.write.job.with_args("fired")
    schedule = recurring_job(
        "each second", job, every=1, misfire="all", overlap="allow", max_runs=3
    )
    both = [consume(), consume()]

    def is_done():
        schedule.refresh_from_db()
        assert (schedule.success_count, schedule.next_run) == (3, None), describe_rows()

    eventually(is_done, timeout_seconds=30.0)
    assert effects() == {"fired": 3}
    for consumer in both:
        stops_in_order(consumer)
