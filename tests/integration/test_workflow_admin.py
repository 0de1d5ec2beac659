"""Workflows in the admin, through its views: what it shows, to whom, and what it reads for that."""

import re
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from firefly_jobs import Workflow, WorkflowModel
from firefly_jobs.admin import rows as admin_rows
from firefly_jobs.admin import steps as admin_steps
from firefly_jobs.admin import workflows as admin_workflows
from firefly_jobs.graphs import When
from firefly_jobs.models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowStep
from firefly_jobs.states import Status, WorkflowStatus
from tests.conformance.support import analyze, rows_read
from tests.integration.test_admin import create_task, person, text_of
from tests.testapp.tasks import add, echo

LIST = "admin:firefly_jobs_workflowmodel_changelist"
PAGE = "admin:firefly_jobs_workflowmodel_change"
LINK = r'<a href="/admin/firefly_jobs/taskmodel/\d+'
TASKS = "admin:firefly_jobs_taskmodel_changelist"

pytestmark = pytest.mark.django_db


@pytest.fixture
def viewer() -> Client:
    return person("view_workflowmodel", "view_taskmodel")


@pytest.fixture
def operator() -> Client:
    return person(
        "view_workflowmodel", "change_workflowmodel", "view_taskmodel", "change_taskmodel"
    )


def call(text: str = "x") -> Any:
    return echo.job.with_args(text)


def two_steps(name: str = "etl", **last: Any) -> WorkflowModel:
    wf = Workflow(name, **last)
    wf.add(call(), name="load", depends_on=wf.add(call(), name="extract"))
    return wf.schedule()


def wide(count: int, name: str = "wide") -> WorkflowModel:
    wf = Workflow(name)
    first = wf.add(call(), name="first")
    middle = [wf.add(add.job.with_args(n, 1), name=f"m{n}", depends_on=first) for n in range(count)]
    wf.add(call(), name="last", depends_on=middle)
    return wf.schedule()


def left_as(run: WorkflowModel, status: WorkflowStatus, **steps: str) -> None:
    """Write how a workflow and its steps stand, as consumers would have left them."""
    for name, state in steps.items():
        TaskModel.objects.filter(step__workflow=run, step__name=name).update(
            status=state, error="why it failed" if state == "failed" else ""
        )
    WorkflowModel.objects.filter(pk=run.pk).update(status=status)


def failed_run(name: str = "etl") -> WorkflowModel:
    run = two_steps(name)
    left_as(run, WorkflowStatus.FAILED, extract="failed", load="cancelled")
    return run


def listed(client: Client, **query: Any) -> list[int]:
    response = client.get(reverse(LIST), query)
    assert response.status_code == 200
    return [run.pk for run in response.context["cl"].result_list]


def page_of(client: Client, run: WorkflowModel) -> str:
    response = client.get(reverse(PAGE, args=[run.pk]))
    assert response.status_code == 200
    return response.content.decode()


def act(client: Client, action: str, *runs: WorkflowModel, **data: Any) -> list[str]:
    response = client.post(
        reverse(LIST),
        {"action": action, "_selected_action": [run.pk for run in runs], "index": 0} | data,
        follow=True,
    )
    return [str(message) for message in response.context["messages"]]


def words(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def table_of(text: str) -> list[list[str]]:
    body = text.partition('<table class="firefly-steps">')[2].partition("</table>")[0]
    cells = r"<t[hd][^>]*>(.*?)</t[hd]>"
    rows = [re.findall(cells, row) for row in body.partition("<tbody>")[2].split("</tr>")]
    return [[words(cell).strip() for cell in row] for row in rows if row]


def picture_of(text: str) -> str:
    return words(text.partition('class="firefly-picture"')[2].partition("</svg>")[0])


# --- the list


def test_list_shows_how_far_each_workflow_is(viewer):
    run, other = two_steps(on_failure=call("sorry")), wide(3)
    left_as(run, WorkflowStatus.RUNNING, extract="completed")

    assert listed(viewer) == [other.pk, run.pk]
    text = words(viewer.get(reverse(LIST)).content.decode())
    # What waits for the end of a workflow is no step of it.
    assert re.search(r" etl running 1 / 2 ", text)
    assert re.search(r" wide running 0 / 5 ", text)


def test_list_filters_by_status_and_finds_names_and_ids(viewer):
    broken, running = failed_run("Nightly import"), two_steps("import")

    assert listed(viewer, status__exact="failed") == [broken.pk]
    assert listed(viewer, q="IMPORT") == [running.pk, broken.pk]
    assert listed(viewer, q="night") == [broken.pk]
    assert listed(viewer, q=f"#{running.pk}") == [running.pk]
    assert listed(viewer, q="import", status__exact="running") == [running.pk]


def test_list_asks_as_many_questions_for_a_page_of_workflows_as_for_one(viewer):
    two_steps()
    viewer.get(reverse(LIST))

    def questions() -> int:
        with CaptureQueriesContext(connection) as queries:
            viewer.get(reverse(LIST))
        return len(queries)

    before = questions()
    for n in range(10):
        wide(n + 1, f"wf{n}")
    assert questions() == before


def test_names_are_searched_among_the_newest_workflows_and_the_page_says_so(viewer, monkeypatch):
    monkeypatch.setattr(admin_rows, "SEARCH_ROWS", 1)
    old, new = two_steps(), two_steps()

    assert listed(viewer, q="etl") == [new.pk]
    assert listed(viewer, q=str(old.pk)) == [old.pk]
    assert "newest 1 workflows only" in viewer.get(reverse(LIST), {"q": "etl"}).content.decode()
    assert "Searched among" not in viewer.get(reverse(LIST)).content.decode()


def test_a_large_workflow_is_not_counted_for_the_list(viewer, monkeypatch):
    monkeypatch.setattr(admin_workflows, "COUNTED_MAX", 5)
    wide(3, "just so"), wide(4, "too large")

    text = words(viewer.get(reverse(LIST)).content.decode())

    assert "just so running 0 / 5" in text
    assert "too large running of more than 5" in text


@pytest.mark.django_db(transaction=True)
def test_list_reads_as_many_rows_as_its_bounds_say(viewer, monkeypatch):
    monkeypatch.setattr(admin_workflows, "COUNTED_MAX", 50)
    wide(2_000)
    for _ in range(3):
        two_steps()
    analyze(TaskModel, WorkflowModel, WorkflowStep)
    viewer.get(reverse(LIST))

    with CaptureQueriesContext(connection) as queries:
        viewer.get(reverse(LIST))

    about = [q["sql"] for q in queries if "firefly_jobs_" in q["sql"] and "SELECT" in q["sql"]]
    assert len(about) <= 4
    for sql in about:
        assert rows_read(sql, ()) < 700, sql


def test_nobody_lists_workflows_without_permission():
    client = person("view_taskmodel")

    assert client.get(reverse(LIST)).status_code == 403
    assert client.get(reverse(PAGE, args=[two_steps().pk])).status_code == 403


# --- one workflow


def test_page_shows_the_steps_who_they_wait_for_and_why_they_failed(viewer):
    wf = Workflow("etl", on_failure=call("sorry"))
    first = wf.add(call(), name="extract")
    both = wf.add(call(), name="both", depends_on=[first, wf.add(call(), name="other")])
    wf.add(call(), name="tidy", depends_on=[both], when="always")
    wf.add(call(), name="extra", ignore_result=True, depends_on=first)
    run = wf.schedule()
    left_as(run, WorkflowStatus.RUNNING, extract="completed", extra="failed")
    ids = dict(run.steps.values_list("name", "pk"))

    text = page_of(viewer, run)

    assert table_of(text) == [
        ["extract", "completed", "-", f"#{ids['extract']}", "-", "-"],
        ["other", "created", "-", f"#{ids['other']}", "-", "-"],
        ["both", "blocked", "extract, other", f"#{ids['both']}", "-", "-"],
        ["tidy", "blocked", "both (always)", f"#{ids['tidy']}", "-", "-"],
        ["extra", "failed failure ignored", "extract", f"#{ids['extra']}", "-", "why it failed"],
    ]
    assert f"{echo.name} #{run.on_failure}" in words(text)
    assert re.search(r"Ignored failures: extra ", words(text))
    assert len(re.findall(LINK, text)) == 5 + 5 + 1


def test_who_may_not_see_tasks_gets_no_links_to_them():
    run = two_steps(on_success=call())

    text = page_of(person("view_workflowmodel"), run)

    assert picture_of(text)
    assert re.findall(LINK, text) == []


def test_a_name_is_no_markup(viewer):
    name = "</title><script>alert(1)</script>"
    run = two_steps(name)
    TaskModel.objects.filter(step__workflow=run).update(error=name, status=Status.FAILED)
    run.steps.update(ignore_result=True)
    run.steps.filter(name="load").update(name=name)
    WorkflowModel.objects.filter(pk=run.pk).update(error=name)

    assert "<script>alert" not in page_of(viewer, run)
    assert "<script>alert" not in viewer.get(reverse(LIST)).content.decode()


def test_a_summary_stands_for_many_steps_and_the_table_shows_what_failed_first(viewer, monkeypatch):
    monkeypatch.setattr(admin_steps, "PICTURED_MAX", 4)
    monkeypatch.setattr(admin_steps, "STEPS_SHOWN", 3)
    monkeypatch.setattr(admin_workflows, "STEPS_SHOWN", 3)
    run = wide(6)
    left_as(run, WorkflowStatus.RUNNING, first="completed", m4="failed", m2="running")

    text = page_of(viewer, run)

    assert [row[0] for row in table_of(text)] == ["m4", "m2", "m0"]
    assert table_of(text)[0][2] == "first"
    assert "Only 3 of 8 steps are shown" in text
    assert f'href="{reverse(TASKS)}?workflow={run.pk}"' in text
    picture = picture_of(text)
    assert "add \N{MULTIPLICATION SIGN} 6" in picture
    assert "1 of 6 ended, 1 failed" in picture
    assert text.count('class="firefly-edge"') == 2


def test_a_workflow_that_is_too_large_to_be_grouped_is_one_box(viewer, monkeypatch):
    for name, value in (("PICTURED_MAX", 2), ("GROUPED_MAX", 4), ("ARROWS_MAX", 4)):
        monkeypatch.setattr(admin_steps, name, value)

    text = page_of(viewer, wide(5))

    assert "7 steps" in words(text)
    assert text.count('class="firefly-edge"') == 0


def test_groups_are_folded_until_they_are_few(viewer, monkeypatch):
    monkeypatch.setattr(admin_steps, "PICTURED_MAX", 2)
    wf = Workflow("deep")
    before: Any = ()
    for n in range(6):
        before = wf.add(call() if n % 2 else add.job.with_args(n, n), depends_on=before)

    picture = picture_of(page_of(viewer, wf.schedule()))

    assert "add \N{MULTIPLICATION SIGN} 3" in picture
    assert "echo \N{MULTIPLICATION SIGN} 3" in picture


def test_a_page_of_a_large_workflow_asks_few_questions_and_reads_no_payload(viewer):
    run = wide(300)
    viewer.get(reverse(PAGE, args=[run.pk]))

    with CaptureQueriesContext(connection) as queries:
        page_of(viewer, run)

    about = [q["sql"] for q in queries if "firefly_jobs_" in q["sql"]]
    assert len(about) <= 20
    assert not any("params" in sql or "returned" in sql for sql in about)


@pytest.mark.django_db(transaction=True)
def test_edges_of_others_are_not_read_for_a_page(viewer):
    wide(500)
    others = list(WorkflowEdge.objects.exclude(when=When.ENDED))
    for _ in range(40):
        copies = [
            WorkflowEdge(step_id=e.step_id, source_id=e.source_id, gate_id=e.gate_id, when=e.when)
            for e in others
        ]
        WorkflowEdge.objects.bulk_create(copies)
    run = two_steps()
    analyze(TaskModel, WorkflowStep, WorkflowGate, WorkflowEdge)
    with CaptureQueriesContext(connection) as queries:
        page_of(viewer, run)

    edges = [q["sql"] for q in queries if "firefly_jobs_workflowedge" in q["sql"]]
    assert edges
    for sql in edges:
        # Of some 40,000; a planner may prefer to look through the few that come from gates.
        assert rows_read(sql, ()) < 2_000, sql


# --- the tasks of a workflow


def test_tasks_of_one_workflow_are_listed(viewer):
    run, _other, _task = two_steps(), two_steps(), create_task()

    response = viewer.get(reverse(TASKS), {"workflow": run.pk})
    found = {task.pk for task in response.context["cl"].result_list}

    assert found == set(run.steps.values_list("pk", flat=True))
    nothing = viewer.get(reverse(TASKS), {"workflow": "x'--"}).context["cl"].result_list
    assert list(nothing) == []


def test_page_of_a_step_leads_to_its_workflow(viewer):
    run = two_steps("nightly", on_success=call())
    step = TaskModel.objects.get(step__name="load")
    last = TaskModel.objects.get(workflow=run, step=None)

    assert f'<a href="{reverse(PAGE, args=[run.pk])}">nightly #{run.pk}</a>, step load' in text_of(
        viewer, step
    )
    assert "when it has ended" in text_of(viewer, last)
    assert "part_of" not in text_of(viewer, create_task())


def test_a_step_runs_again_with_its_workflow_only(operator):
    run = failed_run()
    step = TaskModel.objects.get(step__name="extract")

    response = operator.post(
        reverse(TASKS),
        {"action": "retry_tasks", "_selected_action": [step.pk], "index": 0},
        follow=True,
    )

    assert [str(m) for m in response.context["messages"]] == [
        "1 step was left as it is: it runs again with its workflow."
    ]
    assert "retry_tasks" not in text_of(operator, step)
    assert run.retry_failed() == 2


def test_a_step_is_not_deleted_while_its_workflow_runs():
    client = person("view_taskmodel", "delete_taskmodel")
    run = two_steps()
    left_as(run, WorkflowStatus.RUNNING, extract="completed")
    step = TaskModel.objects.get(step__name="extract")
    url = reverse("admin:firefly_jobs_taskmodel_delete", args=[step.pk])

    assert client.get(url).status_code == 403
    left_as(run, WorkflowStatus.COMPLETED)
    assert client.get(url).status_code == 200


# --- actions


def test_what_failed_is_made_to_run_again(operator):
    broken, running = failed_run(), two_steps()

    assert act(operator, "retry_failed", broken, running) == [
        "1 workflow runs again.",
        "1 workflow was left as it is: only failed and cancelled ones run again.",
    ]

    broken.refresh_from_db()
    assert broken.status == WorkflowStatus.RUNNING
    assert broken.progress.by_status == {"created": 1, "blocked": 1}
    entries = LogEntry.objects.values_list("user__username", "object_id", "change_message")
    assert list(entries) == [("anna", str(broken.pk), "Made to run again.")]


def test_what_has_not_started_is_cancelled(operator):
    running, broken = two_steps(), failed_run()

    assert act(operator, "cancel_workflows", running, broken) == [
        "1 workflow was cancelled.",
        "1 workflow was left as it is: it has ended.",
    ]

    running.refresh_from_db()
    assert running.status == WorkflowStatus.CANCELLED


def test_a_workflow_whose_key_is_taken_is_left_and_others_run_again(operator):
    wf = Workflow("keyed")
    wf.add(call().with_unique_key("once"))
    keyed = wf.schedule()
    TaskModel.objects.filter(workflow=keyed).update(status=Status.FAILED, active_key=None)
    WorkflowModel.objects.filter(pk=keyed.pk).update(status=WorkflowStatus.FAILED)
    holder = call().with_unique_key("once").schedule()
    broken = failed_run()
    reason = (
        f"Step 'echo' of workflow {keyed.pk} cannot run again: its unique key 'once' belongs to "
        f"task {holder.pk} ({holder.func_name}) by now, which is created. Nothing was changed."
    )

    assert act(operator, "retry_failed", keyed, broken) == [
        f"keyed #{keyed.pk} was left as it is. {reason}",
        "1 workflow runs again.",
    ]
    keyed.refresh_from_db()
    assert keyed.status == WorkflowStatus.FAILED


def test_actions_are_bounded(operator, monkeypatch):
    monkeypatch.setattr(admin_workflows, "CHANGED_MAX", 2)
    runs = [failed_run() for _ in range(3)]

    assert act(operator, "retry_failed", *runs) == [
        "Only the newest 2 of the selected workflows were looked at.",
        "2 workflows run again.",
    ]
    assert WorkflowModel.objects.get(status=WorkflowStatus.FAILED) == runs[0]


def test_page_offers_what_fits_the_status(operator):
    def buttons(run: WorkflowModel) -> list[str]:
        return re.findall(r'name="action" value="(\w+)"', page_of(operator, run))

    done = two_steps()
    left_as(done, WorkflowStatus.COMPLETED)
    assert buttons(two_steps()) == ["cancel_workflows"]
    assert buttons(failed_run()) == ["retry_failed"]
    assert buttons(done) == []


def test_button_leads_back_to_the_page_of_the_workflow(operator):
    run = failed_run()

    response = operator.post(
        reverse(LIST),
        {
            "action": "retry_failed",
            "_selected_action": run.pk,
            "index": 0,
            "firefly_page": run.pk,
        },
    )

    assert response["Location"] == reverse(PAGE, args=[run.pk])


def test_viewer_sees_no_action_and_can_start_none(viewer):
    run = failed_run()

    act(viewer, "retry_failed", run)

    assert "retry_failed" not in viewer.get(reverse(LIST)).content.decode()
    assert "retry_failed" not in page_of(viewer, run)
    run.refresh_from_db()
    assert run.status == WorkflowStatus.FAILED


def test_looking_changes_nothing(operator):
    run = failed_run()

    query = {"action": "retry_failed", "_selected_action": run.pk, "index": 0}
    operator.get(reverse(LIST), query)
    operator.get(reverse(PAGE, args=[run.pk]), query)

    run.refresh_from_db()
    assert run.status == WorkflowStatus.FAILED


def test_nobody_adds_edits_or_deletes_a_workflow():
    client = Client()
    client.force_login(User.objects.create_superuser("root"))
    run = failed_run()

    assert client.get(reverse("admin:firefly_jobs_workflowmodel_add")).status_code == 403
    assert client.post(reverse(PAGE, args=[run.pk]), {"name": "x"}).status_code == 403
    delete = reverse("admin:firefly_jobs_workflowmodel_delete", args=[run.pk])
    assert client.post(delete, {"post": "yes"}).status_code == 403
    assert 'name="_save"' not in page_of(client, run)


# --- several databases


@pytest.mark.django_db(databases=["default", "other"])
def test_workflows_are_those_of_the_configured_database():
    two_steps("here")
    with override_settings(FIREFLY_JOBS={"DATABASE": "other"}):
        there = two_steps("there")
        client = Client()
        client.force_login(User.objects.create_superuser("root"))

        assert "there" in viewer_text(client)
        assert "here #" not in viewer_text(client)
        assert "extract" in page_of(client, there)
        assert act(client, "cancel_workflows", there) == ["1 workflow was cancelled."]


def viewer_text(client: Client) -> str:
    return words(client.get(reverse(LIST)).content.decode())
