"""The life of a supervised process: one consumer, and a pipe to the supervisor.

:func:`main` is the first of our code that runs in a fresh interpreter.  Nothing was
inherited, so it loads the project like a command does.  This module must not import
models at its top: it is imported before Django is set up.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from .control import PipeLink, Report, Stop, Watch, install_watch
from .stopping import KILL_SECONDS, STOP_SIGNALS, replace_handlers

if TYPE_CHECKING:
    from .consumer import Consumer
    from .reloading import CodeWatcher

logger = logging.getLogger("firefly_jobs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a supervisor tells a process at its start.

    Attributes:
        using: Database alias.
        consumer: Further arguments of ``Consumer``.
        shutdown_timeout: As the consumer's.
        verbosity: As of the command, for the log of a project that configures none.
        reloads: Whether to end when code changes, and ask for a restart.
    """

    using: str
    consumer: dict[str, Any]
    shutdown_timeout: float
    verbosity: int = 1
    reloads: bool = False


def main(pipe: Connection[Report, Stop], orders: Orders) -> None:
    """Run a consumer until it has ended, or the supervisor asks for it, or has died."""
    link = PipeLink(pipe)
    install_watch(Watch(link.send))
    stops = Stops()
    stops.hear_signals()
    threading.Thread(
        target=_await_stop, args=(link, stops, orders), name="firefly-control", daemon=True
    ).start()
    watcher = _code_watcher(stops) if orders.reloads else None
    consumer, code = None, 0
    try:
        _set_up(orders)
    except Exception:
        if watcher is None:
            raise
        # Its author is about to mend it.
        traceback.print_exc()
        watcher.start()
        stops.asked.wait()
    else:
        if watcher is not None:
            watcher.start()
        consumer, code = _consume(link, stops, orders)
    link.finished(code, wants_restart=watcher is not None and watcher.has_changed)
    if consumer is not None and consumer.has_stuck_calls:
        # A call blocked in C code would keep the process alive; see consume_tasks.
        logging.shutdown()
        os._exit(code)
    sys.exit(code)


class Stops:
    """The wish that this process stops, from before there is a consumer to be told."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._lock = threading.Lock()
        self._consumer: Consumer | None = None

    def stop(self) -> None:
        """Stop the consumer, now or as soon as there is one."""
        self.asked.set()
        with self._lock:
            if self._consumer is not None:
                self._consumer.stop()

    def pass_on_to(self, consumer: Consumer) -> None:
        """Let ``consumer`` be told."""
        with self._lock:
            self._consumer = consumer
        if self.asked.is_set():
            consumer.stop()

    def hear_signals(self) -> None:
        """Take signals from now on; the supervisor has held them back (see ``children``)."""
        # The main thread may be in stop() itself when one arrives, and hold its lock.
        replace_handlers(lambda *_: threading.Thread(target=self.stop).start())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _await_stop(link: PipeLink, stops: Stops, orders: Orders) -> None:
    if link.await_stop():
        stops.stop()
        return
    logger.warning("The supervisor has ended, so this process stops as well")
    stops.stop()
    # Nobody else is left who would end a process that does not come to its end.
    threading.Event().wait(orders.shutdown_timeout + KILL_SECONDS)
    os._exit(1)


def _code_watcher(stops: Stops) -> CodeWatcher:
    from .reloading import CodeWatcher  # noqa: PLC0415 - development only

    return CodeWatcher(stops.stop)


def _set_up(orders: Orders) -> None:
    """Load the project, as a command does."""
    import django  # noqa: PLC0415 - after this module
    from django.utils.autoreload import check_errors  # noqa: PLC0415 - likewise

    # So that a reloader knows of a file that could not even be imported.
    check_errors(django.setup)()
    from .autodiscovery import import_tasks  # noqa: PLC0415 - needs the apps
    from .reporting import log_to_stderr  # noqa: PLC0415 - likewise

    log_to_stderr(orders.verbosity)
    check_errors(import_tasks)()


def _consume(link: PipeLink, stops: Stops, orders: Orders) -> tuple[Consumer | None, int]:
    """Run a consumer; return it with its exit code."""
    from .consumer import Consumer  # noqa: PLC0415 - models, after Django is set up
    from .databases import leave_pools  # noqa: PLC0415 - likewise
    from .readiness import insist  # noqa: PLC0415 - likewise

    leave_pools()
    if not insist(orders.using, is_stopping=stops.asked.is_set, wait=stops.asked.wait):
        return None, 0
    consumer = Consumer(
        using=orders.using,
        shutdown_timeout=orders.shutdown_timeout,
        link=link,
        **orders.consumer,
    )
    stops.pass_on_to(consumer)
    return consumer, consumer.run()
