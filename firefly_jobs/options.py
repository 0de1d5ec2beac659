"""Hold what a task or one call of it was told: queue, priority, retries and so on.

:class:`TaskOptions` is immutable and validated when it is made, so a wrong option is
reported where it is written, at import or at ``using()``, not in a consumer.  ``None``
means "as ``FIREFLY_JOBS`` says"; that is looked up when a call is scheduled.

To add an option: add a field and its check here, a row to
``docs/reference/tasks.md``, and decide whether it is one of :data:`FIXED`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from django.utils import timezone

from .conf import (
    DURATION_SECONDS_MAX,
    QUEUE_LENGTH_MAX,
    RETRIES_MAX,
    get_settings,
    seconds,
    suggestion,
)
from .hooks import TaskHooks, as_hooks
from .limits import Concurrency, RateLimit, as_concurrency, as_rate_limit
from .priorities import as_number
from .resources import Limit, fold
from .retries import Fixed, RetryStrategy, exception_names
from .serializers import FORMATS
from .signatures import check_called_by_name
from .storable import CHARACTERS, is_storable, json_text

NAME_LENGTH_MAX = LABEL_LENGTH_MAX = 200
KEY_LENGTH_MAX = 255
DESCRIPTION_LENGTH_MAX = 2_000
TAG_LENGTH_MAX, TAGS_MAX = 100, 100
METADATA_LENGTH_MAX = 65_536

OnConflict = Literal["return", "raise", "replace"]
UniqueKey = str | Callable[..., str | None] | None

# What every database stores, in every time zone.
ETA_MIN = datetime(1000, 1, 2, tzinfo=UTC)
ETA_MAX = datetime(9999, 12, 30, tzinfo=UTC)

# What belongs to the function and not to one call of it: refused by using().
FIXED = frozenset({"name", "aliases", "atomic", "takes_context", "group_commit", "hooks"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """The options of a task, or of one call made with ``using()``.

    Several of them may be given in more ways than the type of the field says: a priority by
    name, a limit as ``timedelta`` or text.  What the field holds is that type.
    """

    name: str | None = None
    aliases: tuple[str, ...] = ()
    queue: str | None = None
    priority: int = 0
    max_retries: int | None = None
    max_attempts: int | None = None
    retry_delay: float | timedelta | None = None
    retry: RetryStrategy | None = None
    retry_on: tuple[type[BaseException] | str, ...] = ()
    atomic: bool = True
    group_commit: bool | None = None
    database: str | None = None
    takes_context: bool = False
    hooks: tuple[TaskHooks, ...] = ()
    serializer: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    check_types: bool = False
    expires: float | timedelta | datetime | None = None
    unique_key: UniqueKey = None
    on_conflict: OnConflict = "return"
    time_limit: float | None = None
    memory_limit: int | None = None
    limits: tuple[Limit, ...] = ()
    concurrency: Concurrency | None = None
    rate_limit: RateLimit | None = None
    label: str = ""
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    eta: datetime | None = None

    def __post_init__(self) -> None:
        self._check_names()
        self._check_retries()
        self._set("priority", as_number(self.priority))
        self._check_words_for_people()
        self._check_key()
        self._fold_limits()
        self._set("concurrency", as_concurrency(self.concurrency))
        self._set("rate_limit", as_rate_limit(self.rate_limit))
        self._set("hooks", as_hooks(self.hooks))
        check_expires(self.expires)
        _require("kwargs", self.kwargs, (Mapping,), "a dictionary of arguments")
        self._set("kwargs", dict(self.kwargs))
        if self.queue is not None:
            check_queue(self.queue)
        _require("serializer", self.serializer, (str, type(None)), f"one of {sorted(FORMATS)}")
        if self.serializer is not None and self.serializer not in FORMATS:
            message = f"serializer must be one of {sorted(FORMATS)}, got {self.serializer!r}."
            raise ValueError(message)
        _require("atomic", self.atomic, (bool,), "True or False")
        _require("group_commit", self.group_commit, (bool, type(None)), "True or False")
        if self.group_commit and not self.atomic:
            message = "group_commit=True needs a transaction; remove atomic=False."
            raise ValueError(message)
        _require("takes_context", self.takes_context, (bool,), "True or False")
        _require("check_types", self.check_types, (bool,), "True or False")
        _require("database", self.database, (str, type(None)), "an alias of DATABASES")
        check_eta(self.eta)

    def differences(self, other: TaskOptions) -> dict[str, Any]:
        """Return the words that say something else here than in ``other``, with their values."""
        values = {word.name: getattr(self, word.name) for word in fields(self)}
        return {word: value for word, value in values.items() if value != getattr(other, word)}

    def with_differences(self, differences: Mapping[str, Any]) -> TaskOptions:
        """Return a copy with these values, which are such as :meth:`differences` has returned."""
        found = copy(self)
        for word, value in differences.items():
            object.__setattr__(found, word, value)
        return found

    def _set(self, word: str, value: Any) -> None:
        object.__setattr__(self, word, value)

    def _check_names(self) -> None:
        _require("aliases", self.aliases, (tuple, list), "a list of names")
        self._set("aliases", tuple(self.aliases))
        for name in (self.name, *self.aliases):
            if name is not None:
                check_name(name)

    def _check_retries(self) -> None:
        if self.max_attempts is not None:
            _require_count("max_attempts", self.max_attempts, least=1)
            if self.max_retries is not None:
                message = "Give either max_attempts= or max_retries=; attempts are retries + 1."
                raise ValueError(message)
            if self.retry is not None:
                message = "Give either retry= or max_attempts=, not both."
                raise ValueError(message)
            # One of them is kept, so that equal options are equal.
            self._set("max_retries", self.max_attempts - 1)
            self._set("max_attempts", None)
        if self.max_retries is not None:
            _require_count("max_retries", self.max_retries)
        if self.retry_delay is not None:
            _require_duration("retry_delay", self.retry_delay)
        _require("retry", self.retry, (RetryStrategy, type(None)), "a strategy such as Fixed(3)")
        if self.retry is not None and (self.max_retries, self.retry_delay) != (None, None):
            message = "Give either retry= or max_retries= and retry_delay=, not both."
            raise ValueError(message)
        self._set("retry_on", exception_names(self.retry_on))

    def _check_words_for_people(self) -> None:
        check_text("label", self.label, LABEL_LENGTH_MAX)
        check_text("description", self.description, DESCRIPTION_LENGTH_MAX)
        tags: Any = self.tags
        if isinstance(tags, str) or not isinstance(tags, Iterable):
            message = f"tags must be a list of words, got {tags!r}."
            raise TypeError(message)
        # In order, and each once.
        self._set("tags", tuple(dict.fromkeys(tags)))
        for tag in self.tags:
            check_text("A tag", tag, TAG_LENGTH_MAX, least=1)
        if len(self.tags) > TAGS_MAX:
            message = f"A task can have {TAGS_MAX} tags at most, got {len(self.tags)}."
            raise ValueError(message)
        self._set("metadata", plain_metadata(self.metadata))

    def _check_key(self) -> None:
        if callable(self.unique_key):
            check_called_by_name("unique_key", self.unique_key)
        elif self.unique_key is not None:
            check_key(self.unique_key)
        if self.on_conflict not in get_args(OnConflict):
            words = ", ".join(map(repr, get_args(OnConflict)))
            hint = suggestion(str(self.on_conflict), get_args(OnConflict))
            message = f"on_conflict must be one of {words}, got {self.on_conflict!r}.{hint}"
            raise ValueError(message)

    def _fold_limits(self) -> None:
        time, memory = fold(self.limits, time_limit=self.time_limit, memory_limit=self.memory_limit)
        self._set("time_limit", time)
        self._set("memory_limit", memory)
        self._set("limits", ())

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
        # Of several ways to say the same, the later one wins.
        plain = {"max_retries", "max_attempts", "retry_delay"} & changes.keys()
        if "retry" in changes:
            changes = {"max_retries": None, "retry_delay": None, **changes}
        elif plain:
            changes = {"retry": None, **changes}
        if "max_attempts" in changes:
            changes = {"max_retries": None, **changes}
        if "limits" in changes:
            changes = {"time_limit": None, "memory_limit": None, **changes}
        return replace(self, **changes)

    @property
    def has_extras(self) -> bool:
        """Whether a row has to carry more than where and when it runs and is tried again."""
        return bool(
            self.unique_key
            or self.tags
            or self.metadata
            or self.label
            or self.description
            or self.expires is not None
            or self.time_limit is not None
            or self.memory_limit is not None
            or self.concurrency is not None
            or self.rate_limit is not None
        )

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


OPTION_WORDS = tuple(field.name for field in fields(TaskOptions))


def check_words(words: dict[str, Any]) -> None:
    """Raise ``TypeError`` if one of ``words`` is no option."""
    for word in words:
        if word not in OPTION_WORDS:
            message = f"There is no task option {word!r}.{suggestion(word, OPTION_WORDS)}"
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


def check_eta(eta: Any, *, word: str = "eta") -> None:
    """Raise unless ``eta`` is ``None`` or an aware datetime."""
    if eta is None:
        return
    if not isinstance(eta, datetime):
        message = (
            f"{word} must be a timezone-aware datetime, got {eta!r} of type {type(eta).__name__}. "
            f"For a delay, pass timezone.now() + timedelta(...)."
        )
        raise TypeError(message)
    if timezone.is_naive(eta):
        message = (
            f"{word} must be timezone-aware, got the naive datetime {eta!r}. "
            f"Use django.utils.timezone.now() or make_aware()."
        )
        raise ValueError(message)
    try:
        is_storable = ETA_MIN <= eta.astimezone(UTC) <= ETA_MAX
    except OverflowError:
        is_storable = False
    if not is_storable:
        message = f"{word} must lie between {ETA_MIN} and {ETA_MAX}, got {eta!r}."
        raise ValueError(message)


def check_expires(expires: Any) -> None:
    """Raise unless ``expires`` is ``None``, a duration or an aware datetime."""
    if isinstance(expires, datetime):
        check_eta(expires, word="expires")
    elif expires is not None:
        _require_duration("expires", expires, may_be_zero=False)


def check_key(key: Any, *, word: str = "unique_key") -> str:
    """Return ``key`` if it can be a unique key, or that of a limit.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is empty or too long, or if a database would change it.
    """
    if not isinstance(key, str):
        message = (
            f"{word} must be text or a callable that returns text, got a {type(key).__name__}."
        )
        raise TypeError(message)
    if len(key) > KEY_LENGTH_MAX:
        message = (
            f"{word} must have 1 to {KEY_LENGTH_MAX} characters, got {len(key):,}. Use a callable "
            f"that hashes what is long: hashlib.sha256(text.encode()).hexdigest()."
        )
        raise ValueError(message)
    check_text(word, key, KEY_LENGTH_MAX, least=1)
    if key != key.strip():
        # Compared without regard to trailing spaces by some collations.
        message = f"{word} must not begin or end with white space."
        raise ValueError(message)
    return key


def check_step_name(name: Any) -> str:
    """Return ``name`` if a step of a workflow can be called that.

    Raises:
        TypeError: If it is no text.
        ValueError: If it is empty or too long, or if a database would change it.
    """
    word = "A step's name"
    check_text(word, name, LABEL_LENGTH_MAX, least=1)
    if name != name.strip():
        # As with keys: some collations know no difference between "a" and "a ".
        message = f"{word} must not begin or end with white space, got {name!r}."
        raise ValueError(message)
    return str(name)


def check_text(word: str, text: Any, longest: int, *, least: int = 0) -> None:
    """Raise unless ``text`` is text of that length that every database stores."""
    _require(word, text, (str,), "text")
    if not least <= len(text) <= longest:
        message = f"{word} must have {least} to {longest:,} characters, got {len(text):,}."
        raise ValueError(message)
    if not is_storable(text):
        message = f"{word} has {CHARACTERS}."
        raise ValueError(message)


def plain_metadata(metadata: Any) -> dict[str, Any]:
    """Return a copy of ``metadata`` as JSON gives it back."""
    _require("metadata", metadata, (Mapping,), "a dictionary")
    if not metadata:
        return {}
    try:
        text = json_text(dict(metadata))
    except (TypeError, ValueError) as error:
        message = f"metadata must be what JSON can hold: {error}."
        raise type(error)(message) from None
    if len(text) > METADATA_LENGTH_MAX:
        message = (
            f"metadata may take {METADATA_LENGTH_MAX:,} characters as JSON, got {len(text):,}."
        )
        raise ValueError(message)
    found: dict[str, Any] = json.loads(text)
    return found


def _require_count(name: str, value: Any, *, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        message = f"{name} must be a whole number, got {value!r}."
        raise TypeError(message)
    if not least <= value <= RETRIES_MAX + least:
        message = f"{name} must be between {least} and {RETRIES_MAX + least}, got {value}."
        raise ValueError(message)


def _require_duration(name: str, value: Any, *, may_be_zero: bool = True) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | timedelta):
        message = f"{name} must be seconds or a timedelta, got {value!r}."
        raise TypeError(message)
    if not 0 <= seconds(value) <= DURATION_SECONDS_MAX or not (may_be_zero or value):
        least = "zero or more" if may_be_zero else "more than zero"
        message = f"{name} must be {least} seconds, at most {DURATION_SECONDS_MAX}, got {value!r}."
        raise ValueError(message)
