"""Notice that code has changed, with the means of Django's autoreload.

Django's own ``run_with_reloader`` is not used: its outer process ends the inner one with
SIGKILL a quarter of a second after Ctrl-C, and running calls would be lost each time.
Here the files are watched on a thread of the supervised process; the consumer keeps the
main thread, and with it the signals, and stops in order before a fresh process starts.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from django.utils import autoreload

logger = logging.getLogger("firefly_jobs")


class CodeWatcher(threading.Thread):
    """Call ``on_change`` once when a file of a loaded module has changed.

    Args:
        on_change: Called on the watcher's thread.

    Attributes:
        has_changed: Whether it was called.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__(name="firefly-reload", daemon=True)
        self._on_change = on_change
        self.has_changed = False

    def run(self) -> None:
        """Watch until something changes."""
        reloader = autoreload.get_reloader()
        # Others add what they want to have watched, Django's templates for one.
        autoreload.autoreload_started.send(sender=reloader)
        try:
            for turn, _ in enumerate(reloader.tick()):
                if not turn:
                    logger.info("Watching for changes of code")
        except SystemExit:
            # So a reloader says that it has found a change.
            self.has_changed = True
            self._on_change()
