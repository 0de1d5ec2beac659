"""Named points in a task's life where a test may kill or stop this process.

Crash tests are generated from :data:`CHECKPOINTS`: the consumer under test is started
with ``FIREFLY_CHECKPOINT=settling:kill`` and sends itself that signal when it gets
there; ``settling:kill:5`` waits for the fifth time.  Without the variable a checkpoint is
one dictionary look-up.

To add one: add its name here and call :func:`reach` at the place; the crash tests pick
it up by themselves.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

CHECKPOINTS = (
    "claiming",  # before the claim is committed
    "claimed",  # the claim is committed, nothing has started
    "executing",  # inside the transaction, before the function is called
    "called",  # the function has returned, its effects are not committed
    "settling",  # the outcome is written but not committed
    "settled",  # the outcome is committed
)
# Those of schedules.
FIRING_CHECKPOINTS = (
    "firing",  # the calls are written and next_run is moved, but not committed
    "fired",  # both are committed
)

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(text: str) -> dict[str, tuple[signal.Signals, Iterator[int]]]:
    """Read ``NAME:ACTION[:COUNT]``, several with commas; else it is a mistake in the test."""
    armed = {}
    for item in filter(None, text.split(",")):
        name, _, rest = item.partition(":")
        action, _, count = rest.partition(":")
        if (
            name not in (*CHECKPOINTS, *FIRING_CHECKPOINTS)
            or action not in _SIGNALS
            or not (count or "1").isdigit()
        ):
            message = f"FIREFLY_CHECKPOINT: {item!r} is not NAME:kill or NAME:stop, with :COUNT"
            raise ValueError(message)
        # Counting down by an iterator is atomic under threads.
        armed[name] = _SIGNALS[action], iter(range(int(count or 1) - 1, -1, -1))
    return armed


_armed = _parse(os.environ.get("FIREFLY_CHECKPOINT", ""))


def reach(name: str) -> None:
    """Send this process the armed signal, once ``name`` was reached as often as was said."""
    if _armed and name in _armed:
        number, left = _armed[name]
        if next(left, None) == 0:
            # To this very thread: with kill() another one may take the signal first, and this
            # one would run on.
            signal.pthread_kill(threading.get_ident(), number)
