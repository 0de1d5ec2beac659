"""Registered jobs, saved jobs and schedules in a real browser."""

from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from playwright.sync_api import Page, expect

from firefly_jobs.admin.jobs import apply_setting
from firefly_jobs.conf import get_settings
from firefly_jobs.models import JobStart, SavedJob, ScheduleModel, TaskModel
from firefly_jobs.recurring_jobs import recurring_job
from testproject.datafiles.models import DataFile, Project
from tests.acceptance.test_admin_browser import log_in, page, picture, pytestmark
from tests.conformance.support import run_burst
from tests.testapp.tasks import add

__all__ = ["page", "pytestmark"]


@pytest.fixture
def files(transactional_db) -> list[DataFile]:
    project = Project.objects.create(name="apollo")
    return [DataFile.objects.create(name=f"file {n}", project=project) for n in range(4)]


def select(page: Page, url: str, *names: str) -> None:
    page.goto(url)
    for name in names:
        page.locator("tr", has_text=name).locator("input.action-select").check()


def start(page: Page, label: str) -> None:
    page.locator("select[name=action]").select_option(label=label)
    # "Go", or "Run" in later versions of Django.
    page.locator("#changelist-form button[name=index]").click()


def test_a_job_is_started_on_the_selected_rows_and_ends_on_its_tasks_page(page, live_server, files):
    log_in(page, live_server.url)
    url = f"{live_server.url}/admin/datafiles/datafile/"
    select(page, url, "file 1", "file 3")
    start(page, "Start: Flag custom")

    expect(page.locator("#content h1")).to_have_text("Flag custom")
    expect(page.locator("#content-main li")).to_have_text(["file 1", "file 3"])
    expect(page.get_by_text("Whether they get the flag or lose it.")).to_be_visible()
    expect(page.get_by_label("Custom flag")).to_be_checked()
    picture(page, "start-a-job")
    page.get_by_role("button", name="Start").click()

    row = TaskModel.objects.get()
    expect(page).to_have_url(f"{live_server.url}/admin/firefly_jobs/taskmodel/{row.pk}/change/")
    expect(page.locator(".messagelist")).to_contain_text(f"Started “Flag custom” as task {row.pk}.")
    assert row.params["kwargs"]["datafile_pks"] == [files[1].pk, files[3].pk]
    assert JobStart.objects.get().user_pk == str(User.objects.get().pk)
    run_burst()
    assert [file.name for file in DataFile.objects.filter(custom_flag=True)] == [
        "file 1",
        "file 3",
    ]


def test_what_was_entered_wrong_is_told_beside_it(page, live_server, files):
    log_in(page, live_server.url)
    url = f"{live_server.url}/admin/datafiles/datafile/"
    select(page, url, "file 1")
    start(page, "Start: Rename")
    page.get_by_label("Prefix").evaluate("field => field.required = false")
    page.get_by_role("button", name="Start").click()
    expect(page.locator(".errorlist")).to_have_text("This field is required.")
    page.get_by_label("Prefix").fill("old ")
    page.get_by_role("button", name="Start").click()
    run_burst()
    assert DataFile.objects.filter(name="old file 1").exists()


def test_too_many_rows_are_refused_before_a_form_is_shown(page, live_server, files):
    log_in(page, live_server.url)
    select(page, f"{live_server.url}/admin/datafiles/datafile/", *(file.name for file in files))
    start(page, "Start: Rename")
    expect(page.locator(".messagelist")).to_have_text(
        "'Rename' is started on 3 objects at most, got 4. Start it on fewer."
    )
    assert not TaskModel.objects.exists()


def test_a_person_is_offered_what_that_person_may_start(page, live_server, files):
    person = User.objects.create_user("ada", password="lovelace", is_staff=True)
    person.user_permissions.add(Permission.objects.get(codename="view_datafile"))
    page.goto(f"{live_server.url}/admin/login/")
    page.get_by_label("Username:").fill("ada")
    page.get_by_label("Password:").fill("lovelace")
    page.get_by_role("button", name="Log in").click()
    select(page, f"{live_server.url}/admin/datafiles/datafile/", "file 2")
    start(page, "Start: Flag custom")
    page.get_by_role("button", name="Start").click()
    # Who may not look at tasks stays on the list.
    expect(page).to_have_url(f"{live_server.url}/admin/datafiles/datafile/")
    expect(page.locator(".messagelist")).to_contain_text("Started “Flag custom”")


def test_a_setting_offers_jobs_in_an_admin_that_knows_nothing_of_them(settings):
    settings.FIREFLY_JOBS = settings.FIREFLY_JOBS | {
        "JOB_ADMIN_ACTIONS": {"datafiles.Project": "datafile"}
    }
    before = type(admin.site.get_model_admin(Project))
    assert get_settings().JOB_ADMIN_ACTIONS
    try:
        apply_setting()
        apply_setting()
        offering: Any = admin.site.get_model_admin(Project)
        assert (type(offering).__bases__[1], offering.job_data_type) == (before, "datafile")
    finally:
        admin.site.unregister(Project)
        admin.site.register(Project, before)


def test_a_schedule_is_made_changed_and_run(page, live_server, files):
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/admin/firefly_jobs/schedulemodel/add/")
    page.get_by_label("Name:").fill("sums")
    page.get_by_label("Function:").select_option("tests.testapp.tasks.add")
    page.get_by_label("Arguments:").fill('{"args": [1], "kwargs": {"c": 2}}')
    page.get_by_label("Cron expression:").fill("0 0 29 2")
    page.get_by_label("Time zone:").fill("Europe/Oslo")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".errorlist")).to_have_count(1)
    expect(page.locator(".field-cron .errorlist")).to_contain_text("must have five fields")
    page.get_by_label("Cron expression:").fill("0 0 29 2 *")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".field-arguments .errorlist")).to_contain_text(
        "got an unexpected keyword argument 'c'"
    )
    page.get_by_label("Arguments:").fill('{"args": [1], "kwargs": {"b": 2}}')
    page.get_by_role("button", name="Save and continue editing").click()

    schedule = ScheduleModel.objects.get()
    expect(page.locator(".field-next_occurrences .readonly div")).to_have_count(10)
    expect(page.locator(".field-next_occurrences")).to_contain_text("CE")
    page.get_by_label("Runs at most:").fill("3")
    page.get_by_role("button", name="Save", exact=True).click()
    schedule.refresh_from_db()
    assert (schedule.max_runs, schedule.cron) == (3, "0 0 29 2 *")

    select(page, f"{live_server.url}/admin/firefly_jobs/schedulemodel/", "sums")
    start(page, "Run selected schedules now")
    expect(page.locator(".messagelist")).to_contain_text("Started “sums”: ")
    run_burst()
    page.goto(f"{live_server.url}/admin/firefly_jobs/schedulemodel/{schedule.pk}/change/")
    expect(page.locator(".field-result")).to_contain_text("3")
    expect(page.locator(".field-success_count")).to_contain_text("1")
    picture(page, "schedule")
    select(page, f"{live_server.url}/admin/firefly_jobs/schedulemodel/", "sums")
    start(page, "Pause selected schedules")
    expect(page.locator("#result_list")).to_contain_text("paused")
    picture(page, "schedules")
    schedule.refresh_from_db()
    assert (schedule.is_paused, schedule.next_run) == (True, None)


def test_what_the_code_says_is_not_changed_by_hand(page, live_server):
    schedule = recurring_job("sums", add.job.with_args(1), every=60)
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/admin/firefly_jobs/schedulemodel/{schedule.pk}/change/")
    expect(page.locator(".field-name .readonly")).to_have_text("sums")
    page.get_by_label("Every, in seconds:").fill("0")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".field-every .errorlist")).to_contain_text("An interval must be 1")
    page.get_by_label("Every, in seconds:").fill("120")
    ScheduleModel.objects.filter(pk=schedule.pk).update(run_count=5)
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".messagelist")).to_contain_text("was changed successfully")
    schedule.refresh_from_db()
    assert (schedule.every, schedule.run_count) == (120, 5)


def test_a_saved_job_is_made_and_started(page, live_server, files):
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/admin/firefly_jobs/savedjob/add/")
    page.get_by_label("Name:").fill("flag apollo")
    page.get_by_label("Job:").select_option("Flag custom (datafile)")
    page.get_by_label("Arguments:").fill("{}")
    page.get_by_label("Type of target:").fill("datafiles.project")
    page.get_by_label("Target:", exact=True).fill(str(files[0].project_id))
    page.get_by_label("Objects of the target:").fill("files")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator(".field-relation .errorlist")).to_contain_text("no relation")
    page.get_by_label("Objects of the target:").fill("datafiles")
    page.get_by_role("button", name="Save", exact=True).click()
    assert SavedJob.objects.get().target == files[0].project
    select(page, f"{live_server.url}/admin/firefly_jobs/savedjob/", "flag apollo")
    start(page, "Start selected saved jobs")
    expect(page.locator(".messagelist")).to_contain_text("Started “flag apollo” as task")
    run_burst()
    assert DataFile.objects.filter(custom_flag=True).count() == 4
