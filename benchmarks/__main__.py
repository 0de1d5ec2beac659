"""``python -m benchmarks drain``: measure, print a table, or JSON."""

from __future__ import annotations

import argparse

from . import drain
from .servers import KINDS, database


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("benchmark", choices=["drain"], nargs="?", default="drain")
    parser.add_argument("--database", choices=KINDS, action="append", help="default: all three")
    parser.add_argument("--work", choices=["noop", "insert"], action="append")
    parser.add_argument("--tasks", type=int, default=0, help="default: 20000 noop, 3000 insert")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    found = []
    if not options.json:
        print(
            f"{'database':12}{'work':8}{'tasks':>8}{'ours/s':>10}{'loop/s':>10}{'ratio':>8}"
            f"{'loop 1 process/s':>19}"
        )
    for kind in options.database or KINDS:
        with database(kind) as url:
            for work in options.work or ["noop", "insert"]:
                tasks = options.tasks or {"noop": 20_000, "insert": 3_000}[work]
                one = drain.measure(kind, url, work=work, tasks=tasks, rounds=options.rounds)
                found.append(one)
                if not options.json:
                    print(
                        f"{one.database:12}{one.work:8}{one.tasks:>8}{one.ours:>10,.0f}"
                        f"{one.loop:>10,.0f}{one.ratio:>8.0%}{one.loop_one_process:>19,.0f}",
                        flush=True,
                    )
    if options.json:
        print(drain.as_json(found))


main()
