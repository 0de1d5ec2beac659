"""Random workflows, compared after every step with what a few lines of plain Python say."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly_jobs import Workflow, lifecycle
from firefly_jobs.attempts import Outcome, decide
from firefly_jobs.databases import Completion
from firefly_jobs.models import TaskModel, WorkflowModel, WorkflowStep
from tests.conformance import tasks
from tests.conformance.support import claim

pytestmark = pytest.mark.django_db(transaction=True)

STEPS_MAX = 60
RETRIES = 3
CONDITIONS = [("success", "success", "success", "failure", "always"), ("always", "failure")]


@dataclass
class Plan:
    """A random workflow; ``parents`` are earlier steps with a condition each."""

    parents: list[dict[int, str]]
    priorities: list[int]
    ignored: set[int]
    failing: set[int]
    # How likely somebody cancels it after the end of a step.
    cancelling: float


@st.composite
def plans(draw):
    # Small ones as well: what a single step decides is decided by many others in large ones.
    count = draw(st.integers(1, draw(st.sampled_from((5, STEPS_MAX)))))
    conditions = draw(st.sampled_from(CONDITIONS))
    levels = draw(st.sampled_from([(0,), (0,), (5, 0), (9, 2, -4)]))
    priorities = sorted(draw(st.lists(st.sampled_from(levels), min_size=count, max_size=count)))
    priorities.reverse()
    parents = []
    for n in range(count):
        before = draw(st.sets(st.integers(0, n - 1), max_size=4)) if n else set()
        parents.append({p: draw(st.sampled_from(conditions)) for p in sorted(before)})
    if draw(st.booleans()) and count > 2:
        # One that waits for very many has a tree of counters.
        parents[-1] = dict.fromkeys(range(count - 1), "success")
    numbers = st.sets(st.integers(0, count - 1), max_size=1 + count // 6)
    return Plan(
        parents, priorities, draw(numbers), draw(numbers), draw(st.sampled_from((0, 0, 0.05)))
    )


@dataclass
class Oracle:
    """The same workflow without a database, a counter or a gate."""

    plan: Plan
    states: list[str] = field(init=False)
    error: int | None = None
    is_cancelled: bool = False

    def __post_init__(self):
        self.states = ["blocked"] * len(self.plan.parents)
        self._settle()

    def _has_ended(self, n):
        return self.states[n] in {"completed", "failed", "cancelled"}

    def _is_met(self, n, condition):
        if condition == "always":
            return True
        if condition == "failure":
            return self.states[n] == "failed"
        return self.states[n] == "completed" or (
            self.states[n] == "failed" and n in self.plan.ignored
        )

    def _settle(self):
        is_changing = True
        while is_changing:
            is_changing = False
            for n, parents in enumerate(self.plan.parents):
                above = [
                    m for m, p in enumerate(self.plan.priorities) if p > self.plan.priorities[n]
                ]
                if self.states[n] != "blocked" or not all(
                    self._has_ended(m) for m in [*above, *parents]
                ):
                    continue
                met = all(self._is_met(m, condition) for m, condition in parents.items())
                self.states[n] = "created" if met else "cancelled"
                is_changing = True

    def end(self, n, status):
        self.states[n] = status
        if status == "failed" and n not in self.plan.ignored:
            self.error = n if self.error is None else self.error
            for m, parents in enumerate(self.plan.parents):
                if self.states[m] in {"created", "blocked"} and not (
                    set(parents.values()) - {"success"}
                ):
                    self.states[m] = "cancelled"
        self._settle()

    def cancel(self):
        self.is_cancelled = True
        self.states = ["cancelled" if s in {"created", "blocked"} else s for s in self.states]

    def retry(self):
        """Let all start over that failed or was cancelled; return how many."""
        again = [
            n
            for n, state in enumerate(self.states)
            if state == "cancelled" or (state == "failed" and n not in self.plan.ignored)
        ]
        self.error, self.is_cancelled = None, False
        for n in again:
            self.states[n] = "blocked"
        self._settle()
        return len(again)

    @property
    def status(self):
        if not all(map(self._has_ended, range(len(self.states)))):
            return "running"
        if self.is_cancelled:
            return "cancelled"
        return "completed" if self.error is None else "failed"


def scheduled(plan):
    workflow = Workflow("random")
    steps: list[Any] = []
    for n, parents in enumerate(plan.parents):
        steps.append(
            workflow.add(
                tasks.nothing,
                name=f"step-{n}",
                depends_on=[steps[m].when(condition) for m, condition in parents.items()],
                priority=plan.priorities[n],
                ignore_result=n in plan.ignored,
            )
        )
    return workflow.schedule()


def settled(held, status):
    if status == "completed":
        lifecycle.complete_many([Completion.of(held, 0.0, "")], using="default")
    else:
        outcome = Outcome(claim=held, duration=0.0, error=ValueError("random"))
        lifecycle.settle(decide(outcome, max_rescues=3), using="default", consumer=1)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans(), pick=st.randoms(use_true_random=False))
def test_every_step_is_at_every_moment_where_plain_python_says(plan, pick):
    TaskModel.objects.all().delete()
    WorkflowModel.objects.all().delete()
    run = scheduled(plan)
    oracle = Oracle(plan)
    places = {
        pk: int(name.removeprefix("step-"))
        for pk, name in WorkflowStep.objects.values_list("pk", "name")
    }
    held = []

    def compare():
        found = TaskModel.objects.values_list("pk", "status")
        assert [s for _, s in sorted((places[pk], status) for pk, status in found)] == (
            oracle.states
        )
        run.refresh_from_db()
        assert run.status == oracle.status

    def end_all():
        """Claim and end in any order, and cancel in between where that was drawn."""
        compare()
        while True:
            for item in claim(limit=pick.randint(1, 8)):
                oracle.states[places[item.id]] = "running"
                held.append(item)
            compare()
            if not held:
                break
            item = held.pop(pick.randrange(len(held)))
            n = places[item.id]
            status = "failed" if n in plan.failing else "completed"
            settled(item, status)
            oracle.end(n, status)
            compare()
            if oracle.status == "running" and pick.random() < plan.cancelling:
                assert run.cancel()
                oracle.cancel()
                compare()

    end_all()
    assert run.status == oracle.status != "running"
    if oracle.error is not None:
        assert run.error.startswith(f"step 'step-{oracle.error}' failed")

    for _ in range(RETRIES):
        plan.failing = {n for n in plan.failing if pick.random() < 0.5}
        if run.status == "completed":
            break
        assert run.retry_failed() == oracle.retry()
        end_all()
