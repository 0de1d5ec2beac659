"""Measure one benchmark on one database: ``python -m benchmarks.worker NAME KIND OPTIONS``.

It makes the database, sets Django up for it, and prints a line of JSON for each thing that
it found.  ``OPTIONS`` is JSON as well; ``__main__`` writes it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module
from typing import Any

import django
from django.db import connections

from .catalogue import BY_NAME
from .run import Run
from .servers import Place, database, environment, private_database


def main(name: str, kind: str, options: dict[str, Any]) -> None:
    """Make the place, measure there, and print."""
    benchmark = BY_NAME[name]
    make = private_database if benchmark.is_private else database
    with make(kind) as place:
        os.environ.update(environment(place.url))
        django.setup()
        try:
            _measure(benchmark.module, Run(name=name, place=place, **options), place)
        finally:
            connections.close_all()


def _measure(module: str, run: Run, place: Place) -> None:
    # Its tables and tasks can be imported only now.
    from .machine import database_facts, machine_facts  # noqa: PLC0415 - needs django.setup()

    _tell("machine", machine_facts())
    if place.server is None:
        # One that we started is set up for tests; no rate is measured on it.
        _tell("databases", {place.kind: database_facts()})
    for figure in import_module(f"benchmarks.{module}").measure(run):
        _tell("figure", figure.as_json())


def _tell(what: str, content: dict[str, Any]) -> None:
    print(json.dumps({what: content}), flush=True)


if __name__ == "__main__":
    # What was started is ended on the way out, and the database dropped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
