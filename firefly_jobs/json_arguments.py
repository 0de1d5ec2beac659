"""Arguments that come as JSON: turned into what a function's annotations ask for, or refused.

JSON has no dates, decimals or sets, so over HTTP, in a saved job and in the arguments of a
schedule a text stands for a date.
"""

from __future__ import annotations

import enum
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin
from uuid import UUID

from django.utils.dateparse import parse_date, parse_datetime, parse_duration, parse_time

from .job_arguments import hints_of


class NoSuchValueError(ValueError):
    """A value from JSON is not of the type that is asked for; the message says what is."""


def from_json(hint: Any, value: Any) -> Any:
    """Return a value as an annotation asks for it; one that says nothing takes everything.

    Args:
        hint: The annotation, or ``None``.
        value: What JSON gave.

    Raises:
        NoSuchValueError: If that is none.
    """
    origin, members = get_origin(hint), get_args(hint)
    kind = origin or hint
    if origin is Literal:
        return _from_literal(members, value)
    if origin in {Union, UnionType}:
        return _from_union(members, value)
    if not isinstance(kind, type):
        return value
    if issubclass(kind, enum.Enum):
        return _from_enum(kind, value)
    return _read(kind, value) if kind in _READERS else _from_container(kind, members, value)


def _from_literal(members: tuple[Any, ...], value: Any) -> Any:
    for one in members:
        if value == one and type(value) is type(one):
            return value
        if isinstance(one, enum.Enum) and value in (one.name, one.value):
            return one
    message = f"one of {', '.join(map(repr, members))}"
    raise NoSuchValueError(message)


def _from_union(members: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in members:
        return None
    wanted = []
    # A text is a text, if that may be, and no date.
    for member in sorted(members, key=lambda one: one not in {str, int, float, bool}):
        if member is not type(None):
            try:
                return from_json(member, value)
            except NoSuchValueError as error:
                wanted.append(str(error))
    raise NoSuchValueError(" or ".join([*wanted, *["null"] * (type(None) in members)]))


def _from_enum(kind: type[enum.Enum], value: Any) -> enum.Enum:
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    # True is a number to Python, and to nobody else.
    is_plain = not isinstance(value, bool) or any(one.value is value for one in kind)
    with suppress(Exception):  # its own _missing_ may raise anything
        if is_plain:
            return kind(value)
    message = f"one of {', '.join(map(repr, kind.__members__))}"
    raise NoSuchValueError(message)


def _from_container(kind: Any, members: tuple[Any, ...], value: Any) -> Any:
    """Return a list or an object of what its annotation asks for."""
    if kind in {dict, Mapping}:
        if not isinstance(value, dict):
            message = "an object"
            raise NoSuchValueError(message)
        of_keys, of_values = members if len(members) == 2 else (None, None)  # noqa: PLR2004 - of both
        try:
            keys = [_key(of_keys, key) for key in value]
            return dict(zip(keys, [from_json(of_values, v) for v in value.values()], strict=True))
        except NoSuchValueError as error:
            message = f"an object in which each is {error}"
            raise NoSuchValueError(message) from None
    if kind not in _ARRAYS:
        return value
    if not isinstance(value, list):
        message = "a list"
        raise NoSuchValueError(message)
    hints = [members[0] if members else None] * len(value)
    if kind is tuple and members and members[-1] is not Ellipsis:
        hints = list(members)
    if len(hints) != len(value):
        message = f"a list of {len(hints)}"
        raise NoSuchValueError(message)
    try:
        found = [from_json(hint, one) for hint, one in zip(hints, value, strict=True)]
        return found if kind is Sequence else kind(found)
    except NoSuchValueError as error:
        message = f"a list in which each is {error}"
        raise NoSuchValueError(message) from None
    except TypeError:
        message = "a list without lists or objects in it, as a set has none"
        raise NoSuchValueError(message) from None


def _key(hint: Any, key: str) -> Any:
    """Return a key, which JSON has as a text only, as an annotation asks for it."""
    if hint in {int, float, bool}:
        # As a number would be written.
        try:
            return from_json(hint, json.loads(key))
        except json.JSONDecodeError:
            return from_json(hint, key)
    return from_json(hint, key)


def _read(kind: Any, value: Any) -> Any:
    takes, reader, what = _READERS[kind]
    found = None
    # True is a number to Python, and to nobody else.
    if isinstance(value, takes) and (kind is bool or not isinstance(value, bool)):
        try:
            found = reader(value)
        except (ValueError, ArithmeticError):
            found = None
    if found is None:
        raise NoSuchValueError(what)
    return found


def _moment(text: str) -> datetime | None:
    found = parse_datetime(text)
    return None if found is None or found.tzinfo is None else found


def _finite(value: float) -> float | None:
    # Neither NaN nor infinity is JSON.
    return float(value) if math.isfinite(value) else None


def _duration(value: Any) -> timedelta | None:
    return parse_duration(value) if isinstance(value, str) else timedelta(seconds=value)


_READERS: dict[Any, tuple[Any, Callable[[Any], Any], str]] = {
    bool: (bool, lambda value: value, "true or false"),
    int: (int, lambda value: value, "a whole number"),
    float: ((int, float), _finite, "a number"),
    str: (str, lambda value: value, "a text"),
    type(None): ((), lambda _: None, "null"),
    datetime: (str, _moment, "a moment with its offset, such as 2026-11-26T09:30:00+01:00"),
    date: (str, parse_date, "a day such as 2026-11-26"),
    time: (str, parse_time, "a time such as 09:30:00"),
    timedelta: ((int, float, str), _duration, "a number of seconds"),
    Decimal: ((int, float, str), lambda value: Decimal(str(value)), 'a decimal number as "9.90"'),
    UUID: (str, UUID, "a UUID"),
}
_ARRAYS = {list, tuple, set, frozenset, Sequence}


def arguments_from_json(
    func: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments that came as JSON as the annotations of a function ask for them.

    Args:
        func: The function.
        parameters: Those of its callers.
        given: By name; what it does not take is left as it is.

    Raises:
        ValueError: If one is of another type; the message names it.
    """
    hints = hints_of(func)
    others = _of_kind(inspect.Parameter.VAR_KEYWORD, parameters)
    found = dict(given)
    for name, value in given.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in _CATCH_ALL:
            found[name] = _argument(name, hints.get(others), value)
        elif parameter.default is parameter.empty or not _is_same(value, parameter.default):
            # What stands as the default may be given, whatever the annotation says.
            found[name] = _argument(name, hints.get(name), value)
    return found


def positional_from_json(
    func: Callable[..., Any], parameters: Mapping[str, inspect.Parameter], given: Sequence[Any]
) -> list[Any]:
    """Return arguments by position likewise; those that it does not take are left as they are."""
    positions = [p.name for p in parameters.values() if p.kind in _BY_POSITION]
    named = dict(zip(positions, given, strict=False))
    found = [*arguments_from_json(func, parameters, named).values()]
    others = _of_kind(inspect.Parameter.VAR_POSITIONAL, parameters)
    hint = hints_of(func).get(others)
    return found + [_argument(f"*{others}", hint, value) for value in given[len(found) :]]


_CATCH_ALL = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
_BY_POSITION = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _of_kind(kind: Any, parameters: Mapping[str, inspect.Parameter]) -> str:
    return next((p.name for p in parameters.values() if p.kind is kind), "")


def _is_same(value: Any, default: Any) -> bool:
    return value is default or (type(value) is type(default) and bool(value == default))


def _argument(name: str, hint: Any, value: Any) -> Any:
    try:
        return from_json(hint, value)
    except NoSuchValueError as error:
        message = f"{name} must be {error}, got {_described(value)}."
        raise ValueError(message) from None


def _described(value: Any) -> str:
    """Return what JSON calls a value, which may be secret."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    words = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return words.get(type(value), f"a {type(value).__name__}")
