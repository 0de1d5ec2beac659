"""Workflows in a real browser: the picture, the table, the buttons."""

import pytest
from django.db.models import Q
from playwright.sync_api import Dialog, Page, expect

from firefly_jobs import Workflow, WorkflowModel
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import TaskModel
from firefly_jobs.states import WorkflowStatus
from tests.acceptance.test_admin_browser import log_in, page, picture, pytestmark
from tests.testapp.tasks import add, echo

__all__ = ["page", "pytestmark"]


def call(text: str) -> object:
    return echo.job.with_args(text)


def left_as(run: WorkflowModel, **statuses: list[str]) -> None:
    """Write how steps ended, as a consumer would have left them; ``statuses`` hold names."""
    for status, names in statuses.items():
        rows = TaskModel.objects.filter(workflow=run, step__name__in=names)
        has_run = status in {"completed", "failed"}
        rows.update(status=status, duration=0.042 if has_run else None)


def diamond() -> WorkflowModel:
    wf = Workflow("diamond")
    first = wf.add(call("a"), name="extract")
    both = [wf.add(call("b"), name=name, depends_on=first) for name in ("clean", "enrich")]
    wf.add(call("c"), name="load", depends_on=both)
    run = wf.schedule()
    left_as(run, completed=["extract", "clean"], running=["enrich"])
    return run


def failed_import() -> WorkflowModel:
    """Write a workflow with levels, conditions, an ignored failure and one that stopped it."""
    wf = Workflow("nightly import", on_failure=call("sorry"))
    lock = wf.add(call("lock"), name="lock the warehouse", priority=10)
    wf.add(call("disk"), name="check the disk", priority=10, ignore_result=True)
    orders = wf.add(call("orders"), name="extract-orders-of-the-shop-in-oslo")
    customers = wf.add(call("customers"), name="extract customers")
    clean = wf.add(call("clean"), name="transform", depends_on=[orders, customers])
    load = wf.add(call("load"), name="load", depends_on=[clean, lock])
    wf.add(call("alarm"), name="alarm", depends_on=[load], when="failure")
    wf.add(
        call("tidy"), name="remove files", depends_on=[load, orders.when("always")], when="always"
    )
    wf.add(call("report"), name="report", priority=-5)
    run = wf.schedule()
    left_as(
        run,
        completed=["lock the warehouse", "extract customers", "remove files"],
        failed=["extract-orders-of-the-shop-in-oslo", "check the disk"],
        cancelled=["transform", "load", "alarm", "report"],
    )
    rows = TaskModel.objects.filter(workflow=run)
    rows.filter(status="failed").update(error="ConnectionError: <shop.example> hung up")
    stopped = Q(step__name__in=["transform", "load", "report"])
    rows.filter(stopped).update(error="cancelled: step 'extract-orders-of-the-shop-in-oslo' failed")
    WorkflowModel.objects.filter(pk=run.pk).update(
        status=WorkflowStatus.FAILED,
        error="step 'extract-orders-of-the-shop-in-oslo' failed: ConnectionError: hung up",
        created=SecondsFromNow(-75),
        ended=SecondsFromNow(-4),
    )
    run.refresh_from_db()
    return run


def fan(count: int) -> WorkflowModel:
    """Write a workflow of ``count`` steps: most of them side by side, a few behind each other."""
    wf = Workflow(f"{count} steps")
    first = wf.add(call("plan"), name="plan")
    shards = [
        wf.add(call("shard"), name=f"fetch shard {n}", depends_on=first) for n in range(count - 20)
    ]
    joined = wf.add(call("join"), name="join", depends_on=shards)
    ends = []
    for n in range(6):
        one = wf.add(call("part"), name=f"split {n}", depends_on=joined)
        two = wf.add(add.job.with_args(n, n), name=f"sum {n}", depends_on=one)
        ends.append(wf.add(add.job.with_args(n, 1), name=f"index {n}", depends_on=[two, one]))
    run = wf.schedule()
    left_as(
        run,
        completed=["plan", *(f"fetch shard {n}" for n in range(count // 3))],
        running=[f"fetch shard {n}" for n in range(count // 3, count // 3 + 4)],
        created=[f"fetch shard {n}" for n in range(count // 3 + 4, count)],
    )
    return run


def open_page(page: Page, url: str, run: WorkflowModel) -> None:
    page.goto(f"{url}/admin/firefly_jobs/workflowmodel/{run.pk}/change/")
    expect(page.locator(".firefly-picture")).to_be_visible()


def is_within_its_page(page: Page) -> bool:
    """Whether nothing but the picture and the table need to be scrolled sideways."""
    script = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    return bool(page.evaluate(script))


def test_pictures_of_workflows_small_and_large(page, live_server, transactional_db):
    wf = Workflow("a single step")
    wf.add(call("all"), name="everything")
    runs = {"one": wf.schedule(), "diamond": diamond(), "fifty": fan(50), "thousand": fan(1_000)}
    log_in(page, live_server.url)

    for name, run in runs.items():
        open_page(page, live_server.url, run)
        picture(page, f"workflow-{name}")
        assert is_within_its_page(page)
        shown = page.locator(".firefly-picture a")
        expect(shown).to_have_count({"one": 1, "diamond": 4, "fifty": 50, "thousand": 0}[name])

    expect(page.locator(".firefly-picture")).to_contain_text("echo \N{MULTIPLICATION SIGN} 980")
    expect(page.locator(".firefly-steps tbody tr")).to_have_count(200)
    page.get_by_role("link", name="All its tasks").click()
    expect(page.locator("#changelist .paginator")).to_contain_text("1000 tasks")


def test_failed_workflow_is_found_read_and_run_again(page, live_server, transactional_db):
    run = failed_import()
    diamond()
    log_in(page, live_server.url)
    page.get_by_role("link", name="Workflows", exact=True).first.click()
    picture(page, "workflow-list")
    page.locator("#changelist-filter").get_by_role("link", name="failed", exact=True).click()
    page.locator("#result_list").get_by_role("link", name="nightly import").click()
    picture(page, "workflow-failed")
    expect(page.locator(".field-last_error")).to_contain_text("ConnectionError: hung up")
    expect(page.locator(".field-ignored")).to_contain_text("check the disk")
    expect(page.locator("input[name=_save]")).to_have_count(0)

    page.locator(".firefly-picture").get_by_text("load", exact=True).click()
    expect(page.locator(".field-part_of")).to_contain_text("nightly import")
    picture(page, "workflow-step")
    page.locator(".field-part_of a").click()

    page.get_by_role("button", name="Retry what failed").click()
    expect(page.locator(".messagelist")).to_have_text("1 workflow runs again.")
    picture(page, "workflow-retried")
    run.refresh_from_db()
    assert (run.status, run.error) == (WorkflowStatus.RUNNING, "")

    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".messagelist")).to_have_text("1 workflow was cancelled.")
    run.refresh_from_db()
    assert run.status == WorkflowStatus.CANCELLED


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_picture_follows_the_theme_and_fits_a_narrow_window(
    page, live_server, transactional_db, scheme
):
    run = failed_import()
    log_in(page, live_server.url)
    page.emulate_media(color_scheme=scheme)
    open_page(page, live_server.url, run)
    picture(page, f"workflow-{scheme}")
    box = page.locator(".firefly-is-completed").last
    fill = box.evaluate("box => getComputedStyle(box).fill")
    assert fill == {"light": "rgb(220, 242, 223)", "dark": "rgb(23, 56, 31)"}[scheme]
    # What a person chose in the admin wins over the system.
    other = {"light": "dark", "dark": "light"}[scheme]
    page.evaluate(f"document.documentElement.dataset.theme = '{other}'")
    assert box.evaluate("box => getComputedStyle(box).fill") != fill

    page.evaluate(f"document.documentElement.dataset.theme = '{scheme}'")
    page.set_viewport_size({"width": 420, "height": 800})
    assert is_within_its_page(page)
    picture(page, f"workflow-narrow-{scheme}")


def test_hostile_names_do_nothing(page, live_server, transactional_db):
    asked: list[str] = []

    def note(dialog: Dialog) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", note)
    wf = Workflow("<script>alert('workflow')</script>")
    first = wf.add(call("a"), name="</title></svg><script>alert('step')</script>")
    wf.add(call("b"), name="\"><img src=x onerror=alert('image')>", depends_on=first)
    run = wf.schedule()
    log_in(page, live_server.url)

    open_page(page, live_server.url, run)

    expect(page.locator(".firefly-picture a")).to_have_count(2)
    expect(page.locator("#content img[src=x]")).to_have_count(0)
    page.goto(f"{live_server.url}/admin/firefly_jobs/workflowmodel/")
    expect(page.locator("#result_list")).to_contain_text("<script>alert('workflow')</script>")
    assert asked == []
