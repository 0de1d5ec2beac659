"""What the page of one workflow reads of its steps, however many there are.

Up to :data:`PICTURED_MAX` steps are drawn one by one.  Above that boxes stand for many:
those of the same function that wait at the same depth, or for functions, or for levels of
priority, whichever is few enough to be looked at.  The table holds :data:`STEPS_SHOWN` steps,
of a larger workflow those that failed or run before others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from django.db.models import Count
from django.db.models.functions import Coalesce
from django.urls import reverse
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from firefly_jobs.graphs import When
from firefly_jobs.models import TaskModel, WorkflowEdge, WorkflowModel, WorkflowStep
from firefly_jobs.runs import ParentsByGate
from firefly_jobs.states import Status

from .pictures import Edge, Node, draw
from .presentation import span_of

# Steps that are drawn one by one, and boxes of a summary.
PICTURED_MAX = 60
STEPS_SHOWN = 200
# Parents that are named in a row of the table.
PARENTS_SHOWN = 3
# Steps up to which a summary has arrows, and a table tells who waits for whom.
ARROWS_MAX, EDGES_MAX = 10_000, 20_000
# Steps up to which they are grouped: 100,000 take SQLite 0.2 s, PostgreSQL 0.5, MariaDB 1.2.
GROUPED_MAX = 100_000

_ROW_ORDER = [
    *(Status.FAILED, Status.RUNNING, Status.CREATED),
    *(Status.BLOCKED, Status.CANCELLED, Status.COMPLETED),
]


class Row(NamedTuple):
    """A step as far as the page shows it."""

    pk: int
    name: str
    status: str
    level: int
    gate: int | None
    is_ignored: bool
    func_name: str
    duration: float | None
    started: Any
    error: str


class Group(NamedTuple):
    """What the steps behind one box of a summary have in common."""

    level: int
    rank: int = -1
    func_name: str = ""


def counts_of(runs: Sequence[WorkflowModel], *, using: str) -> dict[int, Counter[str]]:
    """Return how many steps of each workflow are in each state, in two queries by an index."""
    tasks = TaskModel.objects.using(using)
    found: dict[int, Counter[str]] = {run.pk: Counter() for run in runs}
    if not runs:
        return found
    by_status = tasks.filter(workflow__in=list(found)).order_by().values("workflow", "status")
    for row in by_status.annotate(count=Count("pk")):
        found[row["workflow"]][row["status"]] = row["count"]
    # What runs when a workflow has ended is a task of it, and no step.
    last = [pk for run in runs for pk in (run.on_success, run.on_failure) if pk is not None]
    if last:
        for workflow, status in tasks.filter(pk__in=last).values_list("workflow", "status"):
            if workflow in found:
                found[workflow][status] -= 1
    return {pk: +counts for pk, counts in found.items()}


class Steps:
    """The steps of one workflow.

    Args:
        run: The workflow.
        using: Database alias.
        has_links: Whether who looks may see the tasks.
    """

    def __init__(self, run: WorkflowModel, *, using: str, has_links: bool) -> None:
        self._run, self._using, self._has_links = run, using, has_links

    @cached_property
    def counts(self) -> Counter[str]:
        """How many are in each state."""
        return counts_of([self._run], using=self._using)[self._run.pk]

    @property
    def total(self) -> int:
        """How many there are."""
        return self.counts.total()

    @property
    def done(self) -> int:
        """How many have ended."""
        return sum(count for status, count in self.counts.items() if _has_ended(status))

    @cached_property
    def rows(self) -> list[Row]:
        """Those that are shown; of more than that, those that failed or run come first."""
        found: list[Row] = []
        tasks = TaskModel.objects.using(self._using)
        steps = tasks.filter(workflow=self._run.pk, step__isnull=False)
        for status in _ROW_ORDER:
            if len(found) < STEPS_SHOWN and self.counts[status]:
                rows = steps.filter(status=status).order_by("pk").values_list(*_COLUMNS)
                found += map(Row._make, rows[: STEPS_SHOWN - len(found)])
        return found if self.total > STEPS_SHOWN else sorted(found)

    @cached_property
    def _parents(self) -> ParentsByGate | None:
        """Who waits for whom; ``None`` if that is too much to read."""
        if self.total > ARROWS_MAX:
            return None
        parents = ParentsByGate(self._run, edges_max=EDGES_MAX)
        return parents if parents.is_complete else None

    # --- the table

    def table(self) -> list[dict[str, Any]]:
        """Return the rows of the table."""
        wanted: dict[int, list[tuple[int, When]]] = {}
        for row in self.rows:
            if row.gate is not None and self._parents is not None and row.gate not in wanted:
                wanted[row.gate] = self._parents.of(row.gate)
        named = {pk for found in wanted.values() for pk, _when in found[:PARENTS_SHOWN]}
        steps = WorkflowStep.objects.using(self._using).filter(pk__in=named)
        names = dict(steps.values_list("pk", "name"))
        return [
            {
                "step": row,
                "status": _word(row.status),
                "url": self.url(row.pk),
                "parents": self._words(wanted.get(row.gate or 0, []), names),
                "took": span_of(row.duration),
            }
            for row in self.rows
        ]

    def _words(self, parents: Sequence[tuple[int, When]], names: dict[int, str]) -> str:
        words = [
            names.get(pk, "?") if when is When.SUCCESS else f"{names.get(pk, '?')} ({when})"
            for pk, when in parents[:PARENTS_SHOWN]
        ]
        more = len(parents) - len(words)
        return ", ".join(words) + (_(" and {count:,} more").format(count=more) if more else "")

    def url(self, pk: int) -> str:
        """Return where the page of a task is, for who may see it."""
        return reverse("admin:firefly_jobs_taskmodel_change", args=[pk]) if self._has_links else ""

    # --- the picture

    @property
    def is_summary(self) -> bool:
        """Whether the boxes of the picture stand for many steps."""
        return self.total > PICTURED_MAX

    def picture(self) -> SafeString:
        """Return the picture: of all steps, or a summary."""
        label = _("Workflow {name}: {done:,} of {total:,} steps have ended").format(
            name=self._run.name, done=self.done, total=self.total
        )
        if not self.is_summary:
            return draw(list(map(self._node, self.rows)), self._edges(), label=label)
        nodes, edges = self._summary()
        return draw(nodes, edges, label=label)

    def _node(self, row: Row) -> Node:
        took = f" · {span_of(row.duration)}" if row.duration is not None else ""
        return Node(
            id=row.pk,
            name=row.name,
            status=row.status,
            note=f"{_word(row.status)}{took}",
            hint="\n".join(part for part in (row.func_name, row.error) if part),
            href=self.url(row.pk),
            level=row.level,
        )

    def _edges(self) -> list[Edge]:
        parents = self._parents
        if parents is None:
            return []
        waiting = [(row.pk, row.gate) for row in self.rows if row.gate is not None]
        return [
            Edge(parent, child, when)
            for child, gate in waiting
            for parent, when in parents.of(gate)
        ]

    def _summary(self) -> tuple[list[Node], list[Edge]]:
        found = self._grouped()
        fold = next(
            (fold for fold in _FOLDS if len({fold(key) for key in found}) <= PICTURED_MAX), _to_one
        )
        groups: defaultdict[Group, Counter[str]] = defaultdict(Counter)
        for key, counts in found.items():
            groups[fold(key)].update(counts)
        keys = sorted(groups, key=lambda key: (-key.level, key.rank, key.func_name))
        places = {key: n for n, key in enumerate(keys)}
        ranks = {rank: n for n, rank in enumerate(sorted({key.rank for key in keys}))}
        nodes = [
            Node(
                id=n,
                name=_called(key, groups[key].total()),
                counts=groups[key],
                note=_told(groups[key]),
                hint=f"{_in_full(groups[key])}\n{key.func_name}",
                level=key.level,
                # Without arrows the depth tells what comes first.
                row=0 if self._parents else ranks[key.rank],
            )
            for key, n in places.items()
        ]
        edges = {
            Edge(places[fold(parent)], places[fold(child)], when)
            for parent, child, when in self._arrows()
            if fold(parent) in places and fold(child) in places
        }
        return nodes, sorted(edges, key=lambda edge: (edge.parent, edge.child, edge.when))

    def _grouped(self) -> dict[Group, Counter[str]]:
        """Return how many steps are in each state, by what they have in common."""
        if self.total > GROUPED_MAX:
            return {Group(0): self.counts}
        steps = WorkflowStep.objects.using(self._using).filter(workflow=self._run.pk)
        found: defaultdict[Group, Counter[str]] = defaultdict(Counter)
        rows = steps.order_by().values_list(*_GROUP, "task__status").annotate(count=Count("pk"))
        for level, rank, func_name, status, count in rows:
            found[_group(level, rank, func_name)][status] += count
        return found

    def _arrows(self) -> set[tuple[Group, Group, When]]:
        """Return which groups wait for which."""
        parents = self._parents
        if parents is None:
            return set()
        steps = WorkflowStep.objects.using(self._using).filter(workflow=self._run.pk)
        edges = WorkflowEdge.objects.using(self._using).filter(step__workflow=self._run.pk)
        told = edges.exclude(when=When.ENDED).order_by()
        before: defaultdict[int, set[tuple[Group, When]]] = defaultdict(set)
        names = [f"step__{name}" for name in _GROUP]
        for gate, when, *key in told.values_list("gate", "when", *names).distinct():
            before[gate].add((_group(*key), When(when)))
        waiting = steps.exclude(gate=None).order_by().values_list("gate", *_GROUP).distinct()
        return {
            (parent, _group(*key), when)
            for gate, *key in waiting
            for one in parents.gates_behind(gate)
            for parent, when in before[one]
        }


_COLUMNS = (
    *("pk", "step__name", "status", "step__priority", "step__gate"),
    Coalesce("step__is_forgiven", "step__ignore_result"),
    *("func_name", "duration", "started", "error"),
)
_GROUP = ("priority", "gate__rank", "task__func_name")


def _group(level: int, rank: int | None, func_name: str) -> Group:
    return Group(level, -1 if rank is None else rank, func_name)


def _by_function(key: Group) -> Group:
    return Group(key.level, func_name=key.func_name)


def _by_level(key: Group) -> Group:
    return Group(key.level)


def _to_one(_key: Group) -> Group:
    return Group(0)


_FOLDS: list[Callable[[Group], Group]] = [lambda key: key, _by_function, _by_level]


def _called(key: Group, count: int) -> str:
    if not key.func_name:
        return _("{count:,} steps").format(count=count)
    return f"{key.func_name.rpartition('.')[2]} \N{MULTIPLICATION SIGN} {count:,}"


def _told(counts: Counter[str]) -> str:
    """Return how many have ended and how many failed, in a few words."""
    done = sum(count for status, count in counts.items() if _has_ended(status))
    text = _("{done:,} of {total:,} ended").format(done=done, total=counts.total())
    failed = counts[Status.FAILED]
    return text + (_(", {count:,} failed").format(count=failed) if failed else "")


def _in_full(counts: Counter[str]) -> str:
    order: Iterable[str] = [*_ROW_ORDER, *sorted(s for s in counts if s not in Status.values)]
    return ", ".join(f"{counts[s]:,} {_word(s)}" for s in order if counts[s])


def _word(status: str) -> str:
    """Return a state in words; one of a later version as it stands there."""
    return str(Status(status).label) if status in Status.values else status


def _has_ended(status: str) -> bool:
    return status in Status.values and Status(status).is_terminal
