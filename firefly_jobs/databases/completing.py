"""The statements that complete a row, and count it off where other steps wait for it.

One part of :class:`~firefly_jobs.databases.base.Database`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

from firefly_jobs.attempts import Claim

from .functions import isolation_sql

TABLE = "firefly_jobs_taskmodel"
WORKFLOWS = "firefly_jobs_workflowmodel"
GATES = "firefly_jobs_workflowgate"
EDGES = "firefly_jobs_workflowedge"
STEPS = "firefly_jobs_workflowstep"
COUNTED = "waiting_for, is_unmet, is_cut_short, id, rank"
COUNT_OFF = (
    f"UPDATE {GATES} SET waiting_for = waiting_for - %s, is_unmet = (is_unmet OR %s) WHERE id = %s"  # noqa: S608 - only our own names are formatted in
)


class Completion(NamedTuple):
    """The settling of a task that returned: what the batched statement needs."""

    id: int
    fence: int
    duration: float
    returned: str
    is_limited: bool = False
    workflow: int | None = None
    schedule: int | None = None
    func_name: str = ""

    @classmethod
    def of(cls, claim: Claim, duration: float, returned: str) -> Self:
        """Return the settling of a claim whose call returned."""
        return cls(
            *(claim.id, claim.fence, duration, returned, claim.is_limited),
            *(claim.workflow, claim.schedule, claim.func_name),
        )

    @property
    def values(self) -> list[Any]:
        """What ``complete_sql`` takes."""
        return [self.duration, self.returned, self.id, self.fence]

    @property
    def lets_others_go(self) -> bool:
        """Whether its end is of consequence for other rows."""
        return self.is_limited or self.workflow is not None or self.schedule is not None


class Edge(NamedTuple):
    """That the end of a step counts at a gate.

    Attributes:
        step: The step's id.
        gate: The gate's id.
        rank: Of the gate.
        when: What is asked of the step.
        isolation: That of the open transaction, as ``Isolation`` tells it.
    """

    step: int
    gate: int
    rank: int
    when: str
    isolation: str


class Behind(NamedTuple):
    """What waits at a gate: a step, or, where that is ``None``, another gate with its rank."""

    gate: int
    step: int | None
    next_gate: int
    rank: int


class Counted(NamedTuple):
    """A gate at which something was counted off; it is locked until the transaction ends.

    Its id and its rank are told only if something follows.
    """

    waiting_for: int
    is_unmet: bool
    is_cut_short: bool
    id: int = 0
    rank: int = 0

    @property
    def is_of_no_consequence(self) -> bool:
        """Whether nothing follows from that yet."""
        return self.waiting_for != 0 and not self.is_cut_short

    @classmethod
    def of(cls, row: Sequence[Any] | None) -> Self | None:
        """Return what a statement says that returns ``COUNTED``."""
        if row is None or row[0] is None:
            return None
        return cls(int(row[0]), bool(row[1]), bool(row[2]), *row[3:])


class Completing:
    """Completing rows."""

    now: ClassVar[str] = ""

    def __init__(self) -> None:
        # None of these is a column of gates as well.
        self.completed = (
            f"status = 'completed', completed = {self.now}, failed = NULL, duration = %s, "
            f"returned = %s, error = '', active_key = NULL, limit_key = NULL"
        )
        self.complete_sql = (
            f"UPDATE {TABLE} SET {self.completed} "  # noqa: S608 - only our own names are formatted in
            f"WHERE id = %s AND status = 'running' AND fence = %s"
        )

    def complete(self, connection: Any, completion: Completion) -> bool:
        """Complete one row under its fence; return whether it was still held."""
        with connection.cursor() as cursor:
            cursor.execute(self.complete_sql, completion.values)
            return bool(cursor.rowcount == 1)

    def complete_many(self, connection: Any, completions: Sequence[Completion]) -> int:
        """Complete rows under their fences in one statement; return how many were held."""
        raise NotImplementedError

    def complete_step(self, connection: Any, completion: Completion) -> tuple[bool, Counted | None]:
        """Complete a step under its fence, and count it off if its row says where.

        Returns:
            Whether it was still held, and the one gate behind it; ``None`` if its edges have
            to be asked.
        """
        with connection.cursor() as cursor:
            cursor.execute(f"{self.complete_sql} RETURNING next_gate", completion.values)
            row = cursor.fetchone()
        if row is None or row[0] is None:
            return row is not None, None
        return True, self.count_off(connection, row[0], 1, is_unmet=False)

    # --- workflows

    def edges_behind(self, connection: Any, steps: Sequence[int]) -> list[Edge]:
        """Return where the ends of some steps count."""
        when = connection.ops.quote_name("when")
        # A word of its own in MySQL since window functions.
        rank = connection.ops.quote_name("rank")
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT e.step_id, e.gate_id, g.{rank}, e.{when}, {isolation_sql(connection)} "  # noqa: S608 - only our own names are formatted in
                f"FROM {EDGES} e JOIN {GATES} g ON g.id = e.gate_id "
                f"WHERE e.step_id IN ({', '.join(['%s'] * len(steps))})",
                list(steps),
            )
            return [Edge(*row) for row in cursor.fetchall()]

    def behind_gates(self, connection: Any, gates: Sequence[int]) -> list[Behind]:
        """Return what waits at some gates."""
        rank = connection.ops.quote_name("rank")
        ids = f"({', '.join(['%s'] * len(gates))})"
        with connection.cursor() as cursor:
            cursor.execute(
                f"SELECT gate_id, task_id, 0, 0 FROM {STEPS} WHERE gate_id IN {ids} UNION ALL "  # noqa: S608 - only our own names are formatted in
                f"SELECT e.source_id, NULL, g.id, g.{rank} FROM {EDGES} e "
                f"JOIN {GATES} g ON g.id = e.gate_id WHERE e.source_id IN {ids}",
                [*gates, *gates],
            )
            return [Behind(*row) for row in cursor.fetchall()]

    def count_off(
        self, connection: Any, gate: int, count: int, *, is_unmet: bool
    ) -> Counted | None:
        """Count ends off at a gate; return ``None`` if it is not there."""
        with connection.cursor() as cursor:
            cursor.execute(f"{COUNT_OFF} RETURNING {COUNTED}", [count, is_unmet, gate])
            return Counted.of(cursor.fetchone())
