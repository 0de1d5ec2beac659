"""A supervised process as its supervisor sees it: start it, hear it, ask it, end it.

It is spawned, not forked, so it inherits nothing: no connection, no thread, no lock.
"""

from __future__ import annotations

import logging
import signal
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import monotonic

from .attempts import Verdict
from .control import Began, Finished, Over, Registered, Report, Retiring, Stop
from .exceptions import MemoryLimitExceeded, TimeLimitExceeded
from .memory import resident_bytes
from .stopping import KILL_SECONDS, STOP_SIGNALS
from .supervised import Orders, main

logger = logging.getLogger("firefly_jobs")

# An id is new only after the former one was rescued; its rows are somebody else's by then.
CONSUMERS_MAX = 5
# How long a process may take to end once it has said that it is about to.
LINGER_SECONDS = 10.0
# How long a process gets that keeps more memory than a call may: an exception is raised
# inside the call meanwhile.  No time at all beyond so many times as much.
MEMORY_GRACE_SECONDS = 2.0
MEMORY_RATIO_MAX = 1.5


class Child:
    """One process, from its start to its end.

    Args:
        orders: What it is told.

    Attributes:
        consumers: The ids it has claimed under, the latest last.
        retires_because: Why it claims no more, once it has said so.
        finished: What it said last; ``None`` if it has not ended in order.
        verdict: Why it was ended by :meth:`condemn`.
        kill_at: When it must have ended, by the monotonic clock.
    """

    def __init__(self, orders: Orders) -> None:
        context = get_context("spawn")
        self._pipe: Connection[Stop, Report]
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, orders), name="firefly-consumer")
        # Until it has handlers of its own, a signal to the whole group has to wait; this
        # thread's mask is the one thing that it does inherit.
        former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process.start()
        except BaseException:
            self._pipe.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, former)
            theirs.close()
        self._shutdown_timeout = orders.shutdown_timeout
        self._is_silent = self._is_asked = False
        self._limits: dict[tuple[int, int], tuple[Began, float]] = {}
        # Since when the process keeps more memory than these calls may.
        self._outgrown: dict[tuple[int, int], float] = {}
        self.started_at = monotonic()
        self.pid = self._process.pid or 0
        self.consumers: list[int] = []
        self.retires_because: str | None = None
        self.finished: Finished | None = None
        self.verdict: Verdict | None = None
        self.kill_at: float | None = None

    def __str__(self) -> str:
        return str(self.pid)

    # --- hearing it

    @property
    def pipe(self) -> Connection[Stop, Report] | None:
        """What becomes readable when it reports; ``None`` once it has closed its end."""
        return None if self._is_silent else self._pipe

    def receive(self) -> None:
        """Take in everything it has reported."""
        try:
            while not self._is_silent and self._pipe.poll():
                self._take(self._pipe.recv())
        except (EOFError, OSError):
            self._is_silent = True

    def _take(self, report: Report) -> None:
        match report:
            case Registered(consumer):
                self.consumers = [*self.consumers, consumer][-CONSUMERS_MAX:]
            case Retiring(reason):
                self.retires_because = reason
            case Began(task_id, fence):
                self._limits[task_id, fence] = report, monotonic()
            case Over(task_id, fence):
                self._limits.pop((task_id, fence), None)
                self._outgrown.pop((task_id, fence), None)
            case Finished():
                self.finished = report
                self._limits.clear()
                self._must_end_within(LINGER_SECONDS)

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.exitcode is not None

    @property
    def ended_by(self) -> str:
        """What ended it, for people."""
        code = self._process.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    # --- limits

    @property
    def next_deadline(self) -> float | None:
        """When the next watched call has to be over."""
        deadlines = [b.deadline for b, _ in self._limits.values() if b.deadline is not None]
        return min(deadlines, default=None)

    @property
    def has_memory_limit(self) -> bool:
        """Whether its size has to be looked at."""
        return any(began.memory_bytes is not None for began, _ in self._limits.values())

    def judge(self, now: float) -> Verdict | None:
        """Return which of its calls has exceeded a limit, if one has."""
        resident = resident_bytes(self.pid) if self.has_memory_limit else None
        for began, since in self._limits.values():
            error: Exception | None = None
            seconds = now - since
            if began.deadline is not None and now >= began.deadline:
                error = TimeLimitExceeded(f"It was still running after {seconds:.1f}s.")
            elif resident and self._has_outgrown(began, resident, now):
                error = MemoryLimitExceeded(
                    f"Its process kept {resident} bytes, and it may have {began.memory_bytes}."
                )
            if error is not None:
                return Verdict(
                    task_id=began.task_id, fence=began.fence, error=error, duration=seconds
                )
        return None

    def _has_outgrown(self, began: Began, resident: int, now: float) -> bool:
        """Whether the process keeps far more memory than a call may, or more for too long."""
        key, limit = (began.task_id, began.fence), began.memory_bytes
        if limit is None or resident <= limit:
            self._outgrown.pop(key, None)
            return False
        since = self._outgrown.setdefault(key, now)
        return resident > limit * MEMORY_RATIO_MAX or now - since >= MEMORY_GRACE_SECONDS

    def condemn(self, verdict: Verdict) -> None:
        """End it because of one of its calls."""
        self.verdict = verdict
        self._limits.clear()
        self.kill()

    # --- ending it

    def ask_to_stop(self) -> None:
        """Ask it to stop in order, once, and give it the time that this may take."""
        if self._is_asked:
            return
        self._is_asked = True
        self._must_end_within(self._shutdown_timeout + KILL_SECONDS)
        try:
            self._pipe.send(Stop())
        except OSError:
            logger.debug("Process %s could not be asked to stop", self)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def close(self) -> None:
        """Let go of it; a process that still runs takes that for its supervisor's death."""
        self._pipe.close()

    def _must_end_within(self, seconds: float) -> None:
        at = monotonic() + seconds
        self.kill_at = at if self.kill_at is None else min(at, self.kill_at)
