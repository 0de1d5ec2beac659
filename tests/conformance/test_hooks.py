"""Hooks: what they see, what they can do, and that none of them changes what a call was."""

import contextvars
import logging
import threading
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, IntegrityError, connection, transaction

from firefly_jobs import Cancel, Exponential, Retry, Snooze, TaskHooks, current_task
from firefly_jobs.consumer import Consumer
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import (
    Gate,
    captured_statements,
    claim_one,
    consuming,
    deadlock,
    effects,
    outcomes,
    outside,
    prepare_deadlock,
    query,
    run_burst,
    run_until_ended,
    take_over,
)
from tests.conformance.test_groups import WARM_UP, groups, members
from tests.factories import unique_name
from tests.support.waiting import eventually
from tests.testapp.models import Effect, Ticket

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch):
    """Take calls for short that take their time because others use the machine as well."""
    monkeypatch.setattr("firefly_jobs.pace.SHORT_SECONDS", 1.0)


def create(value=1):
    Effect.objects.create(task_key="hooked", value=value)


async def acreate(value=1):
    await Effect.objects.acreate(task_key="hooked", value=value)


def nothing():
    pass


async def anothing():
    pass


def broken():
    create(99)
    raise ValueError("broken")


def doomed():
    create(98)
    transaction.set_rollback(True)


async def abroken():
    await acreate(99)
    raise ValueError("broken")


def raising(error):
    def hook(*_):
        raise error

    return hook


def schedule_hooked(body, *, task=tasks.hooked, **hooks):
    key = unique_name("hooked")
    tasks.BODIES[key], tasks.HOOKS[key] = body, hooks
    if task.is_async:
        return async_to_sync(task.schedule)(key)
    return task.schedule(key)


def run_hooked(body, *, task=tasks.hooked, **hooks):
    row = schedule_hooked(body, task=task, **hooks)
    run_burst()
    row.refresh_from_db()
    return row


class Heard:
    """Hooks of all kinds that write down what they were called with."""

    def __init__(self):
        self.events = []
        self.hooks = {
            event: self._hook(event)
            for event in ("before_start", "on_success", "on_failure", "on_retry", "after_return")
        }
        self.async_hooks = {event: self._async(hook) for event, hook in self.hooks.items()}

    def _hook(self, event):
        def hook(run, *values):
            said = [str(value) if isinstance(value, Exception) else value for value in values]
            self.events.append((event, *said))

        return hook

    def _async(self, hook):
        async def ahook(*values):
            hook(*values)

        return ahook


@pytest.fixture
def heard():
    return Heard()


TASKS: dict[str, Any] = {
    "plain": tasks.hooked,
    "autocommit": tasks.hooked_in_autocommit,
    "async": tasks.ahooked,
    "async with plain hooks": tasks.ahooked_plainly,
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


@pytest.fixture
def of_kind(kind, heard):
    """Schedule a call of any kind of task: by what it does and raises, with all hooks."""
    task = TASKS[kind]
    is_async, hooks = task.is_async, heard.async_hooks if kind == "async" else heard.hooks

    def run(*, returned=None, error=None, **options):
        def body():
            if error is not None:
                raise error
            return returned

        async def abody():
            return body()

        key = unique_name("kind")
        tasks.BODIES[key], tasks.HOOKS[key] = abody if is_async else body, hooks
        changed = task.using(**options)
        row = async_to_sync(changed.schedule)(key) if is_async else changed.schedule(key)
        run_burst()
        row.refresh_from_db()
        return row

    return run


# --- which hooks an attempt gets


@KINDS
def test_a_success_gets_on_success_and_after_return(of_kind, heard):
    row = of_kind(returned=5)

    assert row.status == "completed"
    assert heard.events == [("before_start",), ("on_success", 5), ("after_return", "completed")]


@KINDS
def test_a_failure_gets_on_failure_and_after_return(of_kind, heard):
    row = of_kind(error=ValueError("broken"))

    assert row.status == "failed"
    assert heard.events == [("before_start",), ("on_failure", "broken"), ("after_return", "failed")]


@KINDS
def test_an_attempt_that_is_retried_gets_on_retry_and_not_on_failure(of_kind, heard):
    row = of_kind(error=ValueError("broken"), max_retries=1, retry_delay=0)

    assert row.status == "failed"
    assert heard.events == [
        ("before_start",),
        ("on_retry", "broken", 0.0),
        ("after_return", "retried"),
        ("before_start",),
        ("on_failure", "broken"),
        ("after_return", "failed"),
    ]


@KINDS
@pytest.mark.parametrize(
    ("error", "status"), [(Snooze(delay=3600), "snoozed"), (Cancel("no"), "cancelled")]
)
def test_a_snoozed_or_cancelled_attempt_gets_after_return_only(error, status, of_kind, heard):
    of_kind(error=error)

    assert heard.events == [("before_start",), ("after_return", status)]


def test_what_one_hook_is_told_about_the_delay_is_what_the_row_gets():
    told = []
    strategy = Exponential(3, base_delay=1000, max_delay=10_000, jitter_ratio=0.5)
    key = unique_name("delay")
    tasks.BODIES[key] = raising(ValueError())
    tasks.HOOKS[key] = {"on_retry": lambda run, error, delay: told.append(delay)}
    row = tasks.hooked.using(retry=strategy).schedule(key)
    run_burst()

    row.refresh_from_db()
    assert row.not_before is not None
    assert (row.not_before - row.created).total_seconds() == pytest.approx(told[0], abs=20)


def test_a_random_strategy_is_asked_once(monkeypatch):
    asked = []

    def pause_seconds(self, *, task_id, attempt):
        asked.append(attempt)
        return 3600.0 * len(asked)

    monkeypatch.setattr(Exponential, "pause_seconds", pause_seconds)
    key = unique_name("random")
    tasks.BODIES[key], tasks.HOOKS[key] = raising(ValueError()), {"on_retry": lambda *_: None}
    tasks.hooked.using(retry=Exponential(3)).schedule(key)
    run_burst()

    assert asked == [1]


def test_an_attempt_whose_arguments_cannot_be_read_gets_the_hooks_of_a_failure(jobs, monkeypatch):
    seen: list[Any] = []

    class Global(TaskHooks):
        def before_start(self, run):
            seen.append("before_start")

        def on_failure(self, run, error):
            seen.append((run.args, type(error).__name__))

    share(monkeypatch, Global())
    row = tasks.nothing.schedule()
    TaskModel.objects.filter(pk=row.pk).update(raw_params="nonsense")
    run_burst()

    assert seen == [((), "PayloadError")]


@pytest.mark.parametrize("event", ["before_start", "on_success"])
def test_a_hook_that_closes_the_connection_fails_its_call_and_is_told_so(event):
    def close(*_):
        create(2)
        connection.close()

    row = run_hooked(lambda: create(1), **{event: close})

    assert (row.status, effects()) == ("failed", [])
    assert "The hook closed its call's database connection" in row.error


@pytest.mark.server  # SQLite has one writer, so nobody can take a row while a call writes
def test_what_a_lost_lease_drops_gets_no_more_hooks(heard):
    def lose():
        create()
        pk = current_task().id
        outside(lambda: TaskModel.objects.filter(pk=pk).update(fence=99, status="completed"))

    schedule_hooked(lose, **heard.hooks)
    run_burst()

    assert heard.events == [("before_start",), ("on_success", None), ("after_return", "completed")]
    assert effects() == []


# --- where they run


def test_a_hook_sees_the_context_of_its_call():
    seen = []
    variable = contextvars.ContextVar("variable", default="unset")

    def before(run):
        run.cache["from"] = "before_start"
        variable.set("set by a hook")
        seen.append((run is current_task(), run.attempt, threading.current_thread().name))

    def after(run, status):
        seen.append((run.cache["from"], variable.get(), threading.current_thread().name))

    run_hooked(nothing, before_start=before, after_return=after)
    run_hooked(broken, before_start=before, after_return=after)

    lane = "firefly-lane-1"
    assert seen == [(True, 1, lane), ("before_start", "set by a hook", lane)] * 2


def test_what_hooks_write_commits_with_the_call():
    row = run_hooked(
        lambda: create(2),
        before_start=lambda run: create(1),
        on_success=lambda run, returned: create(3),
        after_return=lambda run, status: create(4),
    )

    assert row.status == "completed"
    assert effects() == [1, 2, 3, 4]


def test_what_coroutine_hooks_write_commits_with_the_call():
    async def before(run):
        await acreate(1)

    async def success(run, returned):
        await acreate(3)

    row = run_hooked(
        lambda: acreate(2), task=tasks.ahooked, before_start=before, on_success=success
    )

    assert row.status == "completed"
    assert effects() == [1, 2, 3]


@pytest.mark.parametrize("task", [tasks.hooked, tasks.ahooked_plainly], ids=["plain", "async"])
def test_what_failure_hooks_write_stays_though_the_call_is_undone(task):
    is_in_block = []

    def failed(run, error):
        is_in_block.append(connection.in_atomic_block)
        create(1)

    row = run_hooked(
        abroken if task.is_async else broken,
        task=task,
        before_start=lambda run: create(98),
        on_failure=failed,
        after_return=lambda run, status: create(2),
    )

    assert row.status == "failed"
    assert is_in_block == [False]
    assert effects() == [1, 2]


def test_what_coroutine_failure_hooks_write_stays():
    async def failed(run, error):
        await acreate(1)

    row = run_hooked(abroken, task=tasks.ahooked, on_failure=failed)

    assert row.status == "failed"
    assert effects() == [1]


def statuses_of(*rows):
    for row in rows:
        row.refresh_from_db()
    return [row.status for row in rows]


def test_calls_go_on_in_their_transactions_after_hooks_in_autocommit_mode():
    first = schedule_hooked(broken, on_failure=lambda run, error: create(1))
    second = schedule_hooked(doomed)
    third = schedule_hooked(lambda: create(3))
    run_burst()

    assert statuses_of(first, second, third) == ["failed", "failed", "completed"]
    assert effects() == [1, 3]


def leave_open(*_):
    connection.set_autocommit(False)
    create(1)


async def aleave_open(*_):
    await sync_to_async(leave_open)()


@pytest.mark.parametrize(
    ("body", "task", "hook"),
    [
        (broken, tasks.hooked, leave_open),
        (abroken, tasks.ahooked, aleave_open),
        (abroken, tasks.ahooked_plainly, leave_open),
    ],
    ids=["sync", "async", "async with a plain hook"],
)
@pytest.mark.parametrize("options", [{}, {"group_commit": True}], ids=["single", "group"])
def test_a_transaction_that_a_failure_hook_left_open_is_undone(body, task, hook, options):
    # Nothing runs after it on its thread, and its own outcome is written by another one.
    row = schedule_hooked(body, task=task, on_failure=hook)
    run_burst(**options)

    assert statuses_of(row) == ["failed"]
    assert effects() == []


@pytest.mark.sqlite
@pytest.mark.postgresql
def test_a_completion_that_cannot_be_committed_is_a_failure_to_the_hooks(heard):
    def body():
        Ticket.objects.create(effect_id=10**9)

    row = run_hooked(body, **heard.hooks)

    assert row.status == "failed"
    events = [event for event, *_ in heard.events]
    assert events == ["before_start", "on_success", "after_return", "on_failure", "after_return"]


def test_hooks_that_query_nothing_leave_a_call_untouched(heard, monkeypatch):
    settled = []
    monkeypatch.setattr("firefly_jobs.lifecycle.complete", lambda *_, **__: settled.append(1))
    row = run_hooked(nothing, **heard.hooks)

    assert row.status == "completed"
    assert settled == []


def test_hooks_that_query_nothing_cost_no_statement(heard):
    seen, keep = [], []

    def run(hooks):
        def body():
            # Until after the call, and the hooks that follow, have ended.
            keep.append(captured_statements())
            seen.append(keep[-1].__enter__())
            create()

        run_hooked(body, **hooks)

    run({})
    run(heard.hooks)

    plain, hooked = seen
    assert len(plain) == len(hooked) > 0


# --- what they raise


@KINDS
@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), Retry(delay=1)], ids=repr)
def test_what_a_hook_raises_is_logged_and_changes_nothing(error, kind, caplog):
    task = TASKS[kind]

    async def araise(*_):
        raise error

    hook = araise if kind == "async" else raising(error)
    hooks = dict.fromkeys(["on_success", "on_failure", "after_return"], hook)
    body = anothing if task.is_async else nothing
    row = run_hooked(body, task=task, **hooks)
    failed = run_hooked(abroken if task.is_async else broken, task=task, **hooks)

    assert (row.status, failed.status) == ("completed", "failed")
    assert failed.error == "ValueError: broken"
    lines = [record for record in caplog.records if "Hook" in record.getMessage()]
    names = [record.getMessage().split()[1].split(".")[1] for record in lines]
    assert names == ["on_success", "after_return", "on_failure", "after_return"]
    assert all(record.exc_info and record.exc_info[1] is error for record in lines)
    assert [record.task_id for record in lines] == [row.pk] * 2 + [failed.pk] * 2


@pytest.mark.parametrize("task", [tasks.hooked, tasks.ahooked_plainly], ids=["plain", "async"])
def test_what_a_hook_wrote_that_raises_is_undone_by_itself(task):
    called = []

    def before(run):
        create(97)
        transaction.on_commit(lambda: called.append("on_commit"))
        raise ValueError

    def success(run, returned):
        create(98)
        Effect.objects.update(value=77)
        raise ValueError

    body = (lambda: acreate(1)) if task.is_async else (lambda: create(1))
    row = run_hooked(
        body,
        task=task,
        before_start=before,
        on_success=success,
        after_return=lambda run, status: create(2),
    )

    assert row.status == "completed"
    assert effects() == [1, 2]
    assert called == []


def test_what_a_coroutine_hook_wrote_that_raises_is_undone_by_itself():
    async def before(run):
        await acreate(98)
        raise ValueError

    async def success(run, returned):
        await acreate(99)
        raise ValueError

    row = run_hooked(
        lambda: acreate(1), task=tasks.ahooked, before_start=before, on_success=success
    )

    assert row.status == "completed"
    assert effects() == [1]


def test_a_bulk_and_blocks_of_a_hook_are_kept_or_undone_as_a_whole():
    def success(run, returned):
        Effect.objects.bulk_create([Effect(task_key="bulk", value=n) for n in (2, 3)])
        with transaction.atomic():
            create(4)

    def after(run, status):
        success(run, None)
        raise ValueError

    row = run_hooked(lambda: create(1), on_success=success, after_return=after)

    assert row.status == "completed"
    assert effects() == [1, 2, 3, 4]


def test_a_database_error_that_a_hook_swallows_does_not_doom_the_call(caplog):
    def success(run, returned):
        create(98)
        with suppress(IntegrityError):
            Effect.objects.create(task_key=None)  # type: ignore[misc]

    row = run_hooked(lambda: create(1), on_success=success)

    assert row.status == "completed"
    assert effects() == [1]
    assert "PlainHooks.on_success raised" in caplog.text


@pytest.mark.parametrize("task", [tasks.hooked, tasks.ahooked_plainly], ids=["plain", "async"])
def test_an_error_that_the_first_statement_swallows_is_undone(task, caplog):
    def before(run):
        with suppress(DatabaseError):
            query(connection, "SELECT * FROM no_such_table")

    row = run_hooked(
        (lambda: acreate(1)) if task.is_async else (lambda: create(1)),
        task=task,
        before_start=before,
    )

    assert row.status == "completed"
    assert effects() == [1]


def test_a_time_limit_covers_the_hooks_of_a_coroutine(caplog):
    async def wait(*_):
        await Gate().wait()

    rows = []
    for event, body in (("on_success", anothing), ("on_failure", raising(ValueError("mine")))):
        key = unique_name("limited")
        tasks.BODIES[key], tasks.HOOKS[key] = body, {event: wait}
        rows.append(async_to_sync(tasks.ahooked.using(time_limit=1).schedule)(key))
    run_until_ended(*rows)

    assert [row.error for row in rows] == [
        "TimeLimitExceeded: It ran for more than 1s.",
        "ValueError: mine",
    ]
    assert "were stopped before they had ended" in caplog.text


def test_a_hook_that_ends_the_transaction_is_kept_from_it(caplog):
    row = run_hooked(
        lambda: create(1), on_success=lambda run, returned: query(connection, "COMMIT")
    )

    assert row.status == "completed"
    assert effects() == [1]
    assert "ImplicitCommitError" in caplog.text


@pytest.mark.mysql
def test_a_deadlock_in_a_hook_is_a_loss_where_it_takes_the_call_with_it():
    mine, theirs = prepare_deadlock()
    tries = []

    def success(run, returned):
        tries.append(run.fence)
        if len(tries) == 1:
            deadlock(mine, theirs)

    row = schedule_hooked(lambda: create(1), on_success=success)
    run_until_ended(row)

    assert row.status == "completed"
    assert outcomes(row) == ["lost"]
    assert effects().count(1) == 1


@pytest.mark.parametrize("task", [tasks.hooked, tasks.ahooked], ids=["plain", "async"])
def test_before_start_may_retry_snooze_or_cancel(task):
    called = []

    def run(error):
        async def abody():
            called.append(1)

        async def ahook(run):
            raise error

        is_async = task.is_async
        body = abody if is_async else (lambda: called.append(1))
        return run_hooked(body, task=task, before_start=ahook if is_async else raising(error))

    assert run(Cancel("not today")).error == "not today"
    snoozed = run(Snooze(delay=3600))
    assert (snoozed.status, outcomes(snoozed)) == ("created", ["snoozed"])
    assert run(Retry()).status == "failed"
    assert called == []


# --- limits and shutdown


@pytest.mark.parametrize("event", ["before_start", "on_success"])
def test_a_time_limit_covers_hooks(event):
    def spin(*_):
        while True:
            pass

    key = unique_name("limited")
    tasks.BODIES[key] = lambda: create(99)
    tasks.HOOKS[key] = {event: spin, "on_failure": lambda run, error: create(1)}
    row = tasks.hooked.using(time_limit=1).schedule(key)
    run_burst()

    row.refresh_from_db()
    assert row.error == "TimeLimitExceeded: It ran for more than 1s."
    assert effects() == [1]


def test_a_time_limit_covers_hooks_that_follow_a_failure(caplog):
    def spin(*_):
        while True:
            pass

    key = unique_name("limited")
    tasks.BODIES[key], tasks.HOOKS[key] = raising(ValueError("mine")), {"on_failure": spin}
    row = tasks.hooked.using(time_limit=1).schedule(key)
    run_burst()

    row.refresh_from_db()
    assert row.error == "ValueError: mine"
    assert "were stopped before they had ended" in caplog.text


@pytest.mark.parametrize("event", ["on_success", "on_failure"])
def test_a_shutdown_interrupts_a_hook(event):
    is_spinning = threading.Event()

    def spin(*_):
        is_spinning.set()
        while True:
            pass

    body = nothing if event == "on_success" else raising(ValueError())
    row = schedule_hooked(body, **{event: spin})
    with consuming(shutdown_timeout=0):
        assert is_spinning.wait(10)

    row.refresh_from_db()
    # What the attempt was is decided before the hooks of a failure are called.
    assert row.status == ("created" if event == "on_success" else "failed")


def test_a_call_that_a_shutdown_interrupts_gets_after_return(heard):
    is_spinning = threading.Event()

    def spin():
        is_spinning.set()
        while True:
            pass

    row = schedule_hooked(spin, **heard.hooks)
    with consuming(shutdown_timeout=0):
        assert is_spinning.wait(10)

    row.refresh_from_db()
    assert row.status == "created"
    assert heard.events == [("before_start",), ("after_return", "released")]


def test_a_coroutine_that_a_shutdown_interrupts_gets_after_return(heard):
    gate, is_waiting = Gate(), threading.Event()

    async def wait():
        is_waiting.set()
        await gate.wait()

    row = schedule_hooked(wait, task=tasks.ahooked, **heard.async_hooks)
    with consuming(shutdown_timeout=0):
        assert is_waiting.wait(10)

    row.refresh_from_db()
    assert row.status == "created"
    assert heard.events == [("before_start",), ("after_return", "released")]


@pytest.mark.server
def test_a_call_that_meets_in_a_deadlock_gets_after_return(heard):
    mine, theirs = prepare_deadlock()

    def meet():
        if not any(event == ("after_return", "lost") for event in heard.events):
            deadlock(mine, theirs)

    row = schedule_hooked(meet, **heard.hooks)
    run_until_ended(row)

    assert row.status == "completed"
    assert heard.events[:2] == [("before_start",), ("after_return", "lost")]
    assert heard.events[2:] == [
        ("before_start",),
        ("on_success", None),
        ("after_return", "completed"),
    ]


# --- groups


def schedule_warm_up():
    for _ in range(WARM_UP):
        schedule_hooked(nothing)


def test_hooks_of_calls_in_a_group_commit_with_it():
    schedule_warm_up()
    rows = [
        schedule_hooked(
            lambda n=n: create(n), on_success=lambda run, returned, n=n: create(100 + n)
        )
        for n in range(10)
    ]
    with groups() as found:
        run_burst(group_commit=True)

    assert members(found) == [row.pk for row in rows]
    assert sorted(effects()) == [*range(10), *range(100, 110)]


def test_a_hook_that_raises_in_a_group_is_undone_by_itself():
    schedule_warm_up()

    def bad(run, returned):
        create(99)
        raise ValueError

    rows = [schedule_hooked(lambda n=n: create(n), on_success=bad) for n in range(5)]
    with groups() as found:
        run_burst(group_commit=True)

    assert members(found) == [row.pk for row in rows]
    assert effects() == list(range(5))


def test_hooks_of_a_failure_in_a_group_are_called_once_the_group_has_ended():
    schedule_warm_up()
    seen = []

    def failed(run, error):
        seen.append((connection.in_atomic_block, outside(effects)))
        create(100)

    before = [schedule_hooked(lambda n=n: create(n)) for n in range(3)]
    row = schedule_hooked(broken, on_failure=failed)
    after = [schedule_hooked(lambda n=n: create(n)) for n in range(3, 6)]
    with groups() as found:
        run_burst(group_commit=True)

    row.refresh_from_db()
    assert row.status == "failed"
    assert seen == [(False, [0, 1, 2])]
    assert sorted(effects()) == [*range(6), 100]
    assert members(found) == [row.pk for row in before + after]


# --- what they may change


@KINDS
def test_what_a_hook_changes_of_its_row_is_written_when_it_is_settled(kind, of_kind, heard):
    def change(run, *_):
        run.label = "changed"
        run.metadata = {"tries": run.attempt}

    async def achange(run, *_):
        change(run)

    (heard.async_hooks if kind == "async" else heard.hooks)["after_return"] = (
        achange if kind == "async" else change
    )
    for row in (of_kind(), of_kind(error=ValueError())):
        assert (row.label, row.metadata) == ("changed", {"tries": 1})


def test_what_a_call_with_effects_changes_is_written_by_the_statement_that_settles_it():
    statements, keep = [], []

    def body():
        # Until after the call has ended.
        keep.append(captured_statements())
        statements.append(keep[0].__enter__())
        create()
        current_task().label = "changed"

    row = run_hooked(body)

    assert (row.status, row.label, row.returned) == ("completed", "changed", None)
    updates = [sql for sql, _ in statements[0] if sql.startswith("UPDATE")]
    assert len(updates) == 1


def test_metadata_of_the_row_can_be_added_to():
    key = unique_name("metadata")
    tasks.BODIES[key] = nothing
    tasks.HOOKS[key] = {"on_success": lambda run, returned: run.metadata.update(took=3)}
    row = tasks.hooked.using(metadata={"from": "web"}, label="given").schedule(key)
    run_burst()

    row.refresh_from_db()
    assert (row.metadata, row.label) == ({"from": "web", "took": 3}, "given")


def test_a_coroutine_hook_loads_what_it_adds_to():
    async def success(run, returned):
        await run.aload()
        run.metadata["label"] = run.label

    key = unique_name("metadata")
    tasks.BODIES[key], tasks.HOOKS[key] = anothing, {"on_success": success}
    row = async_to_sync(tasks.ahooked.using(label="given").schedule)(key)
    run_burst()

    row.refresh_from_db()
    assert row.metadata == {"label": "given"}


def test_changes_that_cannot_be_stored_are_logged_and_left_out(caplog):
    def success(run, returned):
        run.label = "kept"
        run.metadata["bad"] = object()

    row = run_hooked(nothing, on_success=success)

    assert (row.status, row.label, row.metadata) == ("completed", "", {})
    assert "cannot be stored" in caplog.text


def test_calls_in_a_group_write_their_changes():
    schedule_warm_up()

    def success(run, returned):
        run.label = "changed"

    changed = [schedule_hooked(create, on_success=success) for _ in range(3)]
    plain = [schedule_hooked(create) for _ in range(3)]
    with groups() as found:
        run_burst(group_commit=True)

    assert members(found) == [row.pk for row in plain]
    labels = TaskModel.objects.filter(pk__in=[r.pk for r in changed]).values_list("status", "label")
    assert list(labels) == [("completed", "changed")] * 3


# --- every task


def share(monkeypatch, *hooks):
    """Give every task these hooks."""
    for home in ("firefly_jobs.executors.hooking", "firefly_jobs.hooks", "firefly_jobs.consumer"):
        monkeypatch.setattr(f"{home}.shared_hooks", lambda: hooks)


class Everywhere(TaskHooks):
    """Hooks of every task, by name."""

    def before_start(self, run):
        run.cache["order"] = ["everywhere"]


def test_hooks_of_every_task_come_before_its_own(jobs):
    jobs(HOOKS=[f"{__name__}.Everywhere"])
    seen = []

    def own(run):
        seen.append([*run.cache["order"], "own"])

    row = run_hooked(nothing, before_start=own)

    assert row.status == "completed"
    assert seen == [["everywhere", "own"]]


def test_a_consumer_refuses_to_start_with_hooks_that_are_none(jobs):
    jobs(HOOKS=["tests.conformance.test_hooks.no_such_name"])

    with pytest.raises(ImproperlyConfigured, match="no_such_name"):
        Consumer()


def test_a_call_that_was_taken_over_is_no_concern_of_its_hooks(heard):
    row = schedule_hooked(nothing, **heard.hooks)
    take_over(claim_one())
    TaskModel.objects.filter(pk=row.pk).update(status="created")
    run_burst()

    assert heard.events[-1] == ("after_return", "completed")


@pytest.mark.parametrize("body", [anothing, abroken])
def test_plain_hooks_of_a_coroutine_give_its_lane_back(body):
    rows = [
        schedule_hooked(
            body,
            task=tasks.ahooked_plainly,
            before_start=lambda run: None,
            after_return=lambda run, status: None,
        )
        for _ in range(30)
    ]
    run_burst(async_connections=2)

    ended = TaskModel.objects.filter(pk__in=[row.pk for row in rows], status__in=["created"])
    assert not ended.exists()


def test_a_hook_that_awaits_does_not_hold_up_other_coroutines():
    order = []

    async def wait(run, returned):
        await sync_to_async(lambda: None)()
        order.append("hook")

    rows = [schedule_hooked(anothing, task=tasks.ahooked, on_success=wait) for _ in range(20)]
    run_burst()

    assert len(order) == len(rows)


def test_lines_about_hooks_carry_the_fields_of_a_task(caplog):
    caplog.set_level(logging.ERROR, "firefly_jobs")
    row = run_hooked(nothing, on_success=raising(ValueError("mine")))

    def line():
        (record,) = [record for record in caplog.records if "Hook" in record.getMessage()]
        assert (record.task_id, record.attempt) == (row.pk, 1)

    eventually(line)
