"""Run the hand-written loops as processes of their own, as our consumers are."""

from __future__ import annotations

import os
import subprocess
import sys

from . import tables
from .servers import ROOT, environment


def rate(url: str, *words: str, tasks: int, processes: int) -> float:
    """Return the jobs per second of ``processes`` loops over ``tasks`` jobs.

    Raises:
        RuntimeError: If one of them did not end well.
    """
    tables.fill_loop(tasks)
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.handwritten", *words],
            env=os.environ | environment(url),
            cwd=ROOT,
        )
        for _ in range(processes)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        message = f"a hand-written loop ended with {codes}"
        raise RuntimeError(message)
    return tables.rate(tables.LOOP_JOBS, tasks)
