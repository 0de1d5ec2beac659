"""What a person may say when a job is started: names, types, defaults and help.

All of it is read from the function: from its parameters, its annotations and its docstring.
What comes as JSON ``json_arguments`` reads.
"""

from __future__ import annotations

import copy
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

# A line under ``Args:`` of a docstring in Google's style.
_HELP = re.compile(r"^\s+(\w+)(?: \([^)]*\))?:\s+(.+)$")


@dataclass(frozen=True, slots=True)
class Argument:
    """What a person may say when a job is started.

    Attributes:
        name: Its name.
        type: The annotation, or ``None`` without one.
        is_required: Whether it has no default.
        default: That default.
        help: What the docstring says about it.
    """

    name: str
    type: Any
    is_required: bool
    default: Any = None
    help: str = ""


def parameters_of(
    func: Callable[..., Any],
    parameters: Mapping[str, inspect.Parameter],
    defaults: Mapping[str, Any],
    *,
    hidden: Collection[str],
) -> list[Argument]:
    """Return the arguments of a function that people may give by name, in order.

    Args:
        func: The function, whose annotations and docstring are read.
        parameters: Those of its callers.
        defaults: What holds instead of the function's own defaults.
        hidden: Parameters that nobody says.
    """
    hints = hints_of(func)
    helps: dict[str, str] = {}
    for line in (func.__doc__ or "").splitlines():
        if match := _HELP.match(line):
            helps[match[1]] = match[2]
    found = []
    for name, parameter in parameters.items():
        is_word = parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
        if not is_word or name in hidden:
            continue
        has_default = name in defaults or parameter.default is not parameter.empty
        default = defaults.get(name, parameter.default) if has_default else None
        found.append(
            Argument(
                name,
                hints.get(name),
                not has_default,
                # Whoever changes it changes nobody else's.
                copy.deepcopy(default),
                helps.get(name, ""),
            )
        )
    return found


def hints_of(func: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, but for those that cannot be read."""
    with suppress(Exception):  # a name that exists for type checkers only
        return typing.get_type_hints(func)
    known = getattr(inspect.unwrap(func), "__globals__", {})
    found: dict[str, Any] = {}
    for name, annotation in getattr(func, "__annotations__", {}).items():
        one = types.SimpleNamespace(__annotations__={name: annotation})
        with suppress(Exception):  # likewise
            found |= typing.get_type_hints(one, globalns=known)
    return found
