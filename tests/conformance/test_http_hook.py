"""The hook of the how-to that posts every end: to a scheduler that is there, away, or hangs."""

import json
import socket
from types import ModuleType
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import effects, run_burst
from tests.docs.pages import DOCS, blocks
from tests.factories import unique_name
from tests.support.web_server import web_server
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

TASKS: dict[str, Any] = {"sync": tasks.hooked, "async": tasks.ahooked_plainly}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


@pytest.fixture
def hook():
    """Return the hook as it stands in the documentation."""
    (source,) = [
        b.text for b in blocks(DOCS / "howto/hooks.md") if "class PostEnds(TaskHooks)" in b.text
    ]
    module = ModuleType("shop_hooks")
    exec(compile(source, "howto/hooks.md", "exec"), module.__dict__)
    made = module.__dict__["PostEnds"]()
    made.timeout_seconds = 0.5
    return made


def create():
    Effect.objects.create(task_key="posted", value=1)


async def acreate():
    await Effect.objects.acreate(task_key="posted", value=1)


def broken():
    create()
    raise ValueError


async def abroken():
    await acreate()
    raise ValueError


BODIES = {"sync": (create, broken), "async": (acreate, abroken)}


def run_both(kind, hook, *, look=lambda: None):
    """Run a call that succeeds, and one that fails, with the hook."""

    def after_return(run, status):
        look()
        hook.after_return(run, status)

    rows = []
    for body in BODIES[kind]:
        key, call = unique_name("posted"), TASKS[kind]
        tasks.BODIES[key], tasks.HOOKS[key] = body, {"after_return": after_return}
        rows.append(async_to_sync(call.schedule)(key) if call.is_async else call.schedule(key))
    run_burst(threads=1, async_slots=1)
    for row in rows:
        row.refresh_from_db()
    assert [row.status for row in rows] == ["completed", "failed"]
    assert effects() == [1]
    return rows


@KINDS
def test_every_end_is_posted_with_what_became_of_the_task(kind, hook):
    with web_server() as server:
        hook.url = f"{server.url}/runs"
        rows = run_both(kind, hook)

    assert {request[:2] for request in server.requests} == {("POST", "/runs")}
    reports = [json.loads(body) for *_, body in server.requests]
    assert sorted(reports, key=lambda report: report["id"]) == [
        {"id": row.pk, "task": row.func_name, "attempt": 1, "status": row.status} for row in rows
    ]


def test_what_is_posted_is_committed(hook):
    seen = []
    post = hook._post

    def look(report):
        seen.append(TaskModel.objects.get(pk=report["id"]).status)
        post(report)

    hook._post = look
    with web_server() as server:
        hook.url = server.url
        run_both("sync", hook)

    # A failure is settled once its hooks have run.
    assert sorted(seen) == ["completed", "running"]
    assert len(server.requests) == 2


@KINDS
def test_a_scheduler_that_is_away_harms_no_task_and_is_left_in_peace(kind, hook, caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        hook.url = f"http://127.0.0.1:{unused.getsockname()[1]}/runs"
        run_both(kind, hook)

    lines = [r.getMessage() for r in caplog.records if r.name == "shop.scheduler"]
    assert len(lines) == 2
    assert "refused" in lines[0]
    assert lines[1].endswith("the scheduler is away")


@KINDS
def test_a_scheduler_that_hangs_harms_no_task_and_is_waited_for_once(kind, hook, caplog):
    with web_server() as server:
        hook.url = f"{server.url}/wait"
        run_both(kind, hook)
        assert len(server.requests) == 1

    lines = [r.getMessage() for r in caplog.records if r.name == "shop.scheduler"]
    assert len(lines) == 2
    assert "timed out" in lines[0]


def test_a_scheduler_that_says_no_harms_no_task(hook, caplog):
    with web_server() as server:
        hook.url = f"{server.url}/status/503"
        run_both("sync", hook)

    assert "503" in caplog.text


def test_a_scheduler_that_has_come_back_is_told(hook):
    hook.pause_seconds = 0.0
    with web_server() as server:
        hook.url = f"{server.url}/status/503"
        run_both("sync", hook)
        assert len(server.requests) == 2
        hook.url = server.url
        Effect.objects.all().delete()
        run_both("sync", hook)

    assert len(server.requests) == 4
