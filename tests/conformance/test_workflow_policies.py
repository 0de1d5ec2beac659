"""The tables of docs/howto/workflows.md, row by row: what runs after what did not succeed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from firefly_jobs import Cancel, TaskHooks, Workflow, WorkflowModel, task
from firefly_jobs.databases.functions import SecondsFromNow
from firefly_jobs.models import TaskModel
from tests.conformance import tasks
from tests.conformance.support import run_burst
from tests.docs.pages import read, section

pytestmark = pytest.mark.django_db(transaction=True)

TEXT = section(read("howto/workflows.md"), "When a step does not succeed")


def rows_of(heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading this is."""
    lines = TEXT[TEXT.index(f"| {heading} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


class Decided(TaskHooks):
    def on_prerequisite_failure(self, run, failed):
        return run.args[0]


@task(hooks=Decided)
def fail_and_ask(answer):
    raise ValueError("told to")


@task(max_retries=1, retry_delay=0)
def complete_after_a_retry():
    return tasks.BODIES["again"]()


@task
def step():
    return None


def body(name: str, work: Callable[[], object]) -> Any:
    tasks.BODIES[name] = work
    return tasks.call.job.with_args(name)


def fails() -> None:
    raise ValueError("told to")


def cancels() -> None:
    raise Cancel("told to")


def cancel_the_step(run: WorkflowModel) -> None:
    assert TaskModel.objects.get(workflow=run, step__name="a").cancel()


def let_it_expire(run: WorkflowModel) -> None:
    TaskModel.objects.filter(workflow=run, step__name="a").update(expires_at=SecondsFromNow(-1))


def cancel_all(run: WorkflowModel) -> None:
    assert run.cancel()


@dataclass(frozen=True)
class Cause:
    """How the step ``a`` is made to end, and what happens before it is run."""

    job: Callable[[], Any] = lambda: step
    options: dict[str, Any] = field(default_factory=dict)
    then: Callable[[WorkflowModel], None] = lambda run: None


def retried() -> Any:
    failures = [ValueError("the first time")]

    def again() -> None:
        if failures:
            raise failures.pop()

    tasks.BODIES["again"] = again
    return complete_after_a_retry


IGNORED = {"ignore_result": True}
CAUSES = {
    "completes": Cause(),
    "completes after a retry": Cause(retried),
    "fails": Cause(lambda: body("fails", fails)),
    "fails, with `ignore_result=True`": Cause(lambda: body("fails", fails), IGNORED),
    'fails, and its hook says "continue"': Cause(lambda: fail_and_ask.job.with_args("continue")),
    'fails with `ignore_result=True`, and its hook says "stop"': Cause(
        lambda: fail_and_ask.job.with_args("stop"), IGNORED
    ),
    "raises `Cancel`": Cause(lambda: body("cancels", cancels)),
    "raises `Cancel`, with `ignore_result=True`": Cause(lambda: body("cancels", cancels), IGNORED),
    "is cancelled by `row.cancel()`": Cause(then=cancel_the_step),
    "expires": Cause(then=let_it_expire),
    "is skipped": Cause(options={"depends_on": "before", "when": "failure"}),
    "has not started when `run.cancel()` comes": Cause(then=cancel_all),
    "runs when `run.cancel()` comes, and completes": Cause(
        lambda: body("cancels all", lambda: WorkflowModel.objects.get().cancel())
    ),
}


def run_in_turn() -> None:
    """Run what is due, then what had to wait for that, then what follows."""
    for queue in ("default", "later", "default"):
        run_burst(queue)


def became(run: WorkflowModel, name: str) -> str:
    """Return what became of a step, in the word of the tables."""
    row = TaskModel.objects.get(workflow=run, step__name=name)
    if row.status != "cancelled":
        return {"completed": "runs"}.get(row.status, row.status)
    word, colon, _ = row.error.partition(":")
    assert colon, row.error
    return word


def test_every_row_is_known():
    assert [row[0] for row in rows_of("the step")] == list(CAUSES)


@pytest.mark.parametrize("row", rows_of("the step"), ids=lambda row: row[0])
def test_what_runs_after_a_step(row):
    cause = CAUSES[row[0]]
    wf = Workflow("policy")
    if "depends_on" in cause.options:
        wf.add(step, name="before", priority=1)
    wf.add(cause.job(), name="a", priority=1, **cause.options)
    for when in ("success", "failure", "always"):
        wf.add(step, name=when, depends_on="a", priority=1, when=when)
    wf.add(step.job.with_queue("later"), name="apart", priority=1)
    wf.add(step, name="lower")
    run = wf.schedule()
    cause.then(run)

    run_in_turn()

    run.refresh_from_db()
    assert [became(run, when) for when in ("success", "failure", "always")] == row[1:4]
    assert [became(run, "apart"), became(run, "lower")] == [row[4]] * 2
    assert f"`{run.status}`" == row[5]
    assert (row[5] == "`failed`") == run.error.startswith("step 'a' failed: ValueError")
    assert run.ignored_failures == (
        ["a"] if row[:1][0].startswith("fails") and not run.error else []
    )


ENDS: dict[str, Callable[[], Any]] = {
    "completes": lambda: step.job,
    "fails": CAUSES["fails"].job,
    "raises `Cancel`": CAUSES["raises `Cancel`"].job,
    # By the failure of the other one.
    "cancelled": lambda: step.job,
}


@pytest.mark.parametrize("row", rows_of("a step that depends on"), ids=" ".join)
def test_what_several_parents_let_run(row):
    parents, end_of_a, end_of_b, expected = row
    wf = Workflow("parents")
    names = {"a": wf.add(ENDS[end_of_a](), name="a")}
    names["b"] = wf.add(ENDS[end_of_b]().with_queue("later"), name="b")
    names["tidy"] = wf.add(step, name="tidy", depends_on=names["b"], when="always")
    (expression,) = re.findall(r"`(\[.*?\])`", parents)
    wf.add(step, name="it", depends_on=eval(expression, {"__builtins__": {}}, names))
    run = wf.schedule()

    run_in_turn()

    words = {"completes": "runs", "fails": "failed", "cancelled": "cancelled"}
    for name, end in (("a", end_of_a), ("b", end_of_b)):
        if end in words:
            assert became(run, name) == words[end]
    assert became(run, "it") == expected
