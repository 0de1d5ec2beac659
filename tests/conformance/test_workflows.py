"""Workflows: steps start when they may, whatever happens to those before them."""

import contextlib
import sys
import threading
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, cast
from unittest import mock

import pytest
from django.db import OperationalError, connection, transaction
from django.utils import timezone

from firefly_jobs import (
    Retry,
    TaskAlreadyScheduled,
    Workflow,
    WorkflowError,
    WorkflowModel,
    admission,
    chain,
    chord,
    current_task,
    databases,
    dependencies,
    group,
    lifecycle,
    rebuilding,
    tallies,
    task,
)
from firefly_jobs.attempts import Outcome, decide
from firefly_jobs.claiming import Claimer
from firefly_jobs.databases import Completion, Database
from firefly_jobs.databases.functions import Isolation
from firefly_jobs.dependencies import End, Walk
from firefly_jobs.lines import Lines
from firefly_jobs.models import TaskModel, WorkflowEdge, WorkflowGate, WorkflowStep
from firefly_jobs.placeholders import StepResult
from firefly_jobs.states import Status
from tests.conformance import tasks
from tests.conformance.support import (
    analyze,
    assert_waits_for_lock,
    captured_statements,
    claim,
    consuming,
    deadlock,
    prepare_deadlock,
    query,
    repeatable_reads,
    rows_read,
    run_burst,
    second_connection,
    session_id,
)
from tests.support.threads import Concurrent
from tests.support.waiting import eventually
from tests.testapp.models import Effect

pytestmark = pytest.mark.django_db(transaction=True)

ran: list[str] = []


@pytest.fixture(autouse=True)
def nothing_ran():
    ran.clear()


@task
def step(name, value=None):
    ran.append(name)
    return value


@task
def fail(name):
    ran.append(name)
    raise ValueError(name)


@task
def gather(parent_results):
    ran.append("gather")
    return dict(parent_results)


@task
def add(a, b):
    return a + b


@task
def echo(value):
    return value


def states(run):
    found = WorkflowStep.objects.filter(workflow=run).values_list("name", "task__status")
    return dict(found)


def ended(run):
    run.refresh_from_db()
    return run.status, run.error


def last_of(run, word="on_failure"):
    return TaskModel.objects.get(pk=getattr(run, word))


def complete(held):
    lifecycle.complete_many([Completion.of(held, 0.0, "")], using="default")


def call(name, value=None):
    return step.job.with_args(name, value).with_name(name)


def failing(name):
    return fail.job.with_args(name).with_name(name)


def test_steps_run_after_those_they_depend_on():
    wf = Workflow("diamond")
    a = wf.add(call("a"))
    b = wf.add(call("b"), depends_on=[a])
    c = wf.add(call("c"), depends_on=[a])
    wf.add(call("d"), depends_on=[b, c])

    run = wf.schedule()
    assert states(run) == {"a": "created", "b": "blocked", "c": "blocked", "d": "blocked"}
    run_burst()

    assert (ran[0], set(ran[1:3]), ran[3]) == ("a", {"b", "c"}, "d")
    assert ended(run) == ("completed", "")
    assert run.ended is not None


def test_a_failed_step_stops_the_workflow():
    wf = Workflow("stops")
    a = wf.add(failing("a"))
    wf.add(call("b"), depends_on=[a])
    wf.add(call("c"), depends_on=["b"])

    run = wf.schedule()
    run_burst()

    assert states(run) == {"a": "failed", "b": "cancelled", "c": "cancelled"}
    assert ended(run) == ("failed", "step 'a' failed: ValueError: a")
    assert TaskModel.objects.get(step__name="c").error == "cancelled: step 'a' failed"


def test_a_last_call_that_fails_itself_has_failed_and_stops_nothing():
    for job, word in ((failing("a"), "on_failure"), (call("a"), "on_success")):
        wf = Workflow("last", **{word: failing("last")})
        wf.add(job)

        run = wf.schedule()
        run_burst()

        assert TaskModel.objects.get(pk=getattr(run, word)).status == "failed"
        assert ended(run)[0] == ("failed" if word == "on_failure" else "completed")


def test_an_ignored_failure_stops_nothing():
    wf = Workflow("goes on")
    a = wf.add(failing("a"), ignore_result=True)
    wf.add(call("b"), depends_on=[a])

    run = wf.schedule()
    run_burst()

    assert states(run) == {"a": "failed", "b": "completed"}
    assert ended(run) == ("completed", "")


def test_clean_up_runs_after_a_failure_and_is_skipped_after_success():
    for job, expected in (
        (
            failing("a"),
            {"a": "failed", "b": "cancelled", "sorry": "completed", "tidy": "completed"},
        ),
        (
            call("a"),
            {"a": "completed", "b": "completed", "sorry": "cancelled", "tidy": "completed"},
        ),
    ):
        wf = Workflow("clean-up")
        a = wf.add(job)
        b = wf.add(call("b"), depends_on=a)
        wf.add(call("sorry"), depends_on=[a], when="failure")
        wf.add(call("tidy"), depends_on=[b.when("always"), a.when("always")])

        run = wf.schedule()
        run_burst()

        assert states(run) == expected
        assert ended(run)[0] == ("failed" if expected["a"] == "failed" else "completed")


def test_steps_wait_for_all_of_a_higher_priority_with_one_counter_per_level():
    wf = Workflow("levels")
    for n in range(40):
        wf.add(call(f"high-{n}"), priority=10)
    for n in range(40):
        wf.add(call(f"low-{n}"), priority=-3)
    run = wf.schedule()

    run_burst()

    assert {name.split("-")[0] for name in ran[:40]} == {"high"}
    assert ended(run) == ("completed", "")
    assert WorkflowEdge.objects.count() <= 40 + 40 + 2 * 7


def test_results_of_parents_are_passed():
    wf = Workflow("results")
    a = wf.add(call("a", 20))
    b = wf.add(call("b", 22))
    wf.add(gather, depends_on=[a, b])
    total = wf.add(add.job.with_args(a.result).with_kwargs(b=b.result))
    run = wf.schedule()

    run_burst()

    assert TaskModel.objects.get(step__name="gather").returned == {"a": 20, "b": 22}
    assert TaskModel.objects.get(step__name=total.name).returned == 42
    assert ended(run) == ("completed", "")


@pytest.mark.parametrize(
    "container", [list, tuple, set, frozenset, lambda items: dict(enumerate(items))]
)
def test_results_are_found_inside_of_containers(container):
    wf = Workflow("contained")
    a = wf.add(call("a", 20))
    wf.add(echo.job.with_args([container([a.result, 1])]))
    wf.schedule()

    run_burst()

    assert TaskModel.objects.get(step__name="echo").returned == [container([20, 1])]


def test_arguments_of_steps_may_contain_themselves():
    things: list[Any] = [1]
    things.append(things)
    chain(echo.job.with_args(things), call("b")).schedule()

    run_burst()

    returned = TaskModel.objects.get(step__name="echo").returned
    assert (returned[0], returned[1] is returned) == (1, True)


def test_a_step_without_parents_gets_no_results():
    wf = Workflow("root")
    wf.add(gather)
    run = wf.schedule()
    run.add(gather.job.with_name("added"))
    run_burst()
    assert [row.returned for row in run.tasks.all()] == [{}, {}]


def test_a_step_may_depend_on_nothing():
    wf = Workflow("none")
    wf.add(call("a"), depends_on=None)
    run = wf.schedule()
    run.add(call("b"), depends_on=None)
    run_burst()
    assert sorted(ran) == ["a", "b"]


@pytest.mark.parametrize("who", ["Step 'takes'", "on_success=", "on_failure="])
def test_the_result_of_an_unknown_step_is_refused(who):
    taking = add.job.with_args(StepResult("extrakt"), 1).with_name("takes")
    wf = Workflow("w", **({who[:-1]: taking} if who.endswith("=") else {}))
    wf.add(call("extract"))
    if not who.endswith("="):
        wf.add(taking)

    message = f"{who} takes the result of 'extrakt', which is no step of workflow 'w'"
    with pytest.raises(WorkflowError, match=f"{message}.*'extract'"):
        wf.schedule()

    assert not TaskModel.objects.exists()


def test_a_wide_fan_in_starts_once():
    wf = Workflow("wide")
    first = wf.add(call("first"))
    middle = [wf.add(call(f"m{n}"), depends_on=[first]) for n in range(200)]
    wf.add(call("last"), depends_on=middle)
    run = wf.schedule()
    assert WorkflowGate.objects.filter(workflow=run).count() == 1 + 15 + 1 + 1

    run_burst()

    assert (len(ran), ran[0], ran[-1]) == (202, "first", "last")
    assert ended(run) == ("completed", "")


def test_thousands_of_steps_are_numbered_without_a_look_at_all_of_them():
    def looks(count):
        wf = Workflow("many")
        lines = 0

        def trace(_frame, event, _arg):
            nonlocal lines
            lines += event == "line"
            return trace

        for _ in range(count):
            wf.add(step.job.with_args("a"))
        former = sys.gettrace()
        sys.settrace(trace)
        try:
            assert wf.add(step.job.with_args("a")).name == f"step-{count + 1}"
        finally:
            sys.settrace(former)
        return lines

    # A line for each of them would be two thousand; a collection of garbage may add a few.
    assert looks(2_000) < looks(10) + 500


def test_sets_of_steps():
    run = chain(
        call("a"), group(call("b"), call("c")), chord([call("d"), call("e")], call("f"))
    ).schedule()

    run_burst()

    assert ran[0] == "a"
    assert set(ran[1:3]) == {"b", "c"}
    assert set(ran[3:5]) == {"d", "e"}
    assert ran[5] == "f"
    assert ended(run) == ("completed", "")


def test_last_calls():
    for job, expected in ((call("a"), "good"), (failing("a"), "bad")):
        ran.clear()
        wf = Workflow("last", on_success=call("good"), on_failure=call("bad"))
        wf.add(job)
        wf.schedule()
        run_burst()
        assert ran == ["a", expected]


def test_a_last_call_is_cancelled_and_retried_by_itself(caplog):
    def last_of(run):
        return TaskModel.objects.get(pk=run.on_success)

    wf = Workflow("last", on_success=failing("last"))
    wf.add(call("a"))
    early, late, kept = wf.schedule(), wf.schedule(), wf.schedule()

    assert last_of(early).cancel()
    # It would start before its workflow has ended.
    assert not last_of(early).retry_now()
    assert "use the workflow's retry_failed()" in caplog.text
    for held in claim(limit=3):
        complete(held)
    assert last_of(late).status == "created"
    assert last_of(late).cancel()
    run_burst()

    assert {ended(run)[0] for run in (early, late, kept)} == {"completed"}
    assert [last_of(r).status for r in (early, late, kept)] == ["cancelled", "cancelled", "failed"]
    assert last_of(kept).retry_now()
    run_burst()
    assert ran == ["last"] * 2


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", " "])
def test_a_workflow_s_name_is_a_text_that_every_database_stores(name):
    with pytest.raises(ValueError, match="A workflow's name"):
        Workflow(name)


def test_circles_are_refused_and_named():
    wf = Workflow("circle")
    wf.add(call("a"), depends_on=["c"])
    wf.add(call("b"), depends_on=["a"])
    wf.add(call("c"), depends_on=["b"])
    with pytest.raises(WorkflowError, match="'a' -> 'c' -> 'b' -> 'a'"):
        wf.schedule()
    assert not WorkflowModel.objects.exists()


# --- what people do with a run


def test_a_run_is_waited_for_and_tells_how_far_it_is():
    wf = Workflow("waits")
    a = wf.add(call("a"))
    wf.add(failing("b"), depends_on=a, ignore_result=True)
    run = wf.schedule()
    assert (run.progress.done, run.progress.total) == (0, 2)
    assert run.progress.by_status == {"created": 1, "blocked": 1}
    with pytest.raises(TimeoutError):
        run.wait(timeout=0)

    with consuming():
        assert run.wait(timeout=20) is run

    assert (run.status, run.progress.done, run.ignored_failures) == ("completed", 2, ["b"])


def test_cancelling_a_run_cancels_what_has_not_started():
    wf = Workflow("cancel")
    a = wf.add(call("a"))
    wf.add(call("b"), depends_on=a)
    wf.add(call("tidy"), depends_on=a, when="always")
    run = wf.schedule()
    (held,) = claim()

    assert run.cancel()
    assert states(run) == {"a": "running", "b": "cancelled", "tidy": "cancelled"}
    assert ended(run)[0] == "running"

    complete(held)
    assert ended(run)[0] == "cancelled"
    assert not run.cancel()


def test_a_call_is_told_that_its_workflow_was_cancelled():
    seen: list[Any] = []

    def body():
        seen.append((str(current_task().workflow), current_task().cancelled))
        WorkflowModel.objects.get().cancel()
        seen.append(current_task().cancelled)

    tasks.BODIES["asks"] = body
    wf = Workflow("asks")
    wf.add(tasks.call.job.with_args("asks"))
    run = wf.schedule()
    run_burst()

    assert seen == [(str(run), False), True]


def test_cancelling_one_step_skips_what_needs_it():
    wf = Workflow("one")
    a = wf.add(call("a"))
    b = wf.add(call("b"), depends_on=a)
    wf.add(call("c"), depends_on=b)
    wf.add(call("always"), depends_on=b, when="always")
    run = wf.schedule()

    assert TaskModel.objects.get(step__name="b").cancel()

    assert states(run) == {"a": "created", "b": "cancelled", "c": "cancelled", "always": "created"}
    assert TaskModel.objects.get(step__name="c").error.startswith("skipped: ")
    run_burst()
    assert ended(run) == ("completed", "")


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("cancel", [WorkflowModel.cancel, lambda run: run.tasks.last().cancel()])
def test_cancelling_meets_a_call_that_has_added_a_step(cancel):
    wf = Workflow("meets")
    parents = [wf.add(call("a")), wf.add(call("b"))]
    wf.add(call("c"), depends_on=parents)
    run = wf.schedule()
    held = claim(limit=1)[0]
    sessions: SimpleQueue[int] = SimpleQueue()

    def cancels():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        return cancel(WorkflowModel.objects.get())

    try:
        with transaction.atomic():
            run.add(call("late"))
            cancelling = Concurrent(cancels)
            session = sessions.get(timeout=10)
            eventually(lambda: assert_waits_for_lock(session))
            # It has locked the gate of "c", and waits for that of the end.
            lifecycle.complete(Completion.of(held, 0.0, ""), using="default")
    except OperationalError as error:
        # PostgreSQL ends who looks for a deadlock and finds it.  Whoever cancels has looked in
        # vain if this thread took its second; a consumer runs the call again.
        if not databases.of("default").is_deadlock(error):
            raise
        assert cancelling.result()
        with transaction.atomic():
            lifecycle.complete(Completion.of(held, 0.0, ""), using="default")

    assert cancelling.result()
    run_burst()
    assert ended(run)[0] == ("cancelled" if cancel is WorkflowModel.cancel else "completed")


@contextlib.contextmanager
def locked(row):
    with second_connection() as other:
        other.set_autocommit(False)
        query(other, f"SELECT id FROM {TaskModel._meta.db_table} WHERE id = {row.pk} FOR UPDATE")
        yield
        other.rollback()
        other.set_autocommit(True)


def stop_by_failure(held):
    settlement = decide(Outcome(claim=held, duration=0.0, error=ValueError("a")), max_rescues=0)
    lifecycle.settle(settlement, using="default", consumer=None)


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("is_limited", [False, True])
@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_a_due_step_that_another_session_has_locked_is_cancelled_as_well(how, is_limited):
    b = call("b").with_options(concurrency=1) if is_limited else call("b")
    run = group(call("a"), b).schedule()
    (held,) = claim(limit=1)
    sessions: SimpleQueue[int] = SimpleQueue()

    def stops():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        if how == "cancel":
            assert WorkflowModel.objects.get().cancel()
        else:
            stop_by_failure(held)

    with locked(TaskModel.objects.get(step__name="b")):
        stopping = Concurrent(stops)
        session = sessions.get(timeout=10)
        eventually(lambda: assert_waits_for_lock(session))
        # It waits with what it has decided committed, and holds no gate.
        run.refresh_from_db()
        assert run.is_cancelled or run.error
        if how == "cancel":
            complete(held)
    # A consumer that comes now finds nothing: who waits for the row's lock is before it.
    stopping.result()

    assert states(run)["b"] == "cancelled"
    assert ended(run)[0] == ("cancelled" if how == "cancel" else "failed")
    assert ran == []


@pytest.mark.postgresql
@pytest.mark.mysql
def test_a_step_that_stays_locked_keeps_no_dispatcher(caplog):
    run = group(call("a"), call("b")).schedule()
    (held,) = claim(limit=1)

    with locked(TaskModel.objects.get(step__name="b")):
        databases.of("default").prepare_dispatcher(connection, 0)
        stop_by_failure(held)
    connection.close()

    assert states(run)["b"] == "created"
    assert "they are cancelled once it lets go" in caplog.text
    # Nobody claims it before tomorrow, but a sweep comes by.
    TaskModel.objects.filter(step__name="b").update(not_before=timezone.now() + timedelta(days=1))
    rebuilding.sweep(using="default")
    assert (states(run)["b"], ended(run)[0]) == ("cancelled", "failed")


def test_a_step_that_waits_again_while_it_is_cancelled_counts():
    run = chain(call("a"), call("b")).schedule()
    (held,) = claim()
    count = tallies.count_withdrawn

    def give_back_and_count(rows, reason, **words):
        lifecycle.release([held], using="default")
        return count(rows, reason, **words)

    with mock.patch.object(tallies, "count_withdrawn", give_back_and_count):
        assert not TaskModel.objects.get(pk=held.id).cancel()

    run_burst()
    assert (ran, ended(run)[0]) == (["a", "b"], "completed")


@pytest.mark.postgresql
@pytest.mark.mysql
def test_who_cancels_a_step_does_not_wait_for_whoever_claims_it():
    group(call("a")).schedule()
    row = TaskModel.objects.get()

    with locked(row):
        assert not Concurrent(row.cancel).result(timeout_seconds=20)


@pytest.mark.postgresql
@pytest.mark.mysql
def test_who_claims_a_step_waits_for_nobody_who_has_locked_its_workflow():
    run = chain(call("a")).schedule()

    with second_connection() as other:
        other.set_autocommit(False)
        table = WorkflowModel._meta.db_table
        query(other, f"SELECT id FROM {table} WHERE id = {run.pk} FOR UPDATE")
        claimed = Concurrent(claim).result(timeout_seconds=20)
        other.rollback()
        other.set_autocommit(True)

    assert [found.withdrawn for found in claimed] == [""]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_with_repeatable_reads_a_step_is_cancelled_while_another_ends():
    run = group(call("a"), call("b")).schedule()
    held = claim(limit=1)[0]
    sessions: SimpleQueue[int] = SimpleQueue()

    def cancels():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        return TaskModel.objects.get(step__name="b").cancel()

    with repeatable_reads():
        with databases.of("default").own_transaction(connection):
            lifecycle.complete(Completion.of(held, 0.0, ""), using="default")
            cancelling = Concurrent(cancels)
            session = sessions.get(timeout=10)
            eventually(lambda: assert_waits_for_lock(session))
        assert cancelling.result()

    assert states(run) == {"a": "completed", "b": "cancelled"}
    assert ended(run)[0] == "completed"


def test_what_failed_is_run_again_and_what_completed_stays():
    broken = [True]

    def body():
        ran.append("flaky")
        if broken.pop():
            raise ValueError("not yet")

    tasks.BODIES["flaky"] = body
    wf = Workflow("again", on_success=call("good"), on_failure=call("bad"))
    a = wf.add(call("a"))
    b = wf.add(tasks.call.job.with_args("flaky").with_name("flaky"), depends_on=a)
    wf.add(call("c"), depends_on=b)
    run = wf.schedule()
    run_burst()
    assert ended(run)[0] == "failed"
    assert ran == ["a", "flaky", "bad"]
    broken.append(False)

    assert run.retry_failed() == 4
    assert ended(run) == ("running", "")
    run_burst()

    assert ran == ["a", "flaky", "bad", "flaky", "c", "good"]
    assert ended(run) == ("completed", "")
    assert run.retry_failed() == 0


def test_what_is_no_parent_at_all_is_named():
    wf, nothing = Workflow("w"), cast("Any", 3)
    wf.add(call("a"), depends_on=nothing)

    with pytest.raises(WorkflowError, match="Step 'a' depends on 3, which is no step of workflow"):
        wf.schedule()


def test_a_failed_step_is_not_revived_by_itself(caplog):
    wf = Workflow("step")
    wf.add(failing("a"))
    wf.schedule()
    run_burst()

    assert not TaskModel.objects.get().retry_now()
    assert "use the workflow's retry_failed()" in caplog.text


def test_a_step_is_not_replaced_by_another_call_with_its_key():
    wf = Workflow("keyed")
    a = wf.add(failing("a"))
    wf.add(failing("b").with_unique_key("key"), depends_on=a, when="always")
    run = wf.schedule()
    run_burst()
    run.refresh_from_db()
    run.retry_failed()

    with pytest.raises(TaskAlreadyScheduled, match="part of a workflow") as raised:
        step.using(unique_key="key", on_conflict="replace").schedule("other")

    assert raised.value.existing == TaskModel.objects.get(step__name="b")
    assert states(run) == {"a": "created", "b": "blocked"}
    run_burst()
    assert ran == ["a", "b"] * 2


@pytest.mark.parametrize("is_claimed", [False, True])
def test_each_end_has_a_call_though_that_for_the_former_one_has_not_ended(is_claimed):
    late = call("bad").with_queue("late").with_metadata(of="a").with_tags("last")
    wf = Workflow("ends", on_failure=late)
    wf.add(failing("a"))
    run = wf.schedule()
    run_burst()
    former = last_of(run)
    held = claim("late") if is_claimed else []

    assert run.retry_failed() == 2
    run_burst()
    assert ended(run)[0] == "failed"
    for one in held:
        complete(one)
    run_burst("late")

    latter = last_of(run)
    assert latter != former
    assert (latter.status, latter.metadata, latter.tags) == ("completed", {"of": "a"}, ["last"])
    assert ran == ["a", "a"] + ["bad"] * (1 if is_claimed else 2)
    former.refresh_from_db()
    assert former.status == "completed"


def test_what_runs_again_keeps_the_end_waiting_though_a_cleanup_behind_it_has_completed():
    broken = [True] * 3

    def body():
        ran.append("a")
        if broken and broken.pop():
            raise ValueError("not yet")

    tasks.BODIES["a"] = body
    wf = Workflow("tidy", on_success=call("good"), on_failure=call("bad"))
    a = wf.add(tasks.call.job.with_args("a").with_name("a"))
    b = wf.add(call("b"), depends_on=a)
    wf.add(call("tidy"), depends_on=[a, b], when="always")
    run = wf.schedule()
    run_burst()
    assert (ran, ended(run)[0]) == (["a", "tidy", "bad"], "failed")

    for _ in range(2):
        ran.clear()
        assert run.retry_failed() == 4
        assert ended(run) == ("running", "")
        run_burst()
        assert (ran, ended(run)[0]) == (["a", "bad"], "failed")
        assert states(run) == {"a": "failed", "b": "cancelled", "tidy": "completed"}

    ran.clear()
    run.retry_failed()
    run_burst()
    assert (ran, ended(run)[0]) == (["a", "b", "good"], "completed")


def test_a_call_that_the_former_end_did_not_need_waits_for_the_next_one():
    wf = Workflow("ends", on_success=call("good").with_queue("late"))
    wf.add(failing("a"))
    run = wf.schedule()
    run_burst()
    assert run.retry_failed() == 2
    former = run.on_success

    run.refresh_from_db()
    # It was cancelled with the former end, so it is the same one.
    assert run.on_success == former
    assert last_of(run, "on_success").status == "blocked"


def test_a_call_for_the_end_whose_key_allows_no_other_keeps_its_workflow_from_running_again():
    wf = Workflow("ends", on_failure=call("bad").with_queue("late").with_unique_key("key"))
    wf.add(failing("a"))
    run = wf.schedule()
    run_burst()

    with pytest.raises(TaskAlreadyScheduled, match="its on_failure, has not ended") as raised:
        run.retry_failed()

    assert raised.value.existing == last_of(run)
    assert (states(run), ended(run)[0]) == ({"a": "failed"}, "failed")
    run_burst("late")
    assert run.retry_failed() == 2


@pytest.mark.parametrize("is_inside", [False, True])
def test_a_step_whose_key_is_taken_by_now_keeps_its_workflow_from_running_again(is_inside):
    wf = Workflow("keyed")
    wf.add(failing("b").with_unique_key("key"), ignore_result=True)
    wf.add(failing("a"), depends_on=["b"])
    wf.add(call("c").with_unique_key("other key"), depends_on=["b"], when="failure")
    run = wf.schedule()
    TaskModel.objects.get(step__name="c").cancel()
    run_burst()
    holder = step.using(unique_key="other key").schedule("holder")
    before = states(run), ended(run)

    with contextlib.ExitStack() as stack:
        if is_inside:
            stack.enter_context(transaction.atomic())
        with pytest.raises(TaskAlreadyScheduled) as raised:
            run.retry_failed()
        # The transaction can be used further.
        assert TaskModel.objects.filter(pk=holder.pk).exists()

    assert raised.value.existing == holder
    assert f"Step 'c' of workflow {run.pk} cannot run again" in str(raised.value)
    assert f"task {holder.pk} " in str(raised.value)
    assert (states(run), ended(run)) == before
    assert before[1][0] == "failed"
    assert holder.cancel()
    assert run.retry_failed() == 2
    assert states(run) == {"a": "created", "b": "failed", "c": "created"}


def test_two_steps_that_had_one_key_after_each_other_cannot_run_again_together():
    wf = Workflow("keyed")
    wf.add(call("a"))
    wf.add(call("b").with_unique_key("key"))
    run = wf.schedule()
    b = TaskModel.objects.get(step__name="b")
    assert b.cancel()
    run.add(call("c").with_unique_key("key"))
    assert run.cancel()

    with pytest.raises(TaskAlreadyScheduled, match="Step 'c' of workflow") as raised:
        run.retry_failed()

    assert raised.value.existing == b
    assert ended(run)[0] == "cancelled"
    assert set(states(run).values()) == {"cancelled"}


def test_steps_are_added_while_it_runs():
    def body():
        run = current_task().workflow
        assert run is not None
        row = run.add(call("late"), depends_on=["grow"])
        run.add(call("later"), depends_on=[row])
        ran.append("grow")

    tasks.BODIES["grow"] = body
    wf = Workflow("grows")
    wf.add(tasks.call.job.with_args("grow"), name="grow")
    run = wf.schedule()
    run.add(call("free"))

    run_burst()

    assert ran[0] == "grow"
    assert set(ran[1:]) == {"free", "late", "later"}
    assert ran.index("late") < ran.index("later")
    assert ended(run) == ("completed", "")
    with pytest.raises(WorkflowError, match="has ended"):
        run.add(call("too late"))
    with pytest.raises(WorkflowError, match="no step of workflow"):
        run.add(call("x"), depends_on=["nobody"])
    with pytest.raises(WorkflowError, match="True is no step of workflow"):
        run.add(call("d"), depends_on=True)


def test_an_added_step_gets_results_as_a_planned_one_does():
    wf = Workflow("results")
    a = wf.add(call("a", 7))
    wf.add(failing("b"), ignore_result=True)
    run = wf.schedule()

    gathered = run.add(gather, depends_on=["a", "b"])
    # What is taken from a step asks for its success, whatever is asked of the others.
    added = run.add(add.job.with_args(a.result, 1), depends_on=["b"], when="failure")
    run_burst()

    assert TaskModel.objects.get(pk=gathered.pk).returned == {"a": 7}
    assert TaskModel.objects.get(pk=added.pk).returned == 8


def test_a_step_that_is_added_behind_what_has_ended_is_due_and_drawn_behind_it():
    wf = Workflow("late")
    wf.add(call("a"))
    wf.add(failing("b"), ignore_result=True)
    wf.add(call("c").with_queue("never"))
    run = wf.schedule()
    run_burst()

    late = run.add(call("late"), depends_on=["a"])
    sorry = run.add(call("sorry"), depends_on=["b"], when="failure")
    both = run.add(call("both"), depends_on=["a", "c"])

    found = [states(run)[name] for name in ("late", "sorry", "both")]
    assert found == ["created", "created", "blocked"]
    ids = dict(WorkflowStep.objects.values_list("name", "pk"))
    picture = run.as_mermaid()
    assert f"s{ids['a']} --> s{late.pk}" in picture
    assert f"s{ids['b']} -. failure .-> s{sorry.pk}" in picture
    assert f"s{ids['a']} --> s{both.pk}" in picture
    assert f"s{ids['c']} --> s{both.pk}" in picture
    run_burst()
    run_burst("never")
    run_burst()
    assert ended(run) == ("completed", "")


def test_a_step_that_was_added_behind_what_had_ended_waits_for_it_when_that_runs_again():
    wf = Workflow("again")
    wf.add(call("a"))
    wf.add(call("b"))
    run = wf.schedule()
    assert TaskModel.objects.get(step__name="a").cancel()
    run.add(failing("late"), depends_on=["a"], when="always")
    run_burst()
    assert ended(run)[0] == "failed"

    assert run.retry_failed() == 2
    assert states(run) == {"a": "created", "b": "completed", "late": "blocked"}


@pytest.mark.postgresql
@pytest.mark.mysql
def test_with_repeatable_reads_a_step_is_added_behind_one_whose_end_is_not_followed_yet():
    run = group(call("a"), call("b")).schedule()
    a, b = claim()

    with repeatable_reads(), transaction.atomic():
        transaction.on_commit(lambda: run.add(call("late"), depends_on=["a"]))
        lifecycle.complete(Completion.of(a, 0.0, ""), using="default")

    assert states(run) == {"a": "completed", "b": "running", "late": "created"}
    complete(b)
    run_burst()
    assert set(WorkflowGate.objects.values_list("waiting_for", flat=True)) == {0}


def test_a_step_of_another_database_is_not_added():
    run = chain(call("a")).schedule()

    with pytest.raises(WorkflowError, match="'other' cannot be a step of workflow"):
        run.add(call("b").with_options(database="other"))
    assert states(run) == {"a": "created"}


def test_added_steps_are_numbered_with_few_statements_and_within_what_a_name_may_hold():
    run = chain(call("a")).schedule()
    names = []
    for label in (*["q"] * 30, "q-x", *["x" * 200] * 2):
        with captured_statements() as statements:
            names.append(run.add(call(label)).step.name)
        assert len(statements) < 20

    assert names[:3] == ["q", "q-2", "q-3"]
    assert names[-2:] == ["x" * 200, "x" * 192 + "-2"]
    assert len(set(names)) == 33


@pytest.mark.postgresql
@pytest.mark.mysql
def test_two_who_add_steps_at_once_find_names_of_their_own():
    run = chain(call("a")).schedule()
    sessions: SimpleQueue[int] = SimpleQueue()

    def add_another():
        with transaction.atomic():
            connection.ensure_connection()
            sessions.put(session_id(connection))
            WorkflowModel.objects.get().add(call("q"))

    with transaction.atomic():
        run.add(call("q"))
        adding = Concurrent(add_another)
        session = sessions.get(timeout=10)
        eventually(lambda: assert_waits_for_lock(session))

    adding.result()
    assert sorted(states(run)) == ["a", "q", "q-2"]


def test_names_of_steps_are_equal_only_to_themselves():
    names = ["load", "Load", "loäd", "LOÄD"]
    wf = Workflow("exact")
    for name in names[:2]:
        wf.add(step.job.with_args(name, name), name=name)
    wf.add(gather, depends_on=["Load"])
    run = wf.schedule()
    for name in names[2:]:
        run.add(call(name))
    added = run.add(step.job.with_args("behind"), name="behind", depends_on=["load"])
    run_burst()

    assert set(states(run)) == {*names, "gather", "behind"}
    assert TaskModel.objects.get(step__name="gather").returned == {"Load": "Load"}
    edges = WorkflowEdge.objects.filter(gate=added.step.gate)
    assert list(edges.values_list("step__name", flat=True)) == ["load"]


@pytest.mark.parametrize("name", ["a ", " a", "a\t", " ", ""])
def test_names_that_a_database_would_change_are_refused(name):
    wf = Workflow("exact")
    first = wf.add(call("a"))
    run = wf.schedule()

    for add_it in (wf.add, run.add):
        with pytest.raises(ValueError, match=r"A step's name must "):
            add_it(call("b"), name=name)
    assert wf.steps == (first,)
    assert states(run) == {"a": "created"}


def test_a_label_that_a_database_would_change_is_trimmed_before_a_step_is_called_that():
    wf = Workflow("trimmed")
    wf.add(call("a "))
    wf.add(call(" "))
    run = wf.schedule()
    run.add(call("a\t"))

    assert set(states(run)) == {"a", "step", "a-2"}


def insert_then(name, then=None):
    """Return a step with an effect, so that its end is a commit of its own."""

    def body():
        Effect.objects.create(task_key=name, value=1)
        if then is not None:
            then(current_task().workflow)

    tasks.BODIES[name] = body
    return tasks.call.job.with_args(name).with_name(name)


def test_steps_that_count_at_one_gate_are_counted_off_without_a_look_at_their_edges(monkeypatch):
    asked: list[list[int]] = []
    look = Database.edges_behind

    def look_and_tell(self, connection, steps):
        asked.append(list(steps))
        return look(self, connection, steps)

    monkeypatch.setattr(Database, "edges_behind", look_and_tell)
    wf = Workflow("lean")
    first = wf.add(insert_then("first"))
    middle = [wf.add(insert_then(f"m{n}"), depends_on=first) for n in range(3)]
    last = wf.add(insert_then("last"), depends_on=middle)
    wf.add(insert_then("never"), depends_on=last, when="failure")
    run = wf.schedule()

    run_burst(threads=2)

    assert ended(run) == ("completed", "")
    assert Effect.objects.count() == 5
    # Whether a failure is waited for as well stands at the edge, and so does a skipped end.
    names = dict(WorkflowStep.objects.values_list("task", "name"))
    assert [[names[pk] for pk in found] for found in asked] == [["last"], ["never"]]


def grown_workflow():
    def grow(run):
        run.add(insert_then("late"), depends_on=["grow"])
        run.add(insert_then("later"), depends_on=["late", "beside"])

    wf = Workflow("grows")
    grows = wf.add(insert_then("grow", grow))
    wf.add(insert_then("beside"))
    wf.add(insert_then("behind"), depends_on=grows)
    return wf.schedule()


def has_grown(run):
    order = list(Effect.objects.order_by("pk").values_list("task_key", flat=True))
    assert sorted(order) == ["behind", "beside", "grow", "late", "later"]
    assert order.index("later") > order.index("late")
    assert ended(run) == ("completed", "")
    assert rebuilding.sweep(using="default") == 0
    return True


def test_a_step_with_a_commit_of_its_own_lets_added_ones_go():
    run = grown_workflow()
    run_burst()

    assert has_grown(run)


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("group_commit", [False, True])
def test_with_repeatable_reads_everything_follows_all_the_same(group_commit):
    grown = grown_workflow()
    failing_one = Workflow("fails")
    inserts = failing_one.add(insert_then("first"))
    fails = failing_one.add(failing("fails"), depends_on=inserts)
    failing_one.add(call("never"), depends_on=fails)
    failing_one.add(call("clean up"), depends_on=fails, when="always")
    failed = failing_one.schedule()
    links = chain(insert_then("one"), insert_then("two", WorkflowModel.cancel), call("three"))
    cancelled = links.schedule()

    with repeatable_reads():
        # A call that meets what others have committed meanwhile is lost, and runs again.
        with consuming(group_commit=group_commit):
            for run in (grown, failed, cancelled):
                run.wait(20)
        levels = TaskModel.objects.values_list(Isolation(), flat=True)
        with databases.of("default").own_transaction(connection):
            assert levels[0] == "read-committed"
        with transaction.atomic():
            assert levels[0] == "repeatable-read"

    assert ended(failed) == ("failed", "step 'fails' failed: ValueError: fails")
    assert ran.count("clean up") == 1
    assert ended(cancelled)[0] == "cancelled"
    Effect.objects.filter(task_key__in=["first", "one", "two"]).delete()
    assert has_grown(grown)


@pytest.mark.postgresql
@pytest.mark.mysql
def test_with_repeatable_reads_an_end_counts_once_though_a_sweep_comes_before_what_follows():
    wf = Workflow("swept")
    a = wf.add(call("a"))
    b = wf.add(call("b"), depends_on=a)
    wf.add(call("c"), depends_on=[a, b])
    run = wf.schedule()
    held = claim()[0]

    with repeatable_reads(), transaction.atomic():
        transaction.on_commit(lambda: rebuilding.sweep(using="default"))
        lifecycle.complete(Completion.of(held, 0.0, ""), using="default")

    assert states(run) == {"a": "completed", "b": "created", "c": "blocked"}
    run_burst()
    assert ran == ["b", "c"]
    assert ended(run) == ("completed", "")


def test_a_gate_is_found_by_its_key():
    wf = Workflow("wide")
    parents = [wf.add(insert_then(f"p{n}")) for n in range(30)]
    wf.add(insert_then("last"), depends_on=parents)
    wf.schedule()
    others = WorkflowModel.objects.create(name="others")
    WorkflowGate.objects.bulk_create(
        WorkflowGate(workflow=others, rank=n, waiting_for=1) for n in range(2_000)
    )
    analyze()
    done = Completion.of(claim(limit=1)[0], 0.0, "")
    with transaction.atomic(), captured_statements() as statements:
        is_held, counted = databases.of("default").complete_step(connection, done)
        transaction.set_rollback(True)

    assert is_held
    assert counted is not None
    assert (counted.waiting_for, counted.is_unmet, counted.is_cut_short) == (29, False, False)
    for sql, params in statements:
        assert rows_read(sql, params) < 100, sql


def test_steps_stay_until_their_workflow_has_ended():
    wf = Workflow("stays")
    a = wf.add(call("a"))
    wf.add(call("b"), depends_on=a)
    wf.schedule()
    complete(claim()[0])
    done = TaskModel.objects.get(status="completed")

    assert lifecycle.delete([done.pk], using="default") == 0
    run_burst()
    assert lifecycle.delete([done.pk], using="default") == 1


def test_what_failed_is_run_again_though_those_before_it_were_deleted():
    wf = Workflow("pruned")
    a = wf.add(call("a"))
    wf.add(call("alarm"), depends_on=a, when="failure")
    wf.add(call("c"), depends_on=wf.add(failing("b"), depends_on=a))
    run = wf.schedule()
    run_burst()
    deleted = TaskModel.objects.get(step__name="a")
    assert lifecycle.delete([deleted.pk], using="default") == 1

    run.refresh_from_db()
    assert run.retry_failed() == 3
    assert states(run) == {"alarm": "cancelled", "b": "created", "c": "blocked"}
    run_burst()

    assert ran == ["a", "b", "b"]
    assert ended(run)[0] == "failed"


@pytest.mark.parametrize(
    "delete",
    [
        lambda pk: lifecycle.delete([pk], using="default"),
        lambda pk: TaskModel.objects.filter(pk=pk).delete(),
    ],
    ids=["pruned", "by hand"],
)
def test_what_asks_for_the_success_of_a_deleted_step_does_not_run(delete):
    wf = Workflow("pruned")
    good, bad = wf.add(call("good")), wf.add(call("bad"))
    flaky = wf.add(failing("flaky"), depends_on=good)
    wf.add(call("behind"), depends_on=[good, bad])
    wf.add(call("sorry"), depends_on=[good.when("failure"), bad.when("always")])
    wf.add(call("tidy"), depends_on=[bad.when("always"), flaky.when("always")])
    run = wf.schedule()
    deleted = TaskModel.objects.get(step__name="bad")
    assert deleted.cancel()
    run_burst()
    run.refresh_from_db()
    assert run.status == "failed"
    delete(deleted.pk)

    assert run.retry_failed() == 3
    assert states(run) == {
        "good": "completed",
        "flaky": "created",
        "behind": "cancelled",
        "sorry": "cancelled",
        "tidy": "completed",
    }
    run_burst()
    assert ran == ["good", "flaky", "tidy", "flaky"]
    assert ended(run)[0] == "failed"
    run.tasks.all().delete()
    run.delete()
    assert not WorkflowEdge.objects.exists()


def test_deleted_steps_of_what_cannot_run_again_leave_nothing_behind():
    wf = Workflow("done")
    wf.add(call("sorry"), depends_on=wf.add(call("a")), when="failure")
    run = wf.schedule()
    run_burst()
    assert ended(run)[0] == "completed"

    lifecycle.delete(list(run.tasks.values_list("pk", flat=True)), using="default")

    assert not WorkflowEdge.objects.exists()


def test_a_sweep_lets_go_or_ends_what_only_deleted_rows_could():
    still = chain(call("a"), call("b")).schedule()
    empty = chain(call("c"), call("d")).schedule()
    TaskModel.objects.filter(step__name="a").delete()
    TaskModel.objects.filter(workflow=empty).delete()

    assert rebuilding.sweep(using="default") == 2
    run_burst()

    assert ran == ["b"]
    assert ended(still)[0] == ended(empty)[0] == "completed"
    assert rebuilding.sweep(using="default") == 0


def test_a_workflow_that_stands_still_is_let_go_on(caplog):
    wf = Workflow("still")
    a = wf.add(call("a"))
    wf.add(call("b"), depends_on=a)
    run = wf.schedule()
    assert rebuilding.sweep(using="default") == 0
    claim()
    TaskModel.objects.filter(status="running").update(status="completed")

    with pytest.raises(TimeoutError):
        run.wait(timeout=0)
    assert rebuilding.sweep(using="default") == 1
    assert states(run) == {"a": "completed", "b": "created"}
    assert "stood still" in caplog.text
    run_burst()
    assert ended(run) == ("completed", "")
    assert rebuilding.sweep(using="default") == 0


@pytest.mark.postgresql
@pytest.mark.mysql
@pytest.mark.parametrize("act", ["cancel", "fail"])
def test_a_sweep_meets_who_cuts_a_workflow_short_and_waits_for_its_end(act, monkeypatch):
    wf = Workflow("meets")
    a = wf.add(failing("a"))
    wf.add(call("b"), depends_on=a)
    run = wf.schedule()
    (held,) = claim()
    # As if its consumer had been forgotten: nothing moves, so a sweep looks at it.
    TaskModel.objects.filter(pk=held.id).update(status="blocked")
    sessions: SimpleQueue[int] = SimpleQueue()
    sweeping: list[Concurrent[int]] = []
    lock_gates = Walk.lock_gates

    def sweep():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        return rebuilding.sweep(using="default")

    def lock_and_let_a_sweep_come(walk):
        found = lock_gates(walk)
        if threading.current_thread() is threading.main_thread():
            sweeping.append(Concurrent(sweep))
            session = sessions.get(timeout=10)
            eventually(lambda: assert_waits_for_lock(session))
        return found

    monkeypatch.setattr(Walk, "lock_gates", lock_and_let_a_sweep_come)
    if act == "cancel":
        assert run.cancel()
    else:
        with transaction.atomic():
            failed = End(held.id, run.pk, Status.FAILED, "ValueError: a")
            TaskModel.objects.filter(pk=held.id).update(status="failed")
            dependencies.follow([failed], using="default")

    # One try each: nobody was the victim of a deadlock.
    assert [one.result() for one in sweeping] == [0]
    assert ended(run)[0] == {"cancel": "cancelled", "fail": "failed"}[act]


@pytest.mark.postgresql
@pytest.mark.mysql
def test_what_waits_is_cancelled_though_somebody_has_locked_it_at_that_moment():
    wf = Workflow("locked")
    a = wf.add(failing("a"))
    b = wf.add(call("b"), depends_on=a)
    wf.add(call("c"), depends_on=b)
    wf.add(call("tidy"), depends_on=b, when="always")
    wf.add(call("beside").with_queue("never"))
    run = wf.schedule()
    (held,) = claim()
    settlement = decide(Outcome(claim=held, duration=0.1, error=ValueError("a")), max_rescues=3)

    locked = TaskModel.objects.get(step__name="b")
    sessions: SimpleQueue[int] = SimpleQueue()

    def settle():
        connection.ensure_connection()
        sessions.put(session_id(connection))
        lifecycle.settle(settlement, using="default", consumer=1)

    def waits_or_has_gone_on():
        if ending.is_running:
            assert_waits_for_lock(session)

    with transaction.atomic():
        TaskModel.objects.select_for_update().get(pk=locked.pk)
        ending = Concurrent(settle)
        session = sessions.get(timeout=10)
        eventually(waits_or_has_gone_on)

    ending.result()
    expected = dict.fromkeys(("b", "c", "beside"), "cancelled")
    assert states(run) == expected | {"a": "failed", "tidy": "created"}


def test_a_picture():
    wf = Workflow("picture")
    a = wf.add(call('say "a"'))
    wf.add(call("b"), depends_on=a, when="failure")
    run = wf.schedule()

    first, second = WorkflowStep.objects.order_by("pk").values_list("pk", flat=True)
    text = run.as_mermaid()

    assert text.startswith("flowchart TD\n")
    assert f's{first}["say #34;a#34;"]:::created' in text
    assert f"s{first} -. failure .-> s{second}" in text


# --- what waits again once its workflow stops


def give_back(held):
    lifecycle.release([held], using="default")


def fail_and_retry(held):
    outcome = Outcome(claim=held, duration=0.0, error=Retry(delay=0))
    lifecycle.settle(decide(outcome, max_rescues=3), using="default", consumer=None)


def fail_and_retry_together(held):
    outcome = Outcome(claim=held, duration=0.0, error=Retry(delay=0))
    lifecycle.settle_many([decide(outcome, max_rescues=3)], using="default", consumer=None)


def die(held):
    consumer = TaskModel.objects.get(pk=held.id).consumer or 0
    lifecycle.free_rows(consumer, "dead", Lines((), using="default"), "default")


@pytest.mark.parametrize("act", [give_back, fail_and_retry, fail_and_retry_together, die])
@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_what_was_claimed_does_not_wait_again_in_a_workflow_that_has_stopped(act, how):
    wf = Workflow("stops")
    wf.add(failing("a"))
    wf.add(call("b").with_options(max_retries=1))
    wf.add(call("tidy"), depends_on="b", when="always")
    run = wf.schedule()
    first, held = claim()
    if how == "cancel":
        assert run.cancel()
        complete(first)
    else:
        stop_by_failure(first)

    with databases.of("default").own_transaction(connection):
        act(held)

    assert states(run)["b"] == "cancelled"
    reason = {"cancel": "the workflow was cancelled", "failure": "step 'a' failed"}[how]
    assert TaskModel.objects.get(step__name="b").error.startswith(f"cancelled: {reason}")
    run_burst()
    assert ran == ([] if how == "cancel" else ["tidy"])
    assert ended(run)[0] == {"cancel": "cancelled", "failure": "failed"}[how]


@pytest.mark.parametrize("act", [give_back, fail_and_retry, die])
def test_clean_up_is_tried_again_in_a_workflow_that_has_failed(act):
    wf = Workflow("cleans up")
    wf.add(failing("a"))
    wf.add(call("tidy").with_options(max_retries=1), depends_on="a", when="always")
    run = wf.schedule()
    (first,) = claim()
    stop_by_failure(first)
    (held,) = claim()

    with databases.of("default").own_transaction(connection):
        act(held)

    assert states(run)["tidy"] == "created"
    run_burst()
    assert (ran, ended(run)[0]) == (["tidy"], "failed")


def test_what_a_limit_refuses_does_not_wait_in_a_workflow_that_has_stopped():
    limited = [call(name).with_options(concurrency=1) for name in ("a", "b")]
    run = group(*limited).schedule()
    claiming = Claimer(["default"], using="default")
    admit = admission.admit

    def cancel_and_admit(claims, **words):
        assert run.cancel()
        return admit(claims, **words)

    with mock.patch.object(admission, "admit", cancel_and_admit):
        (held,) = claiming.claim(10, consumer=1)
    assert sorted(states(run).values()) == ["cancelled", "running"]
    complete(held)
    run_burst()

    assert sorted(states(run).values()) == ["cancelled", "completed"]
    assert ran == []
    assert ended(run)[0] == "cancelled"


def test_what_is_withdrawn_takes_no_place_of_a_limit():
    run = group(call("a").with_options(concurrency=1)).schedule()
    echo.job.with_args("other").with_options(concurrency=1).with_queue("other").schedule()
    WorkflowModel.objects.filter(pk=run.pk).update(is_cancelled=True)
    claiming = Claimer(["default"], using="default")

    (held,) = claiming.claim(10, consumer=1)

    assert held.withdrawn
    assert TaskModel.objects.get(pk=held.id).limit_key is None


@pytest.mark.server
def test_nothing_is_deleted_of_a_workflow_while_it_is_about_to_run_again():
    run = chain(call("a"), failing("b")).schedule()
    run_burst()
    done = TaskModel.objects.get(step__name="a")

    with transaction.atomic():
        run.retry_failed()
        deleting = Concurrent(lambda: lifecycle.delete([done.pk], using="default"))
        assert deleting.result(timeout_seconds=20) == 0

    assert lifecycle.delete([done.pk], using="default") == 0
    run_burst()
    assert lifecycle.delete([done.pk], using="default") == 1


@pytest.mark.server
def test_a_sweep_waits_for_no_step_that_another_session_has_locked(caplog):
    runs = [group(call("a"), call("b")).schedule() for _ in range(2)]
    with mock.patch.object(Walk, "_lock_not_started", return_value=[]):
        for run in runs:
            run.cancel()
    step_of = TaskModel.objects.filter(workflow=runs[0].pk)

    with transaction.atomic():
        list(step_of.select_for_update())
        assert Concurrent(lambda: rebuilding.sweep(using="default")).result(timeout_seconds=10) == 0

    assert set(states(runs[0]).values()) == {"created"}
    assert ended(runs[1])[0] == "cancelled"
    assert caplog.text == ""
    rebuilding.sweep(using="default")
    assert ended(runs[0])[0] == "cancelled"


def test_a_sweep_begins_with_nothing_once_its_time_is_up():
    with mock.patch.object(Walk, "_lock_not_started", return_value=[]):
        run = group(call("a")).schedule()
        run.cancel()

    rebuilding.sweep(using="default", seconds=0)

    assert states(run) == {"a": "created"}


@pytest.mark.server
def test_a_sweep_passes_over_a_workflow_that_another_session_has_locked(monkeypatch):
    runs = [group(call("a")).schedule() for _ in range(2)]
    TaskModel.objects.update(status="completed")
    monkeypatch.setattr("random.sample", lambda found, _: found)

    def sweep():
        databases.of("default").prepare_dispatcher(connection, 1)
        return rebuilding.sweep(using="default")

    with transaction.atomic():
        list(WorkflowModel.objects.select_for_update().filter(pk=runs[0].pk))
        assert Concurrent(sweep).result(timeout_seconds=20) == 1

    assert [ended(run)[0] for run in runs] == ["running", "completed"]


@pytest.mark.server
def test_with_repeatable_reads_a_workflow_is_cancelled_though_steps_have_ended_meanwhile():
    wf = Workflow("old news")
    a, b = wf.add(call("a")), wf.add(call("b"))
    wf.add(call("c"), depends_on=[a, b])
    run = wf.schedule()
    first, second = claim()

    with repeatable_reads():
        with transaction.atomic():
            assert states(run) == {"a": "running", "b": "running", "c": "blocked"}
            Concurrent(lambda: complete(first)).result(timeout_seconds=20)
            assert states(run)["a"] == "running"
            assert run.cancel()
        assert states(run) == {"a": "completed", "b": "running", "c": "cancelled"}
        complete(second)

    assert ended(run)[0] == "cancelled"


@pytest.mark.server
def test_with_repeatable_reads_what_follows_is_tried_again_after_a_deadlock():
    run = chain(call("a"), call("b")).schedule()
    (held,) = claim()
    mine, theirs = prepare_deadlock()
    walk, tries = Walk.follow, []

    def meet_others(self, ends):
        tries.append(connection.in_atomic_block)
        if len(tries) == 2:
            deadlock(mine, theirs)
        walk(self, ends)

    with repeatable_reads(), mock.patch.object(Walk, "follow", meet_others), transaction.atomic():
        lifecycle.settle(
            decide(Outcome(claim=held, duration=0.0, returned=""), max_rescues=3),
            using="default",
            consumer=1,
        )

    assert len(tries) == 3
    assert states(run) == {"a": "completed", "b": "created"}


@pytest.mark.parametrize("how", ["cancel", "failure"])
def test_a_step_that_was_passed_over_is_cancelled_when_it_is_claimed(how):
    wf = Workflow("passed over")
    wf.add(failing("a"))
    wf.add(call("b"))
    wf.add(call("tidy"), depends_on="a", when="always")
    run = wf.schedule()
    (held,) = claim(limit=1)
    late = TaskModel.objects.get(step__name="b")
    # As whoever stops it sees it while another session has locked the row.
    with mock.patch.object(Walk, "_lock_not_started", return_value=[]):
        stop_by_failure(held) if how == "failure" else run.cancel()
    if how == "cancel":
        complete(held)
    else:
        TaskModel.objects.filter(pk=late.pk).update(status="created")
    assert states(run)["b"] == "created"

    run_burst()

    assert states(run)["b"] == "cancelled"
    assert ran == (["tidy"] if how == "failure" else [])
    assert ended(run)[0] == {"cancel": "cancelled", "failure": "failed"}[how]


@pytest.mark.server
@pytest.mark.parametrize("commits_first", ["who stops", "what waits"])
@pytest.mark.parametrize("act", [give_back, fail_and_retry])
def test_who_stops_a_workflow_and_what_waits_again_see_each_other(act, commits_first):
    run = group(call("a"), call("b").with_options(max_retries=1)).schedule()
    first, held = claim()
    is_written, may_commit = threading.Event(), threading.Event()

    def acts():
        with databases.of("default").own_transaction(connection):
            act(held)
            is_written.set()
            assert may_commit.wait(20)

    acting = Concurrent(acts)
    assert is_written.wait(20)
    with transaction.atomic():
        # It looks for what has not started, and finds nothing.
        assert run.cancel()
        if commits_first == "what waits":
            may_commit.set()
            acting.result()
    may_commit.set()
    acting.result()

    assert states(run) == {"a": "running", "b": "cancelled"}
    complete(first)
    assert ended(run)[0] == "cancelled"


@pytest.mark.server
@pytest.mark.parametrize("act", [give_back, fail_and_retry, fail_and_retry_together, die])
def test_what_waits_again_does_not_wait_for_who_adds_a_step(act):
    run = group(call("a"), call("b").with_options(max_retries=1)).schedule()
    _, held = claim()

    def acts():
        with databases.of("default").own_transaction(connection):
            act(held)

    with transaction.atomic():
        # The gate of the end is locked until this commits.
        run.add(call("late"))
        Concurrent(acts).result(timeout_seconds=20)

    assert states(run)["b"] == "created"


@pytest.mark.server
def test_what_a_limit_refuses_does_not_wait_for_who_adds_a_step():
    run = group(*(call(name).with_options(concurrency=1) for name in "ab")).schedule()
    claiming = Claimer(["default"], using="default")

    with transaction.atomic():
        run.add(call("late"))
        claims = Concurrent(lambda: claiming.claim(10, consumer=1)).result(timeout_seconds=20)

    assert len(claims) == 1
    assert sorted(states(run).values()) == ["blocked", "created", "running"]
