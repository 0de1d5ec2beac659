"""The graph of a workflow: checked, and turned into gates that its steps wait at.

A step waits at one *gate*, a counter of what still has to end.  Steps with the same parents
share a gate, so a thousand steps behind one cost one counter.  A gate may be a source of
other gates: that is how a level of priorities waits for the one above it with one gate
instead of a million edges, and how a step with very many parents has a tree of counters, so
that those who end at the same time do not queue for one row.

A gate's *rank* is how far it is from the start: whatever opens because of it has a higher
one.  Whoever locks gates by rank meets nobody in a deadlock.

Pure functions; ``workflows`` collects the steps, ``dependencies`` moves the counters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import isqrt
from random import Random

from .conf import suggestion
from .exceptions import WorkflowError
from .states import Status

# A gate with more steps before it than this gets a tree of counters.
FAN_IN_MAX = 32
# The rank of the gate at which the workflow itself ends: nothing opens because of it.
END_RANK = 2**31 - 1


class When(StrEnum):
    """What has to become of a step for another one to run."""

    SUCCESS = "success"
    FAILURE = "failure"
    ALWAYS = "always"
    # Order only: another level of priority, or the end of the workflow.
    ENDED = "ended"

    @classmethod
    def from_word(cls, word: str) -> When:
        """Return the condition that people call ``word``.

        Raises:
            ValueError: If there is none.
        """
        known = [w.value for w in cls if w is not cls.ENDED]
        if word not in known:
            hint = suggestion(str(word), known)
            message = f"when must be one of {', '.join(known)}, got {word!r}.{hint}"
            raise ValueError(message)
        return cls(word)

    def is_met(self, status: Status, *, is_ignored: bool) -> bool:
        """Whether a step that ended like this lets the other one run.

        Args:
            status: How it ended.
            is_ignored: Whether its failure was declared not to matter.
        """
        if self is When.SUCCESS:
            return status is Status.COMPLETED or (status is Status.FAILED and is_ignored)
        if self is When.FAILURE:
            return status is Status.FAILED
        return True


@dataclass(frozen=True, slots=True)
class Dependency:
    """That a step waits for another one, by its place in the workflow."""

    parent: int
    when: When = When.SUCCESS


@dataclass(frozen=True, slots=True)
class Node:
    """A step, as far as the order of things goes.

    Attributes:
        name: What messages call it.
        priority: Its level: it waits for all steps of a higher one.
        parents: What else it waits for.
    """

    name: str
    priority: int = 0
    parents: tuple[Dependency, ...] = ()


@dataclass(slots=True)
class Gate:
    """A counter, and what it counts: the ends of steps, and the opening of other gates.

    Attributes:
        steps: The steps, and what is asked of them.
        gates: The other gates, by their numbers.
        rank: How far it is from the start.
    """

    steps: list[Dependency] = field(default_factory=list)
    gates: list[int] = field(default_factory=list)
    rank: int = 0

    @property
    def count(self) -> int:
        """How many ends it waits for at first."""
        return len(self.steps) + len(self.gates)


@dataclass(frozen=True, slots=True)
class Plan:
    """The gates of a workflow.

    Attributes:
        gates: In order of rank, so that sources come before what they open; the last one is
            the end of the workflow.
        places: The gate that each step waits at; ``None``: it need not wait.
    """

    gates: list[Gate]
    places: list[int | None]


def plan(nodes: Sequence[Node]) -> Plan:
    """Return the gates of a workflow.

    Args:
        nodes: Its steps, in order of their places.

    Raises:
        WorkflowError: If there is none, or they wait for each other in a circle.
    """
    if not nodes:
        message = "A workflow needs at least one step; add some before it is scheduled."
        raise WorkflowError(message)
    _refuse_cycles(nodes)
    drawing = _Drawing(nodes)
    return drawing.numbered()


class _Drawing:
    """The gates while they are drawn, in any order."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self._gates: list[Gate] = []
        self._places: list[int | None] = [None] * len(nodes)
        self._draw()

    def _draw(self) -> None:
        barriers = self._draw_barriers()
        shared: dict[tuple[tuple[Dependency, ...], int], int | None] = {}
        for place, node in enumerate(self._nodes):
            barrier = barriers[node.priority]
            key = (tuple(sorted(node.parents, key=_by_parent)), node.priority)
            if key not in shared:
                shared[key] = self._gate(key[0], barrier) if key[0] else barrier
            self._places[place] = shared[key]
        waited_for = {d.parent for gate in self._gates for d in gate.steps}
        leaves = [n for n in range(len(self._nodes)) if n not in waited_for]
        self._gate([Dependency(n, When.ENDED) for n in leaves], None)

    def _draw_barriers(self) -> dict[int, int | None]:
        """Draw a gate before every level of priority but the highest."""
        levels: defaultdict[int, list[int]] = defaultdict(list)
        for place, node in enumerate(self._nodes):
            levels[node.priority].append(place)
        barriers: dict[int, int | None] = {}
        barrier: int | None = None
        above: list[int] = []
        for priority in sorted(levels, reverse=True):
            if above:
                barrier = self._gate([Dependency(n, When.ENDED) for n in above], barrier)
            barriers[priority], above = barrier, levels[priority]
        return barriers

    def _gate(self, steps: Sequence[Dependency], before: int | None) -> int:
        """Draw a gate behind ``steps`` and another gate; return its number."""
        gate = Gate(gates=[] if before is None else [before])
        if len(steps) <= FAN_IN_MAX:
            gate.steps = list(steps)
        else:
            # Neighbours often end together, so they go to different counters; and in no order,
            # or two consumers that have met at one would meet at each that follows, in step.
            shuffled = list(steps)
            Random(len(steps)).shuffle(shuffled)  # noqa: S311 - no secret
            width = isqrt(len(steps) - 1) + 1
            for n in range(width):
                if part := shuffled[n::width]:
                    self._gates.append(Gate(steps=part))
                    gate.gates.append(len(self._gates) - 1)
        self._gates.append(gate)
        return len(self._gates) - 1

    def numbered(self) -> Plan:
        """Return the gates in order of how far they are from the start."""
        ranks: dict[int, int] = {}
        end = len(self._gates) - 1

        def before(gate: int) -> list[int]:
            behind = [self._places[d.parent] for d in self._gates[gate].steps]
            return [n for n in (*behind, *self._gates[gate].gates) if n is not None]

        for gate in _sources_first(range(len(self._gates)), before):
            ranks[gate] = 1 + max((ranks[n] for n in before(gate)), default=-1)
        ranks[end] = END_RANK
        order = sorted(range(len(self._gates)), key=lambda n: (ranks[n], n))
        numbers = {old: new for new, old in enumerate(order)}
        gates = [
            Gate(
                steps=self._gates[old].steps,
                gates=[numbers[n] for n in self._gates[old].gates],
                rank=ranks[old],
            )
            for old in order
        ]
        return Plan(gates, [None if n is None else numbers[n] for n in self._places])


def _by_parent(dependency: Dependency) -> tuple[int, str]:
    return dependency.parent, dependency.when


def _sources_first(nodes: Iterable[int], before: Callable[[int], list[int]]) -> list[int]:
    """Return ``nodes`` such that each follows what ``before`` says comes before it."""
    done: dict[int, None] = {}
    for start in nodes:
        stack = [(start, False)]
        while stack:
            node, is_ready = stack.pop()
            if node in done:
                continue
            if is_ready:
                done[node] = None
            else:
                stack.append((node, True))
                stack += [(n, False) for n in before(node) if n not in done]
    return list(done)


# --- circles


def _refuse_cycles(nodes: Sequence[Node]) -> None:
    """Raise ``WorkflowError`` if steps wait for each other; the message names them in order."""
    for node in nodes:
        for dependency in node.parents:
            parent = nodes[dependency.parent]
            if parent.priority < node.priority:
                message = (
                    f"Step {node.name!r} (priority {node.priority}) depends on {parent.name!r} "
                    f"(priority {parent.priority}), which waits for every step with a higher "
                    f"priority: a circle. Give {parent.name!r} at least priority {node.priority}."
                )
                raise WorkflowError(message)
    if circle := _circle(nodes):
        names = " -> ".join(repr(nodes[n].name) for n in [*circle, circle[0]])
        message = f"These steps wait for each other in a circle, so none could start: {names}."
        raise WorkflowError(message)


def _circle(nodes: Sequence[Node]) -> list[int]:
    """Return the places of steps that form a circle, each waiting for the next; or nothing."""
    # What is left once all steps whose parents have gone are taken away waits in circles, or
    # behind them; from any of those, parent after parent, a circle is reached.
    waiting = {n: {d.parent for d in node.parents} for n, node in enumerate(nodes)}
    children: defaultdict[int, list[int]] = defaultdict(list)
    for n, parents in waiting.items():
        for parent in parents:
            children[parent].append(n)
    free = [n for n, parents in waiting.items() if not parents]
    while free:
        gone = free.pop()
        del waiting[gone]
        for child in children[gone]:
            waiting[child].discard(gone)
            if not waiting[child]:
                free.append(child)
    if not waiting:
        return []
    path: dict[int, None] = {}
    n = min(waiting)
    while n not in path:
        path[n] = None
        n = min(waiting[n])
    circle = list(path)
    return circle[circle.index(n) :]
