"""What is declared to recur: names, words, and whether a call declares or writes."""

from datetime import UTC, timedelta
from zoneinfo import ZoneInfo

import pytest

from firefly_jobs import Workflow, declarations
from firefly_jobs.exceptions import TaskDefinitionError
from firefly_jobs.models import ScheduleModel
from firefly_jobs.recurring_jobs import recurring, recurring_job, sync
from tests.conformance import tasks

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def _nothing_else(declare):
    """Declare nothing but what the test declares."""


def test_a_task_that_recurs_twice_needs_two_names():
    recurring("0 8 * * *")(tasks.nothing)
    with pytest.raises(TaskDefinitionError, match="give one of them another with name="):
        recurring("0 20 * * *")(tasks.nothing)
    recurring("0 20 * * *", name="evening")(tasks.nothing)

    assert sync(using="default").created == ["evening", tasks.nothing.name]
    assert ScheduleModel.objects.get(name=tasks.nothing.name).cron == "0 8 * * *"


def test_the_same_declaration_again_is_the_same():
    for _ in range(2):
        recurring(every=60, kwargs={"key": "a"})(tasks.insert)
    with pytest.raises(TaskDefinitionError):
        recurring(every=60, kwargs={"key": "b"})(tasks.insert)


def test_a_workflow_and_a_task_share_no_name():
    recurring_job("report", tasks.nothing, every=60, declares=True)
    workflow = Workflow("report")
    workflow.add(tasks.nothing)
    with pytest.raises(TaskDefinitionError, match="workflow report cannot be declared"):
        recurring_job("report", workflow, every=60, declares=True)


@pytest.mark.parametrize(("zone", "name"), [(ZoneInfo("Europe/Oslo"), "Europe/Oslo"), (UTC, "UTC")])
def test_a_zone_may_be_an_object(zone, name):
    recurring("0 8 * * *", timezone=zone)(tasks.nothing)
    sync(using="default")
    assert ScheduleModel.objects.get().timezone == name


def test_former_names_are_those_of_the_task_unless_it_has_a_name_of_its_own():
    moved = tasks.moved
    recurring(every=60)(moved)
    recurring(every=60, name="by another name")(moved)
    found = {item.name: item.former_names for item in declarations.all_declared()}
    assert found == {moved.name: ("shop.old.report",), "by another name": ()}


def test_what_is_typed_into_a_shell_writes_a_row_and_what_a_module_says_declares():
    words = {"recurring_job": recurring_job, "task": tasks.nothing}
    source = "recurring_job({name!r}, task, every=60)"
    exec(compile(source.format(name="typed"), "<string>", "exec"), dict(words))
    exec(compile(source.format(name="said"), __file__, "exec"), dict(words))
    assert [row.name for row in ScheduleModel.objects.all()] == ["typed"]
    assert [item.name for item in declarations.all_declared()] == ["said"]


def test_an_interval_may_be_a_timedelta():
    recurring(every=timedelta(minutes=2), jitter=timedelta(seconds=3))(tasks.nothing)
    sync(using="default")
    row = ScheduleModel.objects.get()
    assert (row.every, row.jitter) == (120, 3)
