"""What ends the dispatcher's waiting: anybody may ring, it waits until somebody does."""

from __future__ import annotations

from queue import Empty, SimpleQueue


class Bell:
    """Many rings before one :meth:`wait` are heard as one."""

    def __init__(self) -> None:
        # Its put() may be called from a signal handler, which an Event's set() may not.
        self._rings: SimpleQueue[None] = SimpleQueue()
        self._is_ringing = False

    def ring(self) -> None:
        """End the waiting, now or next time; from any thread."""
        if not self._is_ringing:
            self._is_ringing = True
            self._rings.put(None)

    def wait(self, seconds: float) -> bool:
        """Wait for so long, or until it rings; return which."""
        try:
            self._rings.get(block=seconds > 0, timeout=max(seconds, 0.0))
        except Empty:
            return False
        self._is_ringing = False
        return True
