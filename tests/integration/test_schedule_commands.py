"""Commands about schedules: what they print, and how they end."""

import io
from datetime import UTC, datetime
from unittest import mock

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from firefly_jobs import declarations
from firefly_jobs.models import ScheduleModel
from firefly_jobs.recurring_jobs import recurring_job
from tests.conformance import tasks

pytestmark = pytest.mark.django_db

NEXT = datetime(2030, 3, 31, 0, 30, tzinfo=UTC)


def listed(*arguments):
    out = io.StringIO()
    call_command("list_schedules", *arguments, stdout=out)
    return out.getvalue().splitlines()


@pytest.fixture
def rows():
    found = [
        ScheduleModel.objects.create(
            name="a", func_name=tasks.nothing.name, cron="30 2 * * *", timezone="Europe/Oslo"
        ),
        ScheduleModel.objects.create(name="b", func_name=tasks.nothing.name, every=5400),
        ScheduleModel.objects.create(name="c", func_name=tasks.nothing.name),
    ]
    ScheduleModel.objects.exclude(name="c").update(next_run=NEXT)
    return found


def test_schedules_are_listed_with_what_comes_next(rows):
    name = tasks.nothing.name
    counts = "runs 0, succeeded 0, failed 0, retries 0"
    with timezone.override("Asia/Kathmandu"):
        found = listed("--count", "1")
    assert found == [
        f"a: cron '30 2 * * *' in Europe/Oslo, calls {name}",
        f"  idle; {counts}",
        "  2030-03-31 01:30:00+01:00",
        f"b: every 1 h 30 min, calls {name}",
        f"  idle; {counts}",
        # An interval has no zone of its own.
        "  2030-03-31 06:15:00+05:45",
        f"c: by hand, calls {name}",
        f"  idle, no next run; {counts}",
    ]
    # That night has no 02:30.
    assert listed("a", "--count", "2")[2:] == [
        "  2030-03-31 01:30:00+01:00",
        "  2030-03-31 03:00:00+02:00",
    ]
    assert [line[:2] for line in listed("c", "a") if line[0] != " "] == ["a:", "c:"]


def test_a_row_that_cannot_be_read_is_told_last_and_ends_the_command_with_an_error(rows):
    ScheduleModel.objects.filter(name="a").update(timezone="Not/There")
    out = io.StringIO()
    with pytest.raises(CommandError, match=r"Cannot be read here: a\."):
        call_command("list_schedules", stdout=out)
    assert "cannot be read here: " in out.getvalue()
    assert "c: by hand" in out.getvalue()


def test_a_name_that_is_not_there_is_an_error(rows):
    with pytest.raises(CommandError, match="There is no schedule 'x', 'y'"):
        listed("a", "y", "x")


def test_sync_schedules_writes_what_is_declared_and_retires_what_is_no_more():
    def synced():
        out = io.StringIO()
        call_command("sync_schedules", stdout=out)
        return out.getvalue()

    with mock.patch.object(declarations, "_declarations", {}):
        recurring_job("hourly", tasks.nothing, every=3600, declares=True)
        assert synced() == "created hourly\n"
        assert synced() == "All schedules are in step with the code.\n"
        assert ScheduleModel.objects.get(name="hourly").next_run is not None
        declarations._declarations.clear()
        assert synced() == "retired hourly\n"
    assert ScheduleModel.objects.get(name="hourly").is_retired
