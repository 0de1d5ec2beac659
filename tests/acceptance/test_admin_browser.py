"""The admin as a person uses it, in a real browser: find a failed task, read why, retry it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.db import connections
from playwright.sync_api import Page, expect, sync_playwright

from firefly_jobs import serializers
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import ConsumerModel, TaskAttempt, TaskModel
from firefly_jobs.states import Status

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ECHO = "tests.testapp.tasks.echo"

TRACEBACK = """Traceback (most recent call last):
  File "/srv/shop/tests/testapp/tasks.py", line 24, in echo
    raise ConnectionError("<mail.example> refused the connection")
ConnectionError: <mail.example> refused the connection
"""

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("REQUIRE_DATABASES") != "1",
        reason="no chromium on this machine",
    ),
]


@pytest.fixture
def page(monkeypatch) -> Iterator[Page]:
    # Playwright's own event loop runs in this thread, and Django would take its queries
    # for those of a coroutine.
    monkeypatch.setenv("DJANGO_ALLOW_ASYNC_UNSAFE", "true")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        # Others may use the machine as well.
        page.set_default_timeout(30_000)
        expect.set_options(timeout=30_000)
        yield page
        browser.close()
        # Beside a running loop Django keeps connections per context, out of reach of the
        # test's own teardown.
        connections.close_all()


def create_task(*args: object, ago: float = 0, **fields: object) -> TaskModel:
    values = {"func_name": ECHO, "status": Status.COMPLETED} | fields
    returned = values.pop("returned", None)
    if returned is not None:
        values["raw_returned"] = serializers.dumps_returned(
            returned, task_name=ECHO, serializer="pickle"
        )
    params = serializers.dumps_params(
        args, {}, task_name=str(values["func_name"]), serializer="pickle"
    )
    task = TaskModel.objects.create(raw_params=params, **values)
    TaskModel.objects.filter(pk=task.pk).update(created=SecondsFromNow(-ago))
    return task


@pytest.fixture
def failed(transactional_db) -> TaskModel:
    """Write what a busy hour leaves behind; return the task that failed for good."""
    consumer = ConsumerModel.objects.create(
        name="worker-1.example:4711", queues="default,mail", lease_seconds=30
    )
    silent = ConsumerModel.objects.create(name="worker-2.example:99", queues="*", lease_seconds=30)
    ConsumerModel.objects.filter(pk=silent.pk).update(renewed_at=SecondsFromNow(-400))
    for number in range(12):
        create_task(
            number, returned={"sum": number}, duration=0.004 * (number + 1), ago=3600 - 60 * number
        )
    create_task("later", status=Status.CREATED, queue="mail", priority=50, ago=30)
    create_task("not wanted", status=Status.CANCELLED, error="cancelled while it waited")
    running = create_task("long", status=Status.RUNNING, consumer=consumer.pk, fence=1, ago=90)
    retried = create_task("again", status=Status.CREATED, retry_attempts=1, max_retries=5, ago=60)
    failed = create_task(
        "customer@shop.example",
        {"order": 17, "lines": ["a", "b"]},
        status=Status.FAILED,
        queue="mail",
        error="ConnectionError: <mail.example> refused the connection",
        retry_attempts=1,
        max_retries=1,
        retry_delay=60,
        duration=1.234,
        fence=2,
        ago=120,
    )
    TaskModel.objects.filter(pk=running.pk).update(started=SecondsFromNow(-75))
    TaskModel.objects.filter(pk=retried.pk).update(not_before=SecondsFromNow(900))
    TaskModel.objects.filter(pk=failed.pk).update(
        started=SecondsFromNow(-11), failed=SecondsFromNow(-10)
    )
    for task, numbers in ((retried, [1]), (failed, [1, 2])):
        for number in numbers:
            TaskAttempt.objects.create(
                task=task,
                number=number,
                fence=number,
                outcome="failed" if number == 2 else "retried",
                consumer=consumer.pk,
                duration=1.234,
                error="ConnectionError: <mail.example> refused the connection",
                traceback=TRACEBACK,
            )
    return failed


def log_in(page: Page, url: str) -> None:
    User.objects.create_superuser("anna", password="firefly")
    page.goto(f"{url}/admin/")
    page.get_by_label("Username:").fill("anna")
    page.get_by_label("Password:").fill("firefly")
    page.get_by_role("button", name="Log in").click()


def picture(page: Page, name: str) -> None:
    """Keep what the browser shows, if somebody wants to look at it."""
    directory = os.environ.get("FIREFLY_SCREENSHOTS")
    if directory:
        page.screenshot(path=Path(directory) / f"{name}.png", full_page=True)


def test_failed_task_is_found_read_and_retried(page, live_server, failed):
    log_in(page, live_server.url)
    page.get_by_role("link", name="Tasks", exact=True).first.click()
    expect(page.locator("#result_list tbody tr")).to_have_count(17)
    picture(page, "list")

    page.locator("#changelist-filter").get_by_role("link", name="failed", exact=True).click()
    expect(page.locator("#result_list tbody tr")).to_have_count(1)

    page.locator("#result_list").get_by_role("link", name=str(failed.pk), exact=True).click()
    picture(page, "failed")
    content = page.locator("#content")
    expect(content).to_contain_text("echo(\n    'customer@shop.example',")
    expect(content.locator("details").first).to_have_attribute("open", "")
    expect(content.locator("details pre").first).to_have_text(TRACEBACK)
    expect(content.locator("input[name=_save]")).to_have_count(0)

    page.go_back()
    page.locator("#result_list").get_by_role("checkbox").first.check()
    page.get_by_label("Action:").select_option(label="Retry selected tasks (failed or cancelled)")
    page.get_by_role("button", name=re.compile("^(Go|Run)")).click()

    expect(page.locator(".messagelist")).to_have_text("1 task is due again.")
    picture(page, "retried")
    task = TaskModel.objects.get(pk=failed.pk)
    assert (task.status, task.retry_attempts) == (Status.CREATED, 0)
    assert task in TaskModel.objects.due()


def test_button_on_the_page_retries_and_then_cancels(page, live_server, failed):
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/admin/firefly_jobs/taskmodel/{failed.pk}/change/")

    page.get_by_role("button", name="Retry").click()
    expect(page.locator(".messagelist")).to_have_text("1 task is due again.")
    expect(page.locator(".field-state .firefly-status")).to_have_text("created")

    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".messagelist")).to_have_text("1 task was cancelled.")
    expect(page.locator(".field-state .firefly-status")).to_have_text("cancelled")
    picture(page, "cancelled")
    assert TaskModel.objects.get(pk=failed.pk).status == Status.CANCELLED


def test_search_and_consumers(page, live_server, failed):
    log_in(page, live_server.url)
    page.goto(f"{live_server.url}/admin/firefly_jobs/taskmodel/")
    page.locator("#searchbar").fill(f"#{failed.pk}")
    page.locator("#searchbar").press("Enter")
    expect(page.locator("#result_list tbody tr")).to_have_count(1)

    page.goto(f"{live_server.url}/admin/firefly_jobs/consumermodel/")
    picture(page, "consumers")
    expect(page.locator("#result_list")).to_contain_text("alive")
    expect(page.locator("#result_list")).to_contain_text(re.compile(r"6 min 4\d s ago"))
