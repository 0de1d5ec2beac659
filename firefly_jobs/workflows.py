"""Workflows: calls that wait for each other, written as rows in one transaction.

A :class:`Workflow` is a plan.  :meth:`Workflow.schedule` checks the whole graph and writes a
``WorkflowModel``, a row for each step and the gates they wait at; it may be called again for
another run.  What happens then is the business of ``dependencies``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asgiref.sync import sync_to_async

from . import graphs, workflow_rows
from .conf import get_settings, suggestion
from .declarations import Occurrence
from .exceptions import WorkflowError
from .graphs import Dependency, Node, When
from .jobs import Job
from .models import TaskModel, WorkflowModel, WorkflowStep
from .options import LABEL_LENGTH_MAX, check_step_name
from .placeholders import StepResult, placeholders_in, replaced
from .runs import with_parent_results
from .storable import CHARACTERS, is_storable
from .workflow_rows import NewStep


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step of a workflow that is not scheduled yet; what :meth:`Workflow.add` returns.

    Attributes:
        name: Its name in the workflow.
        job: What it calls.
        result: Stands for what it returns, among the arguments of another step.
    """

    name: str
    job: Job
    priority: int = 0
    ignore_result: bool = False
    depends_on: tuple[Any, ...] = ()
    condition: When = When.SUCCESS

    @property
    def result(self) -> StepResult:  # noqa: D102 - see above
        return StepResult(self.name)

    def when(self, condition: str) -> After:
        """Return this step as a dependency on another condition than success.

        Args:
            condition: ``"success"``, ``"failure"`` or ``"always"``.
        """
        return After(self, When.from_word(condition))


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A workflow that is a part of another one.

    Attributes:
        name: Its name there; its steps are called ``name.step``.
        steps: Its steps, as they are called there.
        last: Those of them that no other waits for.
    """

    name: str
    steps: tuple[Step, ...]
    last: tuple[Step, ...]

    def when(self, condition: str) -> After:
        """Return this part as a dependency on another condition than success."""
        return After(self, When.from_word(condition))


@dataclass(frozen=True, slots=True)
class After:
    """A dependency with a condition of its own."""

    parent: Any
    condition: When


Parent = Step | Part | After | Job | str


@dataclass(slots=True)
class _Edges:
    """What a step waits for, by the places of the steps."""

    parents: dict[Dependency, None] = field(default_factory=dict)


class Workflow:
    """A plan of steps that wait for each other.

    Args:
        name: What people call it.
        on_success: A job or task that runs once all of it has completed.
        on_failure: One that runs once it has failed.

    Raises:
        ValueError: If the name is empty or too long.
    """

    def __init__(self, name: str, *, on_success: Any = None, on_failure: Any = None) -> None:
        self.name = _checked_name(name)
        self._steps: list[Step] = []
        self._parts: dict[str, Part] = {}
        # All names, and the last number that was given to one, so that thousands are added soon.
        self._taken: set[str] = set()
        self._numbers: dict[str, int] = {}
        last = {"on_success": on_success, "on_failure": on_failure}
        self._last = {word: _as_job(job) for word, job in last.items() if job is not None}

    def __repr__(self) -> str:
        return f"<Workflow {self.name}: {len(self._steps)} steps>"

    @property
    def steps(self) -> tuple[Step, ...]:
        """Its steps, in order of ``add``."""
        return tuple(self._steps)

    # --- building

    def add(  # noqa: PLR0917 - the names that the field uses, in their order
        self,
        job: Any,
        name: str | None = None,
        depends_on: Parent | Iterable[Parent] | None = None,
        priority: int | None = None,
        ignore_result: bool = False,
        when: str = "success",
    ) -> Any:
        """Add a step.

        Args:
            job: A job, a task that is called without arguments, or another workflow.
            name: Its name here; by default the job's label or its function's name, numbered
                when that is taken.
            depends_on: What it waits for: steps, jobs that were added once, or names, also of
                steps that are added later.
            priority: Its place in the workflow: it waits for all steps with a higher one.
            ignore_result: Whether its failure stops nothing.
            when: What has to become of the steps that it depends on: ``"success"``,
                ``"failure"`` or ``"always"``; ``step.when(...)`` says so for one of them.

        Returns:
            The :class:`Step`, or for a workflow the :class:`Part`, to depend on.

        Raises:
            WorkflowError: If the name is taken.
            TypeError, ValueError: If something is of another type, or out of range.
        """
        level = _level(priority)
        parents = _as_tuple(depends_on)
        condition = When.from_word(when)
        if isinstance(job, Workflow):
            if ignore_result:
                message = "ignore_result belongs to a step; give it to the steps of the workflow."
                raise ValueError(message)
            return self._add_part(job, name, parents, level, condition)
        job = _as_job(job)
        step = Step(
            self._new_name(name, job.default_name[:LABEL_LENGTH_MAX]),
            job,
            level,
            bool(ignore_result),
            parents,
            condition,
        )
        self._steps.append(step)
        self._taken.add(step.name)
        return step

    add_job = add

    def _add_part(
        self,
        workflow: Workflow,
        name: str | None,
        parents: tuple[Any, ...],
        level: int,
        condition: When,
    ) -> Part:
        if workflow._last:
            message = (
                f"Workflow {workflow.name!r} has on_success or on_failure, which a part of another "
                f"workflow cannot have. Add a step that depends on it instead."
            )
            raise WorkflowError(message)
        if any(step.priority for step in workflow._steps):
            message = (
                f"Workflow {workflow.name!r} has priorities of its own, which a part of another "
                f"workflow cannot have. Use depends_on."
            )
            raise WorkflowError(message)
        if not workflow._steps:
            message = f"Workflow {workflow.name!r} has no steps."
            raise WorkflowError(message)
        own = self._new_name(name, workflow.name)
        places = workflow._edges()
        names = {step.name: f"{own}.{step.name}" for step in workflow._steps}
        copies: list[Step] = []
        for step, edges in zip(workflow._steps, places, strict=True):
            inner = [After(names[workflow._steps[d.parent].name], d.when) for d in edges.parents]
            self._new_name(names[step.name], "")
            copies.append(
                Step(
                    names[step.name],
                    _renamed(step.job, names),
                    level,
                    step.ignore_result,
                    tuple(inner) if inner else parents,
                    When.SUCCESS if inner else condition,
                )
            )
        waited_for = {d.parent for edges in places for d in edges.parents}
        last = [step for n, step in enumerate(copies) if n not in waited_for]
        self._steps += copies
        self._parts[own] = Part(own, tuple(copies), tuple(last))
        self._taken.update({own}, names.values())
        return self._parts[own]

    def _new_name(self, name: str | None, default: str) -> str:
        if name is not None:
            if check_step_name(name) in self._taken:
                message = f"Workflow {self.name!r} has a step {name!r} already; names are unique."
                raise WorkflowError(message)
            return name
        found, number = default, self._numbers.get(default, 1)
        while found in self._taken:
            number += 1
            found = f"{default[: LABEL_LENGTH_MAX - 8]}-{number}"
        self._numbers[default] = number
        return found

    # --- the graph

    def _edges(self) -> list[_Edges]:
        """Return what each step waits for.

        Raises:
            WorkflowError: If it is not there, or not to be told from another one.
        """
        places = {step.name: n for n, step in enumerate(self._steps)}
        found = []
        for step in self._steps:
            edges = _Edges()
            for parent in step.depends_on:
                for one, condition in self._parents(step, parent, step.condition):
                    edges.parents[Dependency(places[one.name], condition)] = None
            known = {d.parent for d in edges.parents}
            for name in self._results_in(step.job, f"Step {step.name!r}", places):
                if places[name] not in known:
                    edges.parents[Dependency(places[name])] = None
            found.append(edges)
        for word, job in self._last.items():
            self._results_in(job, f"{word}=", places)
        return found

    def _results_in(self, job: Job, who: str, places: Mapping[str, int]) -> list[str]:
        names = _results_in(job)
        for name in names:
            if name not in places:
                message = (
                    f"{who} takes the result of {name!r}, which is no step of workflow "
                    f"{self.name!r}.{suggestion(name, places)}"
                )
                raise WorkflowError(message)
        return names

    def _parents(self, step: Step, parent: Any, condition: When) -> Iterator[tuple[Step, When]]:
        if isinstance(parent, After):
            yield from self._parents(step, parent.parent, parent.condition)
            return
        if isinstance(parent, str):
            parent = self._by_name(step, parent)
        elif isinstance(parent, Job):
            parent = self._by_job(step, parent)
        if isinstance(parent, Part) and self._parts.get(parent.name) is parent:
            yield from ((last, condition) for last in parent.last)
        elif isinstance(parent, Step) and any(parent is one for one in self._steps):
            yield parent, condition
        else:
            message = (
                f"Step {step.name!r} depends on {parent!r}, which is no step of workflow "
                f"{self.name!r}. Give what add() returned, the job that was added, or a name."
            )
            raise WorkflowError(message)

    def _by_name(self, step: Step, name: str) -> Step | Part:
        for one in self._steps:
            if one.name == name:
                return one
        if name in self._parts:
            return self._parts[name]
        known = [one.name for one in self._steps]
        message = (
            f"Step {step.name!r} depends on {name!r}, which is no step of workflow {self.name!r}."
            f"{suggestion(name, known)}"
        )
        raise WorkflowError(message)

    def _by_job(self, step: Step, job: Job) -> Step:
        found = [one for one in self._steps if one.job is job]
        found = found or [one for one in self._steps if one.job == job]
        if len(found) == 1:
            return found[0]
        problem = "was added several times" if found else "was not added"
        message = (
            f"Step {step.name!r} depends on a job of {job.task.name!r} that {problem}. Give what "
            f"add() returned."
        )
        raise WorkflowError(message)

    # --- scheduling

    def schedule(self) -> WorkflowModel:
        """Write all of it in one transaction; the steps that wait for nothing are due at once.

        Returns:
            The run.

        Raises:
            WorkflowError: If there is no step, an unknown parent, or a circle.
            TypeError, ValueError, PayloadError: As for ``job.schedule()``.
        """
        return self._schedule(None)

    def start(self, occurrence: Occurrence) -> WorkflowModel:
        """Schedule as one start of a recurring workflow; see ``firing``."""
        return self._schedule(None, occurrence)

    def check(self) -> None:
        """Raise what :meth:`schedule` would raise, and write nothing."""
        self._rows(None)

    @property
    def alias(self) -> str:
        """The alias of the database that its steps belong to."""
        jobs = [*(step.job for step in self._steps), *self._last.values()]
        return _alias_of(jobs, self.name)

    def _schedule(self, queue: str | None, occurrence: Occurrence | None = None) -> WorkflowModel:
        steps, plan, last = self._rows(queue)
        return workflow_rows.insert(
            self.name, steps, plan, last=last, using=self.alias, occurrence=occurrence
        )

    def _rows(self, queue: str | None) -> tuple[list[NewStep], graphs.Plan, dict[str, TaskModel]]:
        edges = self._edges()
        nodes = [
            Node(step.name, step.priority, tuple(found.parents))
            for step, found in zip(self._steps, edges, strict=True)
        ]
        plan = graphs.plan(nodes)
        jobs = [
            with_parent_results(step.job, [self._steps[d.parent].name for d in node.parents])
            for step, node in zip(self._steps, nodes, strict=True)
        ]
        if queue is not None:
            jobs = [job.with_queue(queue) for job in jobs]
        # Before any row is made, as each names its own database.
        self.alias  # noqa: B018 - reading it checks it
        steps = [
            NewStep(job.row(), node, step.ignore_result)
            for job, node, step in zip(jobs, nodes, self._steps, strict=True)
        ]
        return steps, plan, {word: job.row() for word, job in self._last.items()}

    async def aschedule(self) -> WorkflowModel:
        """Schedule from a coroutine."""
        return await sync_to_async(self.schedule, thread_sensitive=True)()

    def submit_all(self, queue: str | None = None) -> list[int]:
        """Schedule and return the ids of the tasks, in order of ``add``.

        Args:
            queue: The queue of all steps, in place of their own.
        """
        run = self._schedule(queue)
        steps = WorkflowStep.objects.using(run._state.db).filter(workflow=run)
        return list(steps.order_by("pk").values_list("pk", flat=True))


# --- sets of steps


def chain(*members: Any, name: str = "chain") -> Workflow:
    """Return a workflow whose members run one after the other.

    Args:
        members: Jobs, tasks or workflows.
        name: Its name.
    """
    workflow = Workflow(name)
    before: Any = ()
    for member in members:
        before = workflow.add(member, depends_on=before)
    return workflow


def group(*members: Any, name: str = "group") -> Workflow:
    """Return a workflow whose members wait for nothing; arguments as for :func:`chain`."""
    workflow = Workflow(name)
    for member in members:
        workflow.add(member)
    return workflow


def chord(members: Any, last: Any, *, name: str = "chord") -> Workflow:
    """Return a workflow whose last member runs once all others have completed.

    Args:
        members: A workflow such as a :func:`group`, or jobs and tasks.
        last: A job, task or workflow.
        name: Its name.
    """
    workflow = Workflow(name)
    if isinstance(members, Workflow):
        before: Any = [workflow.add(members)]
    else:
        before = [workflow.add(member) for member in members]
    workflow.add(last, depends_on=before)
    return workflow


# --- what they are made of


def _as_job(item: Any) -> Job:
    if isinstance(item, Job):
        return item
    if hasattr(item, "row_of"):
        return Job(item)
    message = f"A step is a job, a task or a workflow, got {item!r}. Decorate functions with @task."
    raise TypeError(message)


def _as_tuple(parents: Any) -> tuple[Any, ...]:
    if parents is None:
        return ()
    is_one = isinstance(parents, str | Step | Part | After | Job)
    # What is no parent at all is found with the others.
    return (parents,) if is_one or not isinstance(parents, Iterable) else tuple(parents)


def _level(priority: Any) -> int:
    if priority is None:
        return 0
    if isinstance(priority, bool) or not isinstance(priority, int):
        message = f"priority must be a whole number, the place in the workflow, got {priority!r}."
        raise TypeError(message)
    return int(priority)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or len(name) > LABEL_LENGTH_MAX:
        message = (
            f"A workflow's name must be a text of 1 to {LABEL_LENGTH_MAX} characters, got {name!r}."
        )
        raise ValueError(message)
    if not is_storable(name):
        message = f"A workflow's name has {CHARACTERS}."
        raise ValueError(message)
    return name


def _results_in(job: Job) -> list[str]:
    """Return the names of the steps whose results are among a job's arguments."""
    found = placeholders_in((job.args, job.kwargs))
    return [p.step for p in found if isinstance(p, StepResult)]


def _renamed(job: Job, names: dict[str, str]) -> Job:
    """Return a job whose arguments name steps as they are called in another workflow."""

    def rename(placeholder: Any) -> Any:
        return StepResult(names.get(placeholder.step, placeholder.step))

    if not _results_in(job):
        return job
    return job._copy(args=replaced(job.args, rename), kwargs=replaced(job.kwargs, rename))  # noqa: SLF001 - what else a job is made of


def _alias_of(jobs: Sequence[Job], name: str) -> str:
    aliases = {job.options.database or get_settings().DATABASE for job in jobs}
    if len(aliases) > 1:
        message = (
            f"The steps of workflow {name!r} belong to the databases {', '.join(sorted(aliases))}, "
            f"which cannot be committed together."
        )
        raise WorkflowError(message)
    return aliases.pop()
