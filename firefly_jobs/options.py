"""Hold what a task or one call of it was told: queue, priority, retries and so on.

:class:`TaskOptions` is immutable and validated when it is made, so a wrong option is
reported where it is written, at import or at ``using()``, not in a consumer.  ``None``
means "as ``FIREFLY_JOBS`` says"; that is looked up when a call is scheduled.

To add an option: add a field and its check here, a row to
``docs/reference/tasks.md``, and decide whether it is one of :data:`FIXED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from django.utils import timezone

from .conf import (
    DURATION_SECONDS_MAX,
    QUEUE_LENGTH_MAX,
    RETRIES_MAX,
    get_settings,
    seconds,
    suggestion,
)
from .retries import Fixed, RetryStrategy, exception_names
from .serializers import FORMATS

PRIORITY_MIN, PRIORITY_MAX = -100, 100
NAME_LENGTH_MAX = 200

# What every database stores, in every time zone.
ETA_MIN = datetime(1000, 1, 2, tzinfo=UTC)
ETA_MAX = datetime(9999, 12, 30, tzinfo=UTC)

# What belongs to the function and not to one call of it: refused by using().
FIXED = frozenset({"name", "aliases", "atomic", "takes_context"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """The options of a task, or of one call made with ``using()``."""

    name: str | None = None
    aliases: tuple[str, ...] = ()
    queue: str | None = None
    priority: int = 0
    max_retries: int | None = None
    retry_delay: float | timedelta | None = None
    retry: RetryStrategy | None = None
    retry_on: tuple[type[BaseException] | str, ...] = ()
    atomic: bool = True
    database: str | None = None
    takes_context: bool = False
    serializer: str | None = None
    eta: datetime | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_retries()
        _check_priority(self.priority)
        if self.queue is not None:
            check_queue(self.queue)
        _require("serializer", self.serializer, (str, type(None)), f"one of {sorted(FORMATS)}")
        if self.serializer is not None and self.serializer not in FORMATS:
            message = f"serializer must be one of {sorted(FORMATS)}, got {self.serializer!r}."
            raise ValueError(message)
        _require("atomic", self.atomic, (bool,), "True or False")
        _require("takes_context", self.takes_context, (bool,), "True or False")
        _require("database", self.database, (str, type(None)), "an alias of DATABASES")
        check_eta(self.eta)

    def _check_names(self) -> None:
        _require("aliases", self.aliases, (tuple, list), "a list of names")
        object.__setattr__(self, "aliases", tuple(self.aliases))
        for name in (self.name, *self.aliases):
            if name is not None:
                check_name(name)

    def _check_retries(self) -> None:
        if self.max_retries is not None:
            _require_count("max_retries", self.max_retries)
        if self.retry_delay is not None:
            _require_duration("retry_delay", self.retry_delay)
        _require("retry", self.retry, (RetryStrategy, type(None)), "a strategy such as Fixed(3)")
        if self.retry is not None and (self.max_retries, self.retry_delay) != (None, None):
            message = "Give either retry= or max_retries= and retry_delay=, not both."
            raise ValueError(message)
        object.__setattr__(self, "retry_on", exception_names(self.retry_on))

    def using(self, **changes: Any) -> TaskOptions:
        """Return a copy with other options for one call.

        Raises:
            TypeError: If a word is no option, or belongs to the function itself.
            ValueError: If a value is out of range.
        """
        for word in changes:
            if word in FIXED:
                message = (
                    f"{word} belongs to the function; set it in the decorator, not for a call."
                )
                raise TypeError(message)
        check_words(changes)
        # A strategy and the two plain words exclude each other, so the later one wins.
        if "retry" in changes:
            changes = {"max_retries": None, "retry_delay": None, **changes}
        elif "max_retries" in changes or "retry_delay" in changes:
            changes = {"retry": None, **changes}
        return replace(self, **changes)

    @property
    def effective_retry(self) -> RetryStrategy | None:
        """The strategy a row has to carry; ``None`` where its two columns say it all."""
        if self.retry is None and not self.retry_on:
            return None
        if self.retry is None:
            return Fixed(
                self.effective_max_retries,
                self.effective_retry_delay,
                retry_on=self.retry_on,
            )
        return replace(self.retry, retry_on=self.retry_on) if self.retry_on else self.retry

    @property
    def effective_max_retries(self) -> int:
        """Retries after the first attempt."""
        if self.retry is not None:
            return self.retry.retries_max
        return get_settings().MAX_RETRIES if self.max_retries is None else self.max_retries

    @property
    def effective_retry_delay(self) -> int:
        """Whole seconds before a retry, rounded up; 0 where a strategy decides."""
        if self.retry is not None:
            return 0
        given = get_settings().RETRY_DELAY if self.retry_delay is None else self.retry_delay
        return math.ceil(seconds(given))


_WORDS = tuple(field.name for field in fields(TaskOptions))


def check_words(words: dict[str, Any]) -> None:
    """Raise ``TypeError`` if one of ``words`` is no option."""
    for word in words:
        if word not in _WORDS:
            message = f"There is no task option {word!r}.{suggestion(word, _WORDS)}"
            raise TypeError(message)


def _require(word: str, value: Any, kinds: tuple[type, ...], what: str) -> None:
    if not isinstance(value, kinds):
        message = f"{word} must be {what}, got {value!r} of type {type(value).__name__}."
        raise TypeError(message)


def check_name(name: Any) -> None:
    """Raise unless ``name`` can be a task's name."""
    if not isinstance(name, str) or not name or len(name) > NAME_LENGTH_MAX:
        message = (
            f"A task's name must be a string of 1 to {NAME_LENGTH_MAX} characters, got {name!r}."
        )
        raise TypeError(message)


def check_queue(queue: Any) -> None:
    """Raise unless ``queue`` can be a queue's name."""
    if not isinstance(queue, str):
        message = f"queue must be a string, got {queue!r} of type {type(queue).__name__}."
        raise TypeError(message)
    is_well_formed = queue == queue.strip() and queue.isprintable() and "," not in queue
    if not 0 < len(queue) <= QUEUE_LENGTH_MAX or not is_well_formed or queue == "*":
        message = (
            f"queue must have 1 to {QUEUE_LENGTH_MAX} characters, no comma, no control "
            f"characters and no outer spaces, and not be '*', got {queue!r}."
        )
        raise ValueError(message)


def check_eta(eta: Any) -> None:
    """Raise unless ``eta`` is ``None`` or an aware datetime."""
    if eta is None:
        return
    if not isinstance(eta, datetime):
        message = (
            f"eta must be a timezone-aware datetime, got {eta!r} of type {type(eta).__name__}. "
            f"For a delay, pass timezone.now() + timedelta(...)."
        )
        raise TypeError(message)
    if timezone.is_naive(eta):
        message = (
            f"eta must be timezone-aware, got the naive datetime {eta!r}. "
            f"Use django.utils.timezone.now() or make_aware()."
        )
        raise ValueError(message)
    try:
        is_storable = ETA_MIN <= eta.astimezone(UTC) <= ETA_MAX
    except OverflowError:
        is_storable = False
    if not is_storable:
        message = f"eta must lie between {ETA_MIN} and {ETA_MAX}, got {eta!r}."
        raise ValueError(message)


def _check_priority(priority: Any) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int):
        message = f"priority must be a whole number, got {priority!r}."
        raise TypeError(message)
    if not PRIORITY_MIN <= priority <= PRIORITY_MAX:
        message = f"priority must be between {PRIORITY_MIN} and {PRIORITY_MAX}, got {priority}."
        raise ValueError(message)


def _require_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} must be a whole number, got {value!r}."
        raise TypeError(message)
    if not 0 <= value <= RETRIES_MAX:
        message = f"{name} must be between 0 and {RETRIES_MAX}, got {value}."
        raise ValueError(message)


def _require_duration(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        message = f"{name} must be seconds or a timedelta, got {value!r}."
        raise TypeError(message)
    if not 0 <= seconds(value) <= DURATION_SECONDS_MAX:
        message = (
            f"{name} must be zero or more seconds, at most {DURATION_SECONDS_MAX}, got {value!r}."
        )
        raise ValueError(message)
