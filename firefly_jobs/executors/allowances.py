"""Hold calls to what they may take: time and memory.

A limit is enforced twice.  The thread here raises an exception *inside* a call that goes
beyond it, so that the call can clean up, its neighbours notice nothing, and its history
shows where it stood.  A call that does not hear that, because it is blocked in C code or
swallows the exception, is ended by the supervisor, with its process (``control.Watch``);
without a supervisor nobody can.

Time counts from the moment before the arguments are read to that at which the function
has returned, whatever it waited for.  Memory is that of the whole process: nobody can
tell whose it is.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from time import monotonic

from django.db import Error

from firefly_jobs import registry
from firefly_jobs.attempts import Claim
from firefly_jobs.conf import get_settings
from firefly_jobs.control import current_watch
from firefly_jobs.exceptions import MemoryLimitExceeded, TimeLimitExceeded
from firefly_jobs.memory import resident_bytes
from firefly_jobs.reporting import log_fields

logger = logging.getLogger("firefly_jobs")

MEMORY_POLL_SECONDS = 0.2
# A call that goes on gets its exception again: first when a supervisor would have ended it,
# then later and later.
PAUSE_SECONDS_MIN, PAUSE_SECONDS_MAX = 0.5, 10.0
_NEVER = float("inf")

# Raises an exception of that class inside the call.
Stop = Callable[[type[Exception]], object]


class Allowance:
    """What one call may take, and whether it has taken more.

    Args:
        claim: Whose call.
        stop: Called on the thread of ``Allowances`` once it has.
        release: Called when the call is over.
        pause_seconds: How long it gets to clean up before it is stopped again.

    Attributes:
        error: What it has exceeded.
        looks_at: When that has to be asked again, by the monotonic clock.
    """

    def __init__(
        self,
        claim: Claim,
        stop: Stop,
        *,
        release: Callable[[Allowance], None],
        pause_seconds: float,
    ) -> None:
        now = monotonic()
        self.claim = claim
        self.stop = stop
        self.error: Exception | None = None
        self.ends_at = _NEVER if claim.time_limit is None else now + claim.time_limit
        self.looks_at = self._next_look(now)
        self._release = release
        self._pause = pause_seconds

    def end(self) -> None:
        """Take note that the call is over; may be called twice."""
        self._release(self)

    def blame(self, raised: BaseException) -> BaseException:
        """Return what the call failed with, if it raised ``raised``.

        That is the limit if it let our exception pass, or broke over what came with it: its
        cancellation, or the end of its query.  What it raised by itself is left alone.
        """
        error = self.error
        if error is None:
            return raised
        if type(raised) is type(error):
            # It was raised from another thread, which could tell its class only.
            raised.args = error.args
        elif isinstance(raised, asyncio.CancelledError | Error):
            error.__cause__ = raised
            return error
        return raised

    # --- the watching thread's side

    def overrun(self, now: float, resident: int | None) -> Exception | None:
        """Return what to stop the call with now, if anything."""
        if now < self.looks_at:
            return None
        if self.error is None:
            self.error = self._find_error(now, resident)
        if self.error is None:
            self.looks_at = self._next_look(now)
        else:
            self.looks_at = now + self._pause
            self._pause = min(self._pause * 2, max(self._pause, PAUSE_SECONDS_MAX))
        return self.error

    def _find_error(self, now: float, resident: int | None) -> Exception | None:
        limit = self.claim.memory_limit
        if now >= self.ends_at:
            return TimeLimitExceeded(f"It ran for more than {self.claim.time_limit:g}s.")
        if limit is not None and resident is not None and resident > limit:
            return MemoryLimitExceeded(
                f"Its process kept {resident} bytes, and it may have {limit}."
            )
        return None

    def _next_look(self, now: float) -> float:
        if self.claim.memory_limit is None:
            return self.ends_at
        return min(self.ends_at, now + MEMORY_POLL_SECONDS)


class Allowances:
    """The bounded calls of one consumer; a thread watches them, from the first one on.

    Args:
        on_outgrown: Called, on that thread, when a call has exceeded its memory.
    """

    def __init__(self, *, on_outgrown: Callable[[], None]) -> None:
        self._on_outgrown = on_outgrown
        self._grace_seconds = get_settings().TIME_LIMIT_GRACE
        self._changed = threading.Condition()
        # In order of their beginning.
        self._held: dict[Allowance, None] = {}
        self._looks_at = _NEVER
        self._thread: threading.Thread | None = None
        self._is_over = False
        self._has_warned = current_watch().is_enforced

    def warn_if_unsupervised(self) -> None:
        """Say at the start what cannot be enforced here, if a task of this process needs it."""
        count = registry.count_bounded()
        if count and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No supervisor watches this consumer, so a call that does not hear its time or "
                "memory limit cannot be ended. Registered tasks with a limit: %s. Run "
                "consume_tasks with --processes 1 or more",
                count,
            )

    def begin(self, claim: Claim, stop: Stop) -> Allowance:
        """Watch a call from now on, until ``end`` of what is returned."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "No supervisor watches this consumer, so a call that does not hear its time or "
                "memory limit cannot be ended. Task %s has a limit. Run consume_tasks with "
                "--processes 1 or more",
                claim.id,
                extra=log_fields(claim),
            )
        allowance = Allowance(
            claim,
            stop,
            release=self._release,
            pause_seconds=max(self._grace_seconds, PAUSE_SECONDS_MIN),
        )
        deadline = None if claim.time_limit is None else allowance.ends_at + self._grace_seconds
        current_watch().begin(claim, deadline=deadline, memory_bytes=claim.memory_limit)
        with self._changed:
            self._held[allowance] = None
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="firefly-allowances", daemon=True
                )
                self._thread.start()
            elif allowance.looks_at < self._looks_at:
                self._changed.notify()
        return allowance

    def stop(self, *, timeout_seconds: float) -> None:
        """End the thread; what still runs is not watched any more."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_seconds)

    def _release(self, allowance: Allowance) -> None:
        with self._changed:
            was_held = allowance in self._held
            self._held.pop(allowance, None)
        if was_held:
            current_watch().end(allowance.claim)

    def _run(self) -> None:
        while (held := self._await_look()) is not None:
            for allowance, error in self._overruns(held):
                self._stop(allowance, error)

    def _await_look(self) -> list[Allowance] | None:
        """Wait until a call has to be looked at, and return all; ``None`` at the end."""
        with self._changed:
            while not self._is_over:
                now = monotonic()
                self._looks_at = min((item.looks_at for item in self._held), default=_NEVER)
                if self._looks_at <= now:
                    return list(self._held)
                self._changed.wait(None if self._looks_at == _NEVER else self._looks_at - now)
        return None

    def _overruns(self, held: list[Allowance]) -> list[tuple[Allowance, Exception]]:
        """Return what has to be stopped now, and why."""
        # Because of memory one call at a time: what it gives back may do for the others.
        is_shrinking = any(isinstance(item.error, MemoryLimitExceeded) for item in held)
        is_bounded = any(item.claim.memory_limit is not None for item in held)
        resident = resident_bytes(os.getpid()) if is_bounded and not is_shrinking else None
        now = monotonic()
        found = []
        for allowance in held:
            if (error := allowance.overrun(now, resident)) is not None:
                found.append((allowance, error))
                if isinstance(error, MemoryLimitExceeded):
                    resident = None
        return found

    def _stop(self, allowance: Allowance, error: Exception) -> None:
        logger.debug("Stopping a call: %s", error, extra=log_fields(allowance.claim))
        try:
            allowance.stop(type(error))
            if isinstance(error, MemoryLimitExceeded):
                self._on_outgrown()
        except Exception:
            # One turn of the loop; the other calls have limits as well.
            logger.exception("A call could not be interrupted")
