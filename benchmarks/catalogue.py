"""Which benchmarks there are, on which databases, and how large they are unless told otherwise.

Nothing here needs Django, so that the command line can be read before a database is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

KINDS = ("postgresql", "mariadb", "sqlite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A number that an option changes, ``--tasks`` for example; ``help`` explains it."""

    default: float
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One word after ``python -m benchmarks``.

    Attributes:
        module: The module of this package whose ``measure`` does it.
        rounds: How often it is measured; medians are shown.
        is_strict: Whether a mark that is not met is an error, and not a finding.
        is_private: Whether it wants a server to itself, to restart it or to count for it.
    """

    name: str
    module: str
    help: str
    sizes: Mapping[str, Size] = field(default_factory=dict)
    databases: tuple[str, ...] = KINDS
    rounds: int = 3
    is_strict: bool = False
    is_private: bool = False


_PROCESSES = Size(default=2, help="processes, of ours and of the loop; SQLite: 1")
_ONE_PROCESS = Size(default=1, help="consumer processes")

BENCHMARKS = (
    Benchmark(
        name="enqueue",
        module="enqueue",
        help="schedules per second of one task, beside Model.objects.create of the same row",
        sizes={"tasks": Size(default=2_000, help="rows of each kind per round")},
    ),
    Benchmark(
        name="bulk",
        module="bulk",
        help="rows per second of many at once, beside a raw INSERT of many rows, or COPY",
        sizes={"tasks": Size(default=20_000, help="rows per round")},
    ),
    Benchmark(
        name="drain",
        module="drain",
        help="tasks per second that do nothing, beside a hand-written SQL loop",
        sizes={
            "tasks": Size(default=20_000, help="due tasks per round"),
            "processes": _PROCESSES,
            "threads": Size(default=1, help="sync lanes of each of our processes"),
        },
    ),
    Benchmark(
        name="drain-db",
        module="drain_db",
        help="tasks per second that insert a row, beside a hand-written loop with the ORM",
        sizes={
            "tasks": Size(default=6_000, help="due tasks per round"),
            "processes": _PROCESSES,
            "threads": Size(default=4, help="threads of each process, of ours and of the loop"),
        },
    ),
    Benchmark(
        name="drain-group",
        module="drain_group",
        help="the same with group commit, beside our own figure without",
        sizes={
            "tasks": Size(default=6_000, help="due tasks per round"),
            "processes": _PROCESSES,
            "threads": Size(default=1, help="sync lanes of each process"),
        },
    ),
    Benchmark(
        name="workflow",
        module="workflow",
        help="steps that insert a row between a first and a last one, beside the same calls alone",
        sizes={
            "tasks": Size(default=1_002, help="steps, the first and the last among them"),
            "processes": _PROCESSES,
            "threads": Size(default=4, help="sync lanes of each process"),
        },
    ),
    Benchmark(
        name="latency",
        module="latency",
        help="from the commit of a schedule to the start of the call, beside one SELECT 1",
        sizes={"tasks": Size(default=300, help="schedules per round, 20 to 120 ms apart")},
    ),
    Benchmark(
        name="backlog",
        module="backlog",
        help="the first tasks of few and of very many rows, beside those of few",
        sizes={
            "rows": Size(default=1_000_000, help="rows of a large table"),
            "tasks": Size(default=2_000, help="tasks that are timed"),
            "processes": _ONE_PROCESS,
        },
        rounds=5,
    ),
    Benchmark(
        name="idle",
        module="idle",
        help="statements per second and CPU share of a consumer with nothing to do",
        sizes={"seconds": Size(default=60, help="how long it is watched")},
        rounds=1,
        is_private=True,
    ),
    Benchmark(
        name="async",
        module="coroutines",
        help="coroutines that sleep for a second, all at once, beside bare asyncio.gather",
        sizes={"tasks": Size(default=10_000, help="coroutines, and async slots")},
        rounds=1,
    ),
    Benchmark(
        name="memory",
        module="memory",
        help="by how much a consumer grows over many tasks",
        sizes={"tasks": Size(default=100_000, help="tasks after a tenth of that to warm up")},
        rounds=1,
    ),
    Benchmark(
        name="chaos",
        module="chaos",
        help="mixed load while consumers are killed and the server restarts: effects exactly once",
        sizes={
            "seconds": Size(default=600, help="how long tasks are scheduled"),
            "tasks": Size(default=30_000, help="tasks at most"),
            "consumers": Size(default=4, help="consumers at a time"),
            "restarts": Size(default=2, help="restarts of a server that this run started"),
        },
        rounds=1,
        is_strict=True,
        is_private=True,
    ),
    Benchmark(
        name="workflow-chaos",
        module="workflow_chaos",
        help="workflows while a consumer is killed each second, and siblings that end together",
        sizes={
            "seconds": Size(default=60, help="how long workflows are scheduled, twice"),
            "consumers": Size(default=4, help="consumers at a time while some are killed"),
        },
        rounds=1,
        is_strict=True,
    ),
    Benchmark(
        name="schedule-chaos",
        module="schedule_chaos",
        help="schedules of every second while a consumer is killed each second: each fires once",
        sizes={
            "seconds": Size(default=60, help="from the first to the last occurrence"),
            "schedules": Size(default=20, help="how many"),
            "consumers": Size(default=4, help="consumers at a time"),
        },
        rounds=1,
        is_strict=True,
    ),
)

BY_NAME = {benchmark.name: benchmark for benchmark in BENCHMARKS}
