"""Commands that delete or revive ended tasks, on rows as consumers leave them."""

import io
import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from firefly_jobs import Workflow, lifecycle, pruning
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import (
    TaskAttempt,
    TaskModel,
    WorkflowEdge,
    WorkflowGate,
    WorkflowModel,
    WorkflowStep,
)
from firefly_jobs.states import Status
from tests.testapp.tasks import echo

DELETE_COMPLETED = "delete_completed_tasks"
DELETE_FAILED = "delete_failed_tasks"
DELETE_CANCELLED = "delete_cancelled_tasks"
REVIVE = "mark_failed_tasks_consumable"

pytestmark = pytest.mark.django_db


def ended(
    status: Status = Status.COMPLETED,
    *,
    count: int = 1,
    age: timedelta = timedelta(),
    using: str = "default",
    **fields: Any,
) -> list[TaskModel]:
    """Write rows that ended ``age`` ago, by the database's clock."""
    rows = TaskModel.objects.using(using).bulk_create(
        TaskModel(**({"func_name": "shop.tasks.pay", "raw_params": "", "status": status} | fields))
        for _ in range(count)
    )
    last = TaskModel.objects.using(using).order_by("-pk")[:count]
    made = list(TaskModel.objects.using(using).filter(pk__in=[row.pk for row in last]))
    assert len(made) == len(rows)
    moment = str(status) if status.is_terminal else "completed"
    TaskModel.objects.using(using).filter(pk__in=[row.pk for row in made]).update(
        **{moment: SecondsFromNow(-age.total_seconds())}
    )
    return made


def run(command: str, *arguments: str) -> str:
    out = io.StringIO()
    call_command(command, *arguments, stdout=out)
    return out.getvalue()


def test_delete_completed_deletes_these_and_nothing_else():
    ended(count=3)
    kept = [
        ended(status)[0].pk
        for status in (Status.FAILED, Status.CANCELLED, Status.CREATED, Status.RUNNING)
    ]

    assert run(DELETE_COMPLETED) == "3 completed tasks were deleted.\n"

    assert list(TaskModel.objects.order_by("pk").values_list("pk", flat=True)) == kept


def test_delete_failed_takes_the_history_along():
    (failed,) = ended(Status.FAILED)
    (completed,) = ended(Status.COMPLETED)
    for task in (failed, completed):
        TaskAttempt.objects.create(task=task, number=1, fence=1, outcome="failed")

    assert run(DELETE_FAILED) == "1 failed task was deleted.\n"

    assert [attempt.task_id for attempt in TaskAttempt.objects.all()] == [completed.pk]


def test_retries_start_anew_when_a_failed_task_is_made_due_again():
    (task,) = ended(
        Status.FAILED, retry_attempts=3, max_retries=3, rescues=2, lost_alone=1, consumer=7
    )
    cancelled = ended(Status.CANCELLED)[0]

    assert run(REVIVE) == "1 failed task was made due again.\n"

    task.refresh_from_db()
    assert (task.status, task.retry_attempts, task.rescues, task.lost_alone) == ("created", 0, 0, 0)
    assert (task.failed, task.consumer, task.max_retries) == (None, None, 3)
    assert task in TaskModel.objects.due()
    cancelled.refresh_from_db()
    assert cancelled.status == Status.CANCELLED


@pytest.mark.parametrize("command", [DELETE_COMPLETED, DELETE_FAILED, REVIVE])
def test_dry_run_counts_and_changes_nothing(command):
    ended(Status.COMPLETED, count=2)
    ended(Status.FAILED, count=2)
    before = list(TaskModel.objects.order_by("pk").values())

    output = run(command, "--dry-run")

    assert output.startswith("2 ")
    assert " tasks would be " in output
    assert list(TaskModel.objects.order_by("pk").values()) == before


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], []),
        (["--queue", "*"], []),
        (["--queue", "mail"], ["default", "slow"]),
        (["--queue", "mail,slow"], ["default"]),
        (["--queue", "mail", "--queue", "slow"], ["default"]),
        (["--queue", "nobody's"], ["default", "mail", "slow"]),
    ],
)
def test_queues_are_chosen_as_for_a_consumer(arguments, kept):
    for queue in ("default", "mail", "slow"):
        ended(queue=queue)

    run(DELETE_COMPLETED, *arguments)

    assert sorted(TaskModel.objects.values_list("queue", flat=True)) == kept


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (DELETE_COMPLETED, Status.COMPLETED),
        (DELETE_FAILED, Status.FAILED),
        (REVIVE, Status.FAILED),
    ],
)
def test_age_counts_from_the_end_of_the_task_by_the_clock_of_the_database(command, status):
    (old,) = ended(status, age=timedelta(days=7, seconds=5))
    (young,) = ended(status, age=timedelta(days=7, seconds=-60))
    # Scheduled long ago, but that is not what counts.
    TaskModel.objects.filter(pk=young.pk).update(created=SecondsFromNow(-90 * 86_400))

    assert run(command, "--older-than", "7d").startswith("1 ")

    assert TaskModel.objects.get(pk=young.pk).status == status
    assert not TaskModel.objects.filter(pk=old.pk, status=status).exists()


@pytest.mark.parametrize(
    ("command", "status"), [(DELETE_COMPLETED, "completed"), (REVIVE, "failed")]
)
def test_rows_are_changed_in_batches_of_their_own(command, status, monkeypatch):
    monkeypatch.setattr("firefly_jobs.management.ended.BATCH_SIZE", 10)
    ended(Status(status), count=25)
    sizes = []
    verb = lifecycle.delete if command == DELETE_COMPLETED else lifecycle.retry

    def recorded(ids, *, using):
        sizes.append(len(ids))
        return verb(ids, using=using)

    monkeypatch.setattr(lifecycle, verb.__name__, recorded)

    assert run(command).startswith("25 ")
    assert sizes == [10, 10, 5]


def test_statements_stay_as_many_whatever_was_deleted_before(monkeypatch):
    monkeypatch.setattr("firefly_jobs.management.ended.BATCH_SIZE", 50)
    ended(count=100)
    with CaptureQueriesContext(connection) as queries:
        run(DELETE_COMPLETED)

    selects = [q["sql"] for q in queries if "ORDER BY" in q["sql"] and "LIMIT 50" in q["sql"]]
    assert len(selects) == 3


def test_tasks_that_end_meanwhile_are_left_to_the_next_run(monkeypatch):
    monkeypatch.setattr("firefly_jobs.management.ended.BATCH_SIZE", 2)
    ended(count=4)
    delete = lifecycle.delete

    def delete_while_others_end(ids, *, using):
        ended(count=1)
        return delete(ids, using=using)

    monkeypatch.setattr(lifecycle, "delete", delete_while_others_end)

    assert run(DELETE_COMPLETED) == "4 completed tasks were deleted.\n"
    assert TaskModel.objects.count() == 2


def test_task_that_was_revived_meanwhile_is_reported_and_stays(monkeypatch):
    (task,) = ended(Status.FAILED)
    delete = lifecycle.delete

    def delete_after_a_person_was_quicker(ids, *, using):
        lifecycle.retry(ids, using=using)
        return delete(ids, using=using)

    monkeypatch.setattr(lifecycle, "delete", delete_after_a_person_was_quicker)

    assert run(DELETE_FAILED) == (
        "0 failed tasks were deleted.\n1 changed meanwhile, or were locked, and stay as they are.\n"
    )
    assert TaskModel.objects.filter(pk=task.pk).exists()


@pytest.mark.django_db(databases=["default", "other"])
def test_database_option_serves_another_alias():
    ended(count=1)
    ended(count=2, using="other")

    assert run(DELETE_COMPLETED, "--database", "other") == "2 completed tasks were deleted.\n"

    assert TaskModel.objects.count() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--older-than", "7"], "must be a number and a unit"),
        (["--older-than", "101000w"], "must be 100 years at most"),
        (["--queue", ""], "a queue needs a name"),
        (["--database", "nowhere"], "There is no database 'nowhere'"),
    ],
)
def test_wrong_option_is_refused(arguments, message):
    with pytest.raises(CommandError, match=message):
        run(DELETE_COMPLETED, *arguments)


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([DELETE_COMPLETED, "--dry-run"], 0),
        ([DELETE_COMPLETED, "--database", "nowhere"], 2),
        ([DELETE_FAILED, "--older-than", "soon"], 2),
        ([REVIVE, "--older-than", "9999w"], 2),
        # 'other' was never migrated.
        ([REVIVE, "--database", "other"], 1),
    ],
)
def test_exit_code_tells_success_error_and_usage(arguments, code, tmp_path):
    environment = {
        "FIREFLY_TESTING": "1",
        "FIREFLY_DATABASE": f"sqlite:///{tmp_path / 'commands.sqlite3'}",
        "PATH": "",
    }
    manage = [sys.executable, "manage.py"]
    subprocess.run([*manage, "migrate", "-v0", "firefly_jobs"], env=environment, check=True)

    finished = subprocess.run(
        [*manage, *arguments], env=environment, check=False, capture_output=True, text=True
    )

    assert finished.returncode == code, finished.stderr
    assert "Traceback" not in finished.stderr


def workflow(
    name: str, status: str = "completed", *, tasks: str = "completed", **age: int
) -> WorkflowModel:
    """Write a workflow of two levels, as consumers leave it that long after its end."""
    wf = Workflow(name, on_failure=echo)
    first = wf.add(echo, name="first", priority=1)
    wf.add(echo, name="second", depends_on=[first, wf.add(echo, name="beside", priority=1)])
    run = wf.schedule()
    ago = SecondsFromNow(-timedelta(**age).total_seconds())
    run.tasks.update(status=tasks, completed=ago, failed=ago)
    ended = None if status == "running" else ago
    WorkflowModel.objects.filter(pk=run.pk).update(status=status, ended=ended)
    return run


def all_that_is_left() -> list[str]:
    """Return the names of the workflows that are there, once each table has been looked at."""
    for model in (WorkflowGate, WorkflowStep):
        assert set(model.objects.values_list("workflow__name", flat=True)) <= set(
            WorkflowModel.objects.values_list("name", flat=True)
        )
    gates = set(WorkflowGate.objects.values_list("pk", flat=True))
    assert set(WorkflowEdge.objects.values_list("gate", flat=True)) <= gates
    return sorted(WorkflowModel.objects.values_list("name", flat=True))


def test_workflows_of_which_no_task_is_left_go_with_their_gates():
    workflow("done", days=8)
    workflow("failed", "failed", days=8)
    workflow("young", days=1)
    workflow("runs", "running", days=8)
    partly = workflow("partly", days=8)
    TaskModel.objects.filter(pk=partly.on_failure or 0).update(status="cancelled")

    assert run(DELETE_COMPLETED, "--older-than", "7d") == (
        "11 completed tasks were deleted.\n"
        "4 changed meanwhile, or were locked, and stay as they are.\n"
        "2 workflows without tasks were deleted.\n"
    )
    assert all_that_is_left() == ["partly", "runs", "young"]
    assert WorkflowGate.objects.exists()


@pytest.mark.parametrize(
    ("tasks", "command"),
    [
        ("completed", DELETE_COMPLETED),
        ("failed", DELETE_FAILED),
        ("cancelled", DELETE_CANCELLED),
    ],
)
def test_each_command_deletes_workflows_and_a_dry_run_only_counts_them(tasks, command):
    workflow("done", tasks=tasks)
    workflow("before", tasks=tasks)
    TaskModel.objects.filter(workflow__name="before").delete()

    assert run(command, "--dry-run") == (
        f"4 {tasks} tasks would be deleted.\n1 workflow without tasks would be deleted.\n"
    )
    assert all_that_is_left() == ["before", "done"]
    assert run(command, "--queue", "default").splitlines() == [
        f"4 {tasks} tasks were deleted.",
        "2 workflows without tasks were deleted.",
    ]
    assert all_that_is_left() == []
    assert not WorkflowEdge.objects.exists()
    assert run(command) == f"0 {tasks} tasks were deleted.\n"


@pytest.mark.django_db(transaction=True)
def test_what_was_cancelled_long_ago_goes_and_with_it_the_failed_workflow():
    wf = Workflow("fails")
    first = wf.add(echo, name="first")
    wf.add(echo, name="second", depends_on=[first])
    run_ = wf.schedule()
    assert run_.cancel()
    late = TaskModel.objects.create(func_name="shop.tasks.pay", raw_params="")
    assert late.cancel()
    TaskModel.objects.filter(workflow=run_.pk).update(cancelled=SecondsFromNow(-8 * 86_400))
    WorkflowModel.objects.update(ended=SecondsFromNow(-8 * 86_400))

    assert run(DELETE_CANCELLED, "--older-than", "7d") == (
        "2 cancelled tasks were deleted.\n1 workflow without tasks was deleted.\n"
    )
    late.refresh_from_db()
    assert late.status == Status.CANCELLED
    assert late.ended == late.cancelled is not None
    assert late.retry_now()
    late.refresh_from_db()
    assert late.ended is None


def test_reviving_tasks_deletes_no_workflow():
    workflow("done")
    TaskModel.objects.all().delete()

    assert run(REVIVE) == "0 failed tasks were made due again.\n"
    assert all_that_is_left() == ["done"]


@pytest.mark.django_db(transaction=True)
def test_workflows_are_deleted_in_batches_and_looked_at_once_more(monkeypatch):
    monkeypatch.setattr("firefly_jobs.pruning.BATCH_SIZE", 2)
    for n in range(5):
        workflow(f"w{n}")
    TaskModel.objects.exclude(workflow__name="w3").delete()
    TaskModel.objects.filter(workflow__name="w3").update(status="cancelled")
    batches = []
    delete = pruning.delete_workflows

    def delete_while_one_runs_again(ids, *, using):
        assert not connection.in_atomic_block
        batches.append(len(ids))
        # As retry_failed() would.
        WorkflowModel.objects.filter(name="w4").update(status="running")
        return delete([*ids, WorkflowModel.objects.get(name="w3").pk], using=using)

    monkeypatch.setattr(pruning, "delete_workflows", delete_while_one_runs_again)

    assert "3 workflows without tasks were deleted." in run(DELETE_COMPLETED)
    assert batches == [2, 1]
    assert all_that_is_left() == ["w3", "w4"]


@pytest.mark.django_db(transaction=True)
def test_every_batch_is_a_transaction_of_its_own(monkeypatch):
    monkeypatch.setattr("firefly_jobs.management.ended.BATCH_SIZE", 2)
    ended(count=3)
    seen = []
    delete = lifecycle.delete

    def failing_second(ids, *, using):
        assert not connection.in_atomic_block
        seen.append(ids)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return delete(ids, using=using)

    monkeypatch.setattr(lifecycle, "delete", failing_second)
    out = io.StringIO()

    with pytest.raises(KeyboardInterrupt):
        call_command(DELETE_COMPLETED, stdout=out)

    assert out.getvalue() == "2 completed tasks were deleted.\n"
    assert TaskModel.objects.count() == 1


def consume(*options: str) -> str:
    out = io.StringIO()
    call_command("consume_tasks", "--burst", *options, stdout=out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--priority", "low,background"], [50, 0]),
        (["--priority", "high", "--priority", "background"], [0, -50]),
        (["--priority=-50..100"], [-100]),
        (["--min-priority", "normal"], [-50, -100]),
        (["--min-priority=-50"], [-100]),
    ],
)
@pytest.mark.django_db(transaction=True)
def test_a_consumer_serves_the_priorities_it_was_told(options, left):
    for priority in (50, 0, -50, -100):
        TaskModel.objects.create(func_name="none", raw_params="", priority=priority)

    consume(*options)

    rows = TaskModel.objects.filter(status=Status.CREATED).order_by("-priority")
    assert list(rows.values_list("priority", flat=True)) == left


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--priority", "hihg"], "There is no band 'hihg'.*Did you mean 'high'"),
        (["--min-priority", "101"], "between -100 and 100, got 101"),
        (["--priority", "high", "--min-priority", "low"], "not allowed with argument"),
    ],
)
def test_a_wrong_band_is_a_usage_error(options, message):
    with pytest.raises(CommandError, match=message):
        consume(*options)
