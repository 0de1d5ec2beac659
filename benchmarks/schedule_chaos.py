"""``schedule-chaos``: schedules that are due each second while a consumer is killed each second.

Afterwards it is counted what the database says: every occurrence from the first to the last
is there once, and none twice; each has left its effect once; the counts of the schedules
are those of the rows.  The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from django.db.models import QuerySet

from firefly_jobs.databases.functions import DatabaseNow
from firefly_jobs.models import ScheduleModel, TaskModel
from firefly_jobs.recurring_jobs import recurring_job

from . import chaos_tasks, tables
from .chaos import END_SECONDS, LOOK_SECONDS, MARKS, Fleet
from .figures import Figure
from .models import ChaosEffect
from .run import Run

KILL_SECONDS = 1.0
# Until the first occurrence, so that all consumers are there.
START_SECONDS = 3.0


def measure(run: Run) -> Iterator[Figure]:
    """Let schedules fire while consumers are killed."""
    tables.empty(tables.TASKS, tables.CHAOS_EFFECTS)
    ScheduleModel.objects.all().delete()
    seconds, count = int(run.sizes["seconds"]), run.size("schedules")
    start, end = _write(count, seconds)
    fleet = Fleet(run.place.url, run.size("consumers"))
    begin = time.monotonic()
    next_kill = START_SECONDS
    try:
        while (passed := time.monotonic() - begin) < START_SECONDS + seconds:
            if passed > next_kill:
                fleet.kill_one()
                next_kill = passed + KILL_SECONDS
            fleet.look()
            time.sleep(LOOK_SECONDS)
        last = time.monotonic() + END_SECONDS
        while _unfinished().exists() and time.monotonic() < last:
            fleet.look()
            time.sleep(LOOK_SECONDS)
        # The one that was killed last has a successor that has to hear signals before it gets one.
        time.sleep(START_SECONDS)
        fleet.stop()
    finally:
        fleet.close()
    wrong = _wrong(start, end)
    if any(wrong.values()):
        print(wrong, file=sys.stderr)
    yield run.figure(
        case=f"{count} schedules each second, {seconds} s, {run.size('consumers')} consumers",
        unit="wrong",
        value=sum(wrong.values()) + len(fleet.complaints),
        marks=MARKS,
        details={
            "occurrences": TaskModel.objects.filter(schedule__isnull=False).count(),
            "kills": fleet.kills,
            "wrong": wrong,
            "consumers": fleet.complaints,
        },
    )


def _write(count: int, seconds: int) -> tuple[datetime, datetime]:
    first = recurring_job("clock", chaos_tasks.write.job)
    moment = ScheduleModel.objects.filter(pk=first.pk).values_list(DatabaseNow(), flat=True)[0]
    first.delete()
    start = moment + timedelta(seconds=START_SECONDS)
    end = start + timedelta(seconds=seconds)
    for number in range(count):
        recurring_job(
            f"chaos {number}",
            chaos_tasks.write_at_once.job,
            every=1,
            starts_at=start,
            ends_at=end,
            misfire="all",
            overlap="allow",
        )
    return start, end


def _unfinished() -> QuerySet[ScheduleModel]:
    return ScheduleModel.objects.exclude(next_run=None, active_count=0)


def _wrong(start: datetime, end: datetime) -> dict[str, int]:
    """Return what is not as it should be, and how often."""
    wanted = {start + timedelta(seconds=n) for n in range(int((end - start).total_seconds()) + 1)}
    missing = doubled = strange = counts = 0
    for schedule in ScheduleModel.objects.all():
        found = Counter(schedule.tasks.values_list("occurrence", flat=True))
        missing += len(wanted - found.keys())
        doubled += sum(number - 1 for number in found.values())
        strange += len(found.keys() - wanted)
        told = (schedule.run_count, schedule.success_count, schedule.failure_count)
        counts += told != (len(wanted), len(wanted), 0)
        counts += (schedule.active_count, schedule.operation) != (0, "idle")
    effects = Counter(ChaosEffect.objects.values_list("task", flat=True))
    tasks = set(TaskModel.objects.filter(schedule__isnull=False).values_list("pk", flat=True))
    return {
        "occurrences missing": missing,
        "occurrences doubled": doubled,
        "occurrences that were not planned": strange,
        "schedules with wrong counts": counts,
        "effects missing": len(tasks - effects.keys()),
        "effects doubled": sum(number > 1 for number in effects.values()),
    }
