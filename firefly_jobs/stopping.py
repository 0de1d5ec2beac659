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

logger = logging.getLogger("firefly_jobs")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# How long interrupted calls get to unwind before the process ends without them.
INTERRUPT_SECONDS = 2.0


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` at the first SIGTERM or SIGINT; end the process at the second.

    Args:
        stop: Called on a thread of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    listener = threading.Thread(
        target=_listen, args=(reader, stop), name="firefly-signals", daemon=True
    )
    listener.start()
    former_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The handlers themselves do nothing; without them the process would simply end.
    former = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(former_fd)
        writer.close()
        listener.join()
        reader.close()


def _listen(reader: socket.socket, stop: Callable[[], None]) -> None:
    is_asked = False
    while received := reader.recv(1):
        number = received[0]
        if number not in STOP_SIGNALS:
            continue
        if is_asked:
            os._exit(1)
        is_asked = True
        stop()
        logger.info("Received %s", signal.Signals(number).name)
