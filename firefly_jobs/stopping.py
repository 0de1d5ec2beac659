"""Hear the signals that ask a consumer to stop, whatever its main thread is doing.

A signal handler of Python's runs on the main thread, between two bytecodes: not while
that thread waits inside a driver for a server that is silent.  The wake-up descriptor
is written by the C-level handler itself, so a small thread that reads it hears every
signal at once (see ``signal.set_wakeup_fd`` in the Python manual).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger("firefly_jobs")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# The handlers from before any of ours, for the processes that a task forks.
_originals: dict[int, Any] = {}


def replace_handlers(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Let ``handler`` hear the signals here, but in no forked process; return the former ones."""
    former: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if not _originals:
        _originals.update(former)
    for number in STOP_SIGNALS:
        signal.signal(number, handler)
    return former


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if handlers == _originals:
        _originals.clear()


# A forked child has neither our threads nor a socket of its own: a signal to it would be
# heard by nobody, or here as one to the consumer.  So it gets the original handlers back,
# and no signal until it has them.
_masks = threading.local()


def _before_fork() -> None:
    if _originals:
        _masks.former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _after_fork() -> None:
    if (former := _masks.__dict__.pop("former", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _after_fork_in_child() -> None:
    if _originals:
        signal.set_wakeup_fd(-1)
        _restore(dict(_originals))
    _after_fork()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
)

# How long interrupted calls get to unwind before the process ends without them.
INTERRUPT_SECONDS = 2.0

# What a process may take beyond its shutdown timeout to interrupt, give back and unwind,
# before its supervisor ends it.
KILL_SECONDS = 20.0


@contextmanager
def stop_signals(
    stop: Callable[[], None], *, at_once: Callable[[], None] | None = None
) -> Iterator[None]:
    """Call ``stop`` at the first SIGTERM or SIGINT; end the process at the second.

    Args:
        stop: Called on a thread of its own.
        at_once: Called on it before the process ends at the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    listener = threading.Thread(
        target=_listen, args=(reader, stop, at_once), name="firefly-signals", daemon=True
    )
    listener.start()
    former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The handlers themselves do nothing; without them the process would simply end.
    former = replace_handlers(lambda *_: None)
    try:
        yield
    finally:
        _restore(former)
        signal.set_wakeup_fd(former_fd)
        # A process that a task forked may hold a copy, and closing ours would tell nobody.
        writer.shutdown(socket.SHUT_RDWR)
        writer.close()
        listener.join()
        reader.close()


def _listen(
    reader: socket.socket, stop: Callable[[], None], at_once: Callable[[], None] | None
) -> None:
    is_asked = False
    while received := reader.recv(1):
        number = received[0]
        if number not in STOP_SIGNALS:
            continue
        if is_asked:
            try:
                if at_once is not None:
                    at_once()
            finally:
                os._exit(1)
        is_asked = True
        stop()
        logger.info("Received %s", signal.Signals(number).name)
