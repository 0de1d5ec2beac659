"""What a hook answers decides whether a step that has failed stops its workflow."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import DatabaseError

from firefly_jobs import Workflow, leases, lifecycle, rebuilding, task
from firefly_jobs.attempts import Ended, Settlement
from firefly_jobs.exceptions import LaneTimeoutError
from firefly_jobs.hooks import FailedStep, TaskHooks
from firefly_jobs.models import TaskModel, WorkflowStep
from firefly_jobs.states import Status
from tests.conformance import tasks
from tests.conformance.support import claim_one, dead_consumer, run_burst
from tests.factories import unique_name

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

TASKS: dict[str, Any] = {
    "plain": tasks.hooked,
    "autocommit": tasks.hooked_in_autocommit,
    "async": tasks.ahooked,
    "async with plain hooks": tasks.ahooked_plainly,
}
KINDS = pytest.mark.parametrize("kind", list(TASKS))


def failing(*, kind="plain", body=None, **hooks):
    """Return a job that fails, with hooks of any kind."""
    called = TASKS[kind]

    def fail():
        raise ValueError("broken")

    async def afail():
        fail()

    def awaited(hook):
        async def ahook(*values):
            return hook(*values)

        return ahook

    key = unique_name("failing")
    tasks.BODIES[key] = body or (afail if called.is_async else fail)
    is_async = kind == "async"
    tasks.HOOKS[key] = {k: awaited(v) if is_async else v for k, v in hooks.items()}
    return called.job.with_args(key)


def answering(answer):
    return lambda run, failed: answer


def run_of(job, *, ignore_result=False, after=()):
    wf = Workflow("asked")
    first = wf.add(job, name="first", ignore_result=ignore_result)
    wf.add(tasks.nothing, name="second", depends_on=[first])
    run = wf.schedule()
    run_burst()
    run.refresh_from_db()
    return run


def states(run):
    return dict(WorkflowStep.objects.filter(workflow=run).values_list("name", "task__status"))


GOES_ON = {"first": "failed", "second": "completed"}
STOPS = {"first": "failed", "second": "cancelled"}


# --- what an answer means


@KINDS
@pytest.mark.parametrize("ignore_result", [False, True])
@pytest.mark.parametrize("answer", ["continue", "stop", None])
def test_an_answer_decides_and_without_one_the_step_does(kind, answer, ignore_result):
    job = failing(kind=kind, on_prerequisite_failure=answering(answer))
    run = run_of(job, ignore_result=ignore_result)

    goes_on = ignore_result if answer is None else answer == "continue"
    assert states(run) == (GOES_ON if goes_on else STOPS)
    assert run.status == ("completed" if goes_on else "failed")
    assert run.error == ("" if goes_on else "step 'first' failed: ValueError: broken")
    assert run.ignored_failures == (["first"] if goes_on else [])


@KINDS
def test_a_hook_is_asked_once_between_the_others_with_the_step_and_its_error(kind):
    heard: list[Any] = []

    def note(event):
        return lambda run, *values: heard.append((event, *values))

    def ask(run, failed):
        heard.append("asked")
        assert (run.attempt, run.args[0][:7]) == (2, "failing")
        assert isinstance(failed, FailedStep)
        assert (failed.name, str(failed.error)) == ("first", "broken")

    job = failing(
        kind=kind,
        on_retry=lambda *_: heard.append("retry"),
        on_failure=lambda *_: heard.append("failure"),
        on_prerequisite_failure=ask,
        after_return=lambda _, status: heard.append(status),
    )
    run_of(job.with_options(max_retries=1, retry_delay=0))

    assert heard == ["retry", "retried", "failure", "asked", "failed"]


def test_a_failure_that_a_hook_forgives_counts_as_ignored_for_all_that_wait():
    wf = Workflow("asked")
    first = wf.add(failing(on_prerequisite_failure=answering("continue")), name="first")
    for when in ("success", "failure", "always"):
        wf.add(tasks.nothing, name=when, depends_on=[first], when=when)
    run = wf.schedule()
    run_burst()

    assert states(run) == {"first": "failed"} | dict.fromkeys(
        ("success", "failure", "always"), "completed"
    )


def test_a_step_that_was_stopped_runs_again_though_its_result_was_ignored():
    run = run_of(failing(on_prerequisite_failure=answering("stop")), ignore_result=True)

    assert run.retry_failed() == 2
    assert states(run) == {"first": "created", "second": "blocked"}


@pytest.mark.parametrize("ignore_result", [False, True])
def test_an_answer_is_about_one_failure(ignore_result):
    answers = ["stop", None]
    job = failing(on_prerequisite_failure=lambda run, failed: answers.pop(0))
    run = run_of(job, ignore_result=ignore_result)
    assert states(run) == STOPS

    assert run.retry_failed() == 2
    run_burst()
    run.refresh_from_db()

    assert states(run) == (GOES_ON if ignore_result else STOPS)
    assert run.status == ("completed" if ignore_result else "failed")
    assert run.ignored_failures == (["first"] if ignore_result else [])


def test_what_was_forgiven_stays_so_when_the_rows_are_read_again():
    wf = Workflow("asked")
    first = wf.add(failing(on_prerequisite_failure=answering("continue")), name="first")
    wf.add(failing(), name="second", depends_on=[first])
    run = wf.schedule()
    run_burst()
    assert states(run) == {"first": "failed", "second": "failed"}

    assert run.retry_failed() == 1
    assert states(run) == {"first": "failed", "second": "created"}
    assert run.ignored_failures == ["first"]


# --- several hooks


SAID: list[Any] = []
ASKED: list[int] = []


class Answer(TaskHooks):
    """The hooks that a test defines, one after the other."""

    def __init__(self, number):
        self.number = number

    def on_prerequisite_failure(self, run, failed):
        ASKED.append(self.number)
        if isinstance(SAID[self.number], Exception):
            raise SAID[self.number]
        return SAID[self.number]


@task(hooks=[Answer(0), Answer(1), Answer(2)])
def fail():
    raise ValueError


@task
def fail_unheard():
    raise ValueError


@pytest.fixture
def said():
    """Let the three hooks of ``fail`` answer."""
    ASKED.clear()

    def say(*answers):
        SAID[:] = answers

    return say


def test_the_first_answer_counts(said):
    said(None, "continue", "stop")
    run = run_of(fail.job)

    assert states(run) == GOES_ON
    assert ASKED == [0, 1]


@pytest.mark.parametrize("bad", [LookupError("mine"), "ignore", True, ["stop"], 987654])
def test_what_a_hook_raises_or_says_wrongly_is_logged_and_counts_as_nothing(bad, said, caplog):
    said(bad, "continue", None)
    run = run_of(fail.job)

    assert states(run) == GOES_ON
    assert ASKED == [0, 1]
    (line,) = [r for r in caplog.records if "on_prerequisite_failure" in r.getMessage()]
    assert (line.name, line.levelno) == ("firefly_jobs", logging.ERROR)
    assert isinstance(bad, Exception) or repr(bad) not in line.getMessage()


@KINDS
def test_a_hook_that_raises_does_not_decide(kind):
    def ask(run, failed):
        raise LookupError

    assert states(run_of(failing(kind=kind, on_prerequisite_failure=ask))) == STOPS


# --- who is not asked


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_task_that_is_no_step_is_not_asked(kind):
    asked = []

    def ask(run, failed):
        asked.append(failed.name)
        return "continue"

    job = failing(kind=kind, on_prerequisite_failure=ask)
    alone = job.schedule() if kind == "plain" else None
    wf = Workflow("asked", on_failure=job)
    wf.add(failing(), name="first")
    run = wf.schedule()
    run_burst()

    assert asked == []
    assert run.tasks.get(step=None).status == "failed"
    if alone is not None:
        alone.refresh_from_db()
        assert alone.status == "failed"


def test_nobody_is_asked_where_the_process_has_died(jobs):
    jobs(MAX_RESCUES=0)
    asked = []

    def ask(run, failed):
        asked.append(failed.name)
        return "continue"

    job = failing(on_prerequisite_failure=ask)
    wf = Workflow("asked")
    first = wf.add(job, name="first")
    wf.add(tasks.nothing, name="second", depends_on=[first])
    run = wf.schedule()
    TaskModel.objects.filter(step__name="first").update(rescues=2)
    dead = dead_consumer()
    claim_one(consumer=dead.pk)
    leases.bury(dead.pk, using="default")

    assert states(run) == STOPS
    assert asked == []


def test_nobody_is_asked_while_another_attempt_follows():
    asked = []
    job = failing(on_prerequisite_failure=lambda *_: asked.append(1))
    run = run_of(job.with_options(max_retries=1, retry_delay=3600))

    assert states(run) == {"first": "created", "second": "blocked"}
    assert asked == []


def test_without_a_hook_that_is_asked_the_step_is_not_read(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr("firefly_jobs.executors.hooking._failed_step", refuse)

    assert states(run_of(fail_unheard.job)) == STOPS


@pytest.mark.parametrize(
    ("kind", "error"), [("async", LaneTimeoutError("late")), ("plain", DatabaseError("away"))]
)
def test_a_step_that_cannot_be_read_ends_as_it_says_itself(kind, error, monkeypatch, caplog):
    def refuse(*_, **__):
        raise error

    broken = SimpleNamespace(objects=SimpleNamespace(using=refuse))
    monkeypatch.setattr("firefly_jobs.executors.hooking.WorkflowStep", broken)
    ended = []
    job = failing(
        kind=kind,
        on_prerequisite_failure=answering("continue"),
        after_return=lambda _, status: ended.append(status),
    )

    assert states(run_of(job)) == STOPS
    assert ended == ["failed"]
    assert "No hook was asked" in caplog.text


# --- what is written


def test_the_answer_is_written_only_by_who_holds_the_step():
    wf = Workflow("asked")
    wf.add(failing(), name="first")
    wf.schedule()
    held = claim_one()
    stale = held._replace(fence=held.fence - 1)
    settlement = Settlement(
        claim=stale, ended=Ended.FAILED, status=Status.FAILED, duration=0.1, ignores_failure=True
    )

    assert lifecycle.settle_many([settlement], using="default", consumer=1) == []
    assert WorkflowStep.objects.get(name="first").is_forgiven is None


@pytest.mark.parametrize(
    ("answer", "outcome"), [("continue", "goes on"), ("stop", "stops"), (None, "stops")]
)
def test_either_outcome_is_an_event_that_names_step_and_error(jobs, answer, outcome):
    jobs(KEEP_EVENTS=True)
    run = run_of(failing(on_prerequisite_failure=answering(answer)))

    (event,) = run.events.filter(kind="prerequisite_failed")
    assert event.task.step.name == "first"
    assert event.message == (f"step 'first' failed, the workflow {outcome}: ValueError: broken")


def test_an_ignored_failure_without_hooks_is_an_event_too(jobs):
    jobs(KEEP_EVENTS=True)
    run = run_of(failing(), ignore_result=True)

    (event,) = run.events.filter(kind="prerequisite_failed")
    assert "the workflow goes on" in event.message


def test_a_sweep_asks_nobody_and_keeps_the_answer():
    run = run_of(failing(on_prerequisite_failure=answering("continue")))
    rebuilding.sweep(using="default")
    run.refresh_from_db()

    assert run.status == "completed"
