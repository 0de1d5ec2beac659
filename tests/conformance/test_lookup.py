"""What runs, and which row a name or an id means."""

import pytest

from firefly_jobs import TaskModel, Workflow, task
from tests.conformance import tasks
from tests.conformance.support import captured_statements, claim

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@task(aliases=["shop.former"])
def moved():
    pass


def running(*jobs):
    """Schedule jobs or tasks, and let them run."""
    rows = [job.schedule() for job in jobs]
    claim()
    return rows


def ids(rows):
    return [row.pk for row in rows.order_by("pk")]


# --- what runs


def test_what_runs_of_a_task_a_name_or_a_list_is_found():
    nothing, labelled, other = running(
        tasks.nothing, tasks.nothing.job.with_name("night"), tasks.insert.job.with_args("key")
    )
    waiting = tasks.nothing.schedule()
    active = TaskModel.objects.active_for

    assert ids(active(tasks.nothing)) == [nothing.pk, labelled.pk]
    assert ids(active(tasks.nothing.name)) == [nothing.pk, labelled.pk]
    assert ids(active("night")) == [labelled.pk]
    assert ids(active([tasks.insert, "night"])) == [labelled.pk, other.pk]
    assert ids(active({"night"})) == [labelled.pk]
    assert ids(active([])) == ids(active("no such")) == []
    assert waiting.pk not in ids(active([tasks.nothing, tasks.insert]))


def test_what_runs_of_a_workflow_or_under_the_name_of_a_step_is_found():
    wf = Workflow("found")
    first = wf.add(tasks.nothing, name="first")
    wf.add(tasks.nothing, name="beside")
    wf.add(tasks.nothing, name="behind", depends_on=[first])
    run, other = wf.schedule(), wf.schedule()
    (alone,) = running(tasks.nothing)
    active = TaskModel.objects.active_for

    steps = ids(run.tasks.filter(status="running"))
    assert len(steps) == 2
    assert ids(active(run)) == steps
    assert active("first").count() == 2
    assert active([run, other]).count() == 4
    assert active([run, tasks.nothing]).count() == 5
    assert alone.pk in ids(active([run, tasks.nothing]))


def test_what_runs_under_a_former_name_belongs_to_the_task():
    (row,) = running(moved)
    TaskModel.objects.filter(pk=row.pk).update(func_name="shop.former")

    assert ids(TaskModel.objects.active_for(moved)) == [row.pk]


def test_only_tasks_names_and_workflows_are_looked_for():
    for bad in (5, None, object(), ["fine", 5]):
        with pytest.raises(TypeError, match="takes tasks, names, workflows and schedules"):
            TaskModel.objects.active_for(bad)


def test_the_names_of_what_runs_are_told_once_each():
    nothing = tasks.nothing.job
    running(nothing, nothing, nothing.with_name("night"), tasks.insert.job.with_args("key"))
    active = TaskModel.objects.active_for([tasks.nothing, tasks.insert])

    assert active.names() == sorted([tasks.nothing.name, tasks.insert.name, "night"])
    with captured_statements() as statements:
        assert TaskModel.objects.active_for(tasks.insert).names() == [tasks.insert.name]
    assert len(statements) == 1


# --- which row is meant


def test_an_id_means_its_row_and_a_name_the_latest():
    first, second = tasks.nothing.schedule(), tasks.nothing.schedule()
    labelled = tasks.insert.job.with_args("key").with_name("night").schedule()
    wf = Workflow("found")
    wf.add(tasks.nothing.using(queue="steps"), name="first")
    run = wf.schedule()

    for wanted, row in (
        (first.pk, first),
        (second.pk, second),
        ("night", labelled),
        (tasks.insert.name, labelled),
        ("first", run.tasks.get()),
        (tasks.nothing.name, run.tasks.get()),
    ):
        with captured_statements() as statements:
            assert TaskModel.objects.lookup(wanted) == (row, None)
        assert len(statements) == 1
    assert TaskModel.objects.filter(queue="default").lookup(tasks.nothing.name) == (second, None)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (999_999, "There is no task with the id 999999."),
        ("no.such", "There is no task with the function name, label or step name 'no.such'."),
        ("5", "There is no task with the function name, label or step name '5'."),
    ],
)
def test_what_there_is_not_is_said(wanted, message):
    with pytest.raises(TaskModel.DoesNotExist) as caught:
        TaskModel.objects.lookup(wanted)

    assert str(caught.value) == message
