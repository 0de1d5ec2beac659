"""Read and validate the one setting, the dictionary ``FIREFLY_JOBS``.

Every key is a field of :class:`Settings`; its default stands there and nowhere else.
:func:`problems` lists what is wrong with a dictionary, for the system checks;
:func:`get_settings` refuses to return anything while there is a problem.

To add a key: add a field with its validator in ``_RULES``, and a row in
``docs/reference/settings.md`` (a test compares the two).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import lru_cache
from typing import Any

from django.conf import settings as django_settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

SETTING = "FIREFLY_JOBS"
QUEUE_LENGTH_MAX = OWNER_LENGTH_MAX = 100
RETRIES_MAX = 32_767  # a small integer column
DURATION_SECONDS_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The validated content of ``FIREFLY_JOBS``; durations are seconds."""

    DATABASE: str = "default"
    DEFAULT_QUEUE: str = "default"
    MAX_RETRIES: int = 0
    RETRY_DELAY: int = 120
    CONSUMER_NAP_TIME: float | None = None
    NOTIFY: bool = True
    FAIL_SILENTLY: bool = True
    SERIALIZER: str = "pickle"
    SIGNING: bool = True
    MAX_PAYLOAD_BYTES: int = 1024 * 1024
    LEASE_SECONDS: float = 30.0
    MAX_RESCUES: int = 3
    LANE_TIMEOUT: float = 30.0
    SHUTDOWN_TIMEOUT: float = 30.0
    TIME_LIMIT_GRACE: float = 2.0
    ASYNC_SLOTS: int = 100
    ASYNC_CONNECTIONS: int = 8
    IMPORTS: tuple[str, ...] = ()
    HOOKS: tuple[str, ...] = ()
    KEEP_EVENTS: bool | float = False
    SCHEDULE_OWNER: str | None = None
    API_AUTHENTICATOR: str | None = None
    JOB_ADMIN_ACTIONS: Mapping[str, str] | None = None


def seconds(value: float | timedelta) -> float:
    """Return a duration given as ``timedelta`` or as seconds, in seconds."""
    return value.total_seconds() if isinstance(value, timedelta) else value


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for a misspelt word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _is_text(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "must be a non-empty string"


def _is_owner(value: Any) -> str | None:
    if complaint := _is_text(value):
        return complaint
    too_long = len(value) > OWNER_LENGTH_MAX
    return f"must have {OWNER_LENGTH_MAX} characters at most" if too_long else None


def _is_flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _is_queue(value: Any) -> str | None:
    """As ``options.check_queue``; a queue list on a command line is split at commas."""
    if complaint := _is_text(value):
        return complaint
    if len(value) > QUEUE_LENGTH_MAX or "," in value or value == "*":
        return f"must be 1 to {QUEUE_LENGTH_MAX} characters, without a comma, and not '*'"
    return "must not have outer spaces" if value != value.strip() else None


def _is_count(minimum: int, maximum: int = 2**31 - 1) -> Callable[[Any], str | None]:
    def rule(value: Any) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
            return None
        return f"must be a whole number, {minimum} or more and at most {maximum}"

    return rule


def _is_duration(*, positive: bool, minimum: float = 0.0) -> Callable[[Any], str | None]:
    def rule(value: Any) -> str | None:
        if isinstance(value, int | float | timedelta) and not isinstance(value, bool):
            number = seconds(value)
            if minimum <= number <= DURATION_SECONDS_MAX and (number > 0 or not positive):
                return None
        least = (
            f"{minimum:g} or more" if minimum else "more than zero" if positive else "zero or more"
        )
        return f"must be {least} seconds or a timedelta, and at most {DURATION_SECONDS_MAX} s"

    return rule


def _or_none(rule: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def lenient(value: Any) -> str | None:
        return None if value is None or not (complaint := rule(value)) else f"{complaint}, or None"

    return lenient


def _or_flag(rule: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def lenient(value: Any) -> str | None:
        if isinstance(value, bool) or not (complaint := rule(value)):
            return None
        return f"{complaint}, or True or False"

    return lenient


def _is_one_of(*words: str) -> Callable[[Any], str | None]:
    def rule(value: Any) -> str | None:
        return None if value in words else f"must be one of {', '.join(map(repr, words))}"

    return rule


def _is_modules(value: Any) -> str | None:
    if isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value):
        return None
    return "must be a list of module names"


def _is_dotted_name(value: Any) -> str | None:
    is_name = isinstance(value, str) and "." in value
    return None if is_name else "must be the dotted name of a function"


def _is_words_by_label(value: Any) -> str | None:
    if isinstance(value, dict) and all(
        isinstance(label, str) and "." in label and isinstance(kind, str) and kind
        for label, kind in value.items()
    ):
        return None
    return "must be a dictionary from labels of models, 'app.Model', to types of objects"


def _is_dotted_names(value: Any) -> str | None:
    is_list = isinstance(value, list | tuple)
    if is_list and all(isinstance(name, str) and "." in name for name in value):
        return None
    return "must be a list of dotted names of classes"


_RULES: dict[str, Callable[[Any], str | None]] = {
    "DATABASE": _is_text,
    "DEFAULT_QUEUE": _is_queue,
    "MAX_RETRIES": _is_count(0, RETRIES_MAX),
    "RETRY_DELAY": _is_duration(positive=False),
    "CONSUMER_NAP_TIME": _or_none(_is_duration(positive=True)),
    "NOTIFY": _is_flag,
    "FAIL_SILENTLY": _is_flag,
    "SERIALIZER": _is_one_of("pickle", "json"),
    "SIGNING": _is_flag,
    "MAX_PAYLOAD_BYTES": _is_count(1),
    # Every consumer renews its lease several times in this time.
    "LEASE_SECONDS": _is_duration(positive=True, minimum=0.1),
    "MAX_RESCUES": _is_count(0, 10_000),
    "LANE_TIMEOUT": _is_duration(positive=True),
    "SHUTDOWN_TIMEOUT": _is_duration(positive=False),
    "TIME_LIMIT_GRACE": _is_duration(positive=False),
    "ASYNC_SLOTS": _is_count(1),
    "ASYNC_CONNECTIONS": _is_count(1),
    "IMPORTS": _is_modules,
    "HOOKS": _is_dotted_names,
    "KEEP_EVENTS": _or_flag(_is_duration(positive=True)),
    "SCHEDULE_OWNER": _or_none(_is_owner),
    "API_AUTHENTICATOR": _or_none(_is_dotted_name),
    "JOB_ADMIN_ACTIONS": _or_none(_is_words_by_label),
}


def problems(raw: Any) -> list[tuple[str, str]]:
    """Return what is wrong with a ``FIREFLY_JOBS`` value, as ``(key, message)`` pairs."""
    if not isinstance(raw, Mapping):
        return [("", f"{SETTING} must be a dictionary, got {type(raw).__name__}.")]
    found = []
    for key, value in raw.items():
        if key not in _RULES:
            hint = suggestion(str(key), _RULES)
            found.append((str(key), f"{SETTING} has no key {key!r}.{hint}"))
        elif complaint := _RULES[key](value):
            found.append((key, f"{SETTING}[{key!r}] {complaint}, got {value!r}."))
    return found


def get_settings() -> Settings:
    """Return the validated settings of this project.

    Raises:
        ImproperlyConfigured: If ``FIREFLY_JOBS`` has a problem; it names all of them.
    """
    return _load()


@lru_cache(maxsize=1)
def _load() -> Settings:
    raw = getattr(django_settings, SETTING, {})
    if found := problems(raw):
        raise ImproperlyConfigured(" ".join(message for _, message in found))
    values = dict(raw)
    for field in fields(Settings):
        if isinstance(values.get(field.name), timedelta):
            values[field.name] = values[field.name].total_seconds()
    for key in {"IMPORTS", "HOOKS"} & values.keys():
        values[key] = tuple(values[key])
    return Settings(**values)


def _forget(*, setting: str, **_: Any) -> None:
    if setting == SETTING:
        _load.cache_clear()


setting_changed.connect(_forget, dispatch_uid="firefly_jobs.conf")
