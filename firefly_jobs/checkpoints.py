"""Named points in a task's life where a test may kill or stop this process.

Crash tests are generated from :data:`CHECKPOINTS`: the consumer under test is started
with ``FIREFLY_CHECKPOINT=settling:kill`` and sends itself that signal when it gets
there.  Without the variable a checkpoint is one dictionary look-up.

To add one: add its name here and call :func:`reach` at the place; the crash tests pick
it up by themselves.
"""

from __future__ import annotations

import os
import signal
import threading

CHECKPOINTS = (
    "claiming",  # before the claim is committed
    "claimed",  # the claim is committed, nothing has started
    "executing",  # inside the transaction, before the function is called
    "called",  # the function has returned, its effects are not committed
    "settling",  # the outcome is written but not committed
    "settled",  # the outcome is committed
)

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def _parse(text: str) -> dict[str, signal.Signals]:
    """Read ``NAME:ACTION[,NAME:ACTION]``; unknown words are a mistake in the test."""
    armed = {}
    for item in filter(None, text.split(",")):
        name, _, action = item.partition(":")
        if name not in CHECKPOINTS or action not in _SIGNALS:
            message = f"FIREFLY_CHECKPOINT: {item!r} is not NAME:kill or NAME:stop"
            raise ValueError(message)
        armed[name] = _SIGNALS[action]
    return armed


_armed = _parse(os.environ.get("FIREFLY_CHECKPOINT", ""))


def reach(name: str) -> None:
    """Send this process the armed signal, the first time checkpoint ``name`` is reached."""
    if _armed and name in _armed:
        # To this very thread: with kill() another one may take the signal first, and this
        # one would run on.
        signal.pthread_kill(threading.get_ident(), _armed.pop(name))
