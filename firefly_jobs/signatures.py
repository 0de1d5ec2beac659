"""The arguments of a call: completed, bound to the function's parameters, checked.

All of it happens when a call is scheduled, so that what cannot be called is never
written.  Nothing here tells an argument's value: messages name parameters and types.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Union

from .conf import suggestion
from .exceptions import TaskDefinitionError
from .placeholders import Placeholder

_Parameter = inspect.Parameter
_KEYWORDS = (_Parameter.POSITIONAL_OR_KEYWORD, _Parameter.KEYWORD_ONLY)


class CallSignature:
    """What a task's function takes from its callers.

    Args:
        func: The function.
        name: What messages call it.
        takes_context: Whether the consumer passes the first argument itself.

    Raises:
        TaskDefinitionError: If such a function cannot be a task.
    """

    def __init__(self, func: Callable[..., Any], *, name: str, takes_context: bool) -> None:
        self._func = func
        self._name = name
        self._context: str | None = None
        signature = inspect.signature(func)
        parameters = list(signature.parameters.values())
        if "eta" in signature.parameters:
            message = (
                f"{func.__qualname__} cannot be a task: schedule() keeps the word 'eta' for the "
                f"time a call is due, so no parameter may have that name."
            )
            raise TaskDefinitionError(message)
        if takes_context:
            parameters = self._without_context(parameters)
        self.plain = signature.replace(parameters=parameters)
        self._hints: dict[str, Any] | None = None

    def _without_context(self, parameters: list[_Parameter]) -> list[_Parameter]:
        first = parameters[0].kind if parameters else None
        if first is _Parameter.VAR_POSITIONAL:
            return parameters
        if first not in {_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD}:
            message = (
                f"{self._func.__qualname__} has takes_context=True, so it needs a first "
                f"positional parameter that receives the context."
            )
            raise TaskDefinitionError(message)
        if first is _Parameter.POSITIONAL_OR_KEYWORD:
            self._context = parameters[0].name
        return parameters[1:]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
        """Bind a call's arguments.

        Raises:
            TypeError: If the function cannot be called like this.
        """
        return self._bound(self.plain.bind, args, kwargs)

    def bind_partial(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> inspect.BoundArguments:
        """Bind arguments to which others may come; errors as for :meth:`bind`."""
        return self._bound(self.plain.bind_partial, args, kwargs)

    def is_complete(self, bound: inspect.BoundArguments) -> bool:
        """Whether nothing is missing of what :meth:`bind_partial` has bound."""
        return all(
            name in bound.arguments
            or parameter.default is not _Parameter.empty
            or parameter.kind in {_Parameter.VAR_POSITIONAL, _Parameter.VAR_KEYWORD}
            for name, parameter in self.plain.parameters.items()
        )

    def _bound(
        self,
        bind: Callable[..., inspect.BoundArguments],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> inspect.BoundArguments:
        if self._context is not None and self._context in kwargs:
            self._refuse(f"the consumer passes {self._context!r} itself (takes_context=True)")
        try:
            return bind(*args, **kwargs)
        except TypeError as error:
            self._refuse(str(error))

    def _refuse(self, reason: str) -> NoReturn:
        message = f"{self._name}{self.plain} cannot be called like this: {reason}."
        raise TypeError(message) from None

    def takes(self, word: str) -> bool:
        """Whether a caller may pass ``word`` by its name."""
        parameters = self.plain.parameters
        found = parameters.get(word)
        if found is not None and found.kind in _KEYWORDS:
            return True
        return any(p.kind is _Parameter.VAR_KEYWORD for p in parameters.values())

    def check_defaults(self, defaults: Mapping[str, Any]) -> None:
        """Raise ``TaskDefinitionError`` if the option ``kwargs`` names what is not taken."""
        for word in defaults:
            if not self.takes(word):
                message = f"kwargs has a default for {word!r}, which {self._name} does not take."
                raise TaskDefinitionError(message)

    def check_key(self, option: str, key: Any) -> None:
        """Raise ``ValueError`` if the key of an option names a parameter that there is not."""
        if isinstance(key, str) and key not in self.plain.parameters and not self.takes(key):
            message = (
                f"The key of {option} is {key!r}, but {self._name}{self.plain} has no such "
                f"parameter.{suggestion(key, self.plain.parameters)} For a fixed text use a "
                f"callable: key=lambda: {key!r}."
            )
            raise ValueError(message)

    def complete(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return ``kwargs`` with the defaults that neither they nor ``args`` replace."""
        positional = [
            name
            for name, parameter in self.plain.parameters.items()
            if parameter.kind in {_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD}
        ]
        given = {*positional[: len(args)], *kwargs}
        return {**{k: v for k, v in defaults.items() if k not in given}, **kwargs}

    def check_types(self, bound: inspect.BoundArguments) -> None:
        """Compare arguments with annotations, where these are simple.

        Simple are classes, their unions, and the container of what is subscripted.

        Raises:
            TypeError: If one is of another type.
        """
        if self._hints is None:
            try:
                self._hints = typing.get_type_hints(self._func)
            except Exception:  # noqa: BLE001 - a name that exists for type checkers only
                self._hints = {}
        for name, value in bound.arguments.items():
            kind = self.plain.parameters[name].kind
            values: Any = [value]
            if kind is _Parameter.VAR_POSITIONAL:
                values = value
            elif kind is _Parameter.VAR_KEYWORD:
                values = value.values()
            allowed = _classes(self._hints.get(name, Any))
            for one in values:
                if allowed is not None and not isinstance(one, (*allowed, Placeholder)):
                    words = " or ".join(cls.__name__ for cls in allowed)
                    message = (
                        f"{self._name} takes {name} as {words}, got a {type(one).__name__} "
                        f"(check_types=True)."
                    )
                    raise TypeError(message)


def _classes(hint: Any) -> tuple[type, ...] | None:
    """Return the classes that an annotation stands for; ``None`` if it is not simple."""
    origin = typing.get_origin(hint)
    if origin in {Union, types.UnionType}:
        every = [_classes(part) for part in typing.get_args(hint)]
        is_simple = all(found is not None for found in every)
        return tuple(cls for found in every for cls in found or ()) if is_simple else None
    found = hint.__origin__ if origin is typing.Annotated else origin or hint
    found = type(None) if found is None else found
    if not isinstance(found, type) or found is Any or typing.is_typeddict(found):
        return None
    if getattr(found, "_is_protocol", False):
        return None
    # PEP 484: an int will do for a float, both for a complex.
    wider: dict[Any, tuple[type, ...]] = {float: (float, int), complex: (complex, float, int)}
    return wider.get(found, (found,))


def by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Return all arguments by the names of their parameters, defaults included."""
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        if bound.signature.parameters[name].kind is _Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def call_with(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call ``function`` with those of ``arguments`` that it takes, by name."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is _Parameter.VAR_KEYWORD for p in parameters):
        return function(**arguments)
    taken = [p.name for p in parameters if p.kind in _KEYWORDS and p.name in arguments]
    return function(**{name: arguments[name] for name in taken})


def check_called_by_name(word: str, function: Callable[..., Any]) -> None:
    """Raise ``TypeError`` if :func:`call_with` cannot tell what ``function`` takes.

    Args:
        word: What messages call it.
        function: The callable that an option was given.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        message = f"{word} is {function!r}, of which Python does not know the parameters."
    else:
        kinds = {p.kind for p in parameters}
        if _Parameter.POSITIONAL_ONLY not in kinds and (
            _Parameter.VAR_POSITIONAL not in kinds or _Parameter.VAR_KEYWORD in kinds
        ):
            return
        message = f"{word} takes arguments by position, and is given those of a call by name."
    example = "lambda user_id: str(user_id)"
    message = f"{message} Name the parameters it needs, as in {example}, or take all as **kwargs."
    raise TypeError(message)
