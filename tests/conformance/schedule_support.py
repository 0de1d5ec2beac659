"""Write schedules, let them be late, fire them, and read what became of them."""

from datetime import UTC, datetime, timedelta

from firefly_jobs import firing
from firefly_jobs.models import ScheduleModel
from firefly_jobs.recurring_jobs import recurring_job
from tests.conformance import tasks
from tests.factories import unique_name


def call_of(body):
    """Return a job that calls a test's function."""
    key = unique_name("scheduled")
    tasks.BODIES[key] = body
    return tasks.call.job.with_args(key)


def every(seconds=60, job=None, name="often", **options):
    """Write a schedule of an interval, at run time."""
    return recurring_job(name, job or tasks.nothing.job, every=seconds, **options)


def late(schedule, seconds):
    """Move a schedule into the past, so that its next run was due so many seconds ago."""
    schedule.refresh_from_db()
    back = schedule.next_run - datetime.now(UTC) + timedelta(seconds=seconds)
    ScheduleModel.objects.filter(pk=schedule.pk).update(
        created=schedule.created - back, next_run=schedule.next_run - back
    )
    schedule.refresh_from_db()
    return schedule.next_run


def fire():
    return firing.fire_due(using="default").calls


def agenda(**words):
    """Return in how many seconds the first may fire, and which wait for their former calls."""
    return firing.agenda(using="default", ahead_seconds=5.0, **words)[:2]


def read(schedule, *names):
    schedule.refresh_from_db()
    values = tuple(getattr(schedule, name) for name in names)
    return values if len(names) > 1 else values[0]


def occurrences(schedule):
    return [task.occurrence for task in schedule.tasks.order_by("occurrence")]
