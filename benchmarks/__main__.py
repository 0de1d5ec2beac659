"""Measure the queue beside hand-written code on the same server, in the same run.

``NAME`` measures one thing, ``all`` everything; ``table`` makes a Markdown table of what
``--json`` has written.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .catalogue import BENCHMARKS, BY_NAME, KINDS, Benchmark
from .figures import HEADINGS, Figure, as_markdown, line
from .servers import ROOT


@dataclass(slots=True)
class Findings:
    """What a run found, or several runs together; the later one counts."""

    machine: dict[str, str] = field(default_factory=dict)
    databases: dict[str, dict[str, str]] = field(default_factory=dict)
    figures: dict[tuple[str, str, str], Figure] = field(default_factory=dict)

    def add(self, figure: Figure) -> None:
        """Take a figure in, in place of a former one of the same thing."""
        self.figures[figure.benchmark, figure.database, figure.case] = figure

    def read(self, found: dict[str, Any]) -> None:
        """Take in what :meth:`as_json` gave."""
        self.machine = found["machine"]
        self.databases |= found["databases"]
        for figure in found["figures"]:
            self.add(Figure.from_json(figure))

    def as_json(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        return {
            "machine": self.machine,
            "databases": self.databases,
            "figures": [figure.as_json() for figure in self.figures.values()],
        }


def main() -> int:
    """Parse, measure, print; return the exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options = _parser().parse_args()
    if options.name == "table":
        _print_table(options.files)
        return 0
    findings = Findings()
    if not options.json:
        print(line(HEADINGS))
    for benchmark, kind, told in _chosen(options):
        try:
            _run(benchmark, kind, told, findings, is_silent=options.json)
        except subprocess.CalledProcessError as error:
            # The worker has said why.  What was found so far is worth more than nothing.
            print(f"{benchmark.name} on {kind} ended with {error.returncode}", file=sys.stderr)
            findings.figures.setdefault((benchmark.name, kind, ""), _broken(benchmark, kind))
    if options.json:
        print(json.dumps(findings.as_json(), indent=2))
    return int(any(_is_error(figure) for figure in findings.figures.values()))


def _chosen(options: argparse.Namespace) -> Iterator[tuple[Benchmark, str, dict[str, Any]]]:
    if options.name == "all":
        benchmarks = [one for one in BENCHMARKS if one.name not in (options.without or ())]
    else:
        benchmarks = [BY_NAME[options.name]]
    for benchmark in benchmarks:
        told = {
            "rounds": options.rounds or benchmark.rounds,
            "sizes": {
                name: getattr(options, name, size.default) for name, size in benchmark.sizes.items()
            },
        }
        for kind in options.database or benchmark.databases:
            if kind in benchmark.databases:
                yield benchmark, kind, told


def _run(
    benchmark: Benchmark, kind: str, told: dict[str, Any], findings: Findings, *, is_silent: bool
) -> None:
    command = ["-m", "benchmarks.worker", benchmark.name, kind, json.dumps(told)]
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        try:
            for text in worker.stdout:
                _take(json.loads(text), findings, is_silent=is_silent)
        except BaseException:
            worker.terminate()
            raise
    if worker.returncode:
        raise subprocess.CalledProcessError(worker.returncode, worker.args)


def _take(told: dict[str, Any], findings: Findings, *, is_silent: bool) -> None:
    findings.machine |= told.get("machine", {})
    findings.databases |= told.get("databases", {})
    if "figure" in told:
        figure = Figure.from_json(told["figure"])
        findings.add(figure)
        if not is_silent:
            print(figure.as_line(), flush=True)
            for name, value in figure.details.items():
                print(f"    {name}: {value}", flush=True)


def _broken(benchmark: Benchmark, kind: str) -> Figure:
    return Figure(
        benchmark=benchmark.name, database=kind, case="", unit="broken", value=1, details={}
    )


def _is_error(figure: Figure) -> bool:
    is_missed = BY_NAME[figure.benchmark].is_strict and figure.is_reached is False
    return is_missed or figure.unit == "broken"


def _print_table(files: list[Path]) -> None:
    from .machine import describe  # noqa: PLC0415 - printing a table takes no Django else

    findings = Findings()
    for file in files:
        findings.read(json.loads(file.read_text(encoding="utf-8")))
    print(describe(findings.machine, findings.databases))
    print()
    print(as_markdown(findings.figures.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        command = names.add_parser(benchmark.name, help=benchmark.help)
        _add_common(command, benchmark.databases, f"{benchmark.rounds}")
        for name, size in benchmark.sizes.items():
            command.add_argument(
                f"--{name}",
                type=type(size.default),
                default=size.default,
                metavar="N",
                help=f"{size.help} (default: %(default)s)",
            )
    everything = names.add_parser("all", help="all of them, with their default sizes")
    _add_common(everything, KINDS, "as each has")
    everything.add_argument("--without", action="append", choices=sorted(BY_NAME), metavar="NAME")
    table = names.add_parser("table", help="a Markdown table of what --json has written")
    table.add_argument("files", nargs="+", type=Path, metavar="FILE")
    return parser


def _add_common(command: argparse.ArgumentParser, databases: tuple[str, ...], rounds: str) -> None:
    command.add_argument(
        "--database", action="append", choices=databases, help="repeatable; default: all"
    )
    command.add_argument("--rounds", type=int, metavar="N", help=f"(default: {rounds})")
    command.add_argument("--json", action="store_true", help="print JSON at the end instead")


sys.exit(main())
