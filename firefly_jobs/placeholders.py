"""Arguments that are not known yet: what other steps of a workflow return.

They travel in the arguments of a step, as values, and are replaced when its call starts.
They are found inside of lists, tuples, sets, and the values of dictionaries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

STEP_KEY = "$step_result"
PARENTS_KEY = "$parent_results"


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step returns, by its name."""

    step: str

    def to_json(self) -> dict[str, Any]:
        """Return what stands for it in JSON."""
        return {STEP_KEY: self.step}


@dataclass(frozen=True, slots=True)
class ParentResults:
    """What those of some steps that complete return: ``{name: value}``."""

    steps: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what stands for it in JSON."""
        return {PARENTS_KEY: list(self.steps)}


Placeholder = StepResult | ParentResults
_CONTAINERS = (dict, list, tuple, set, frozenset)


def from_json(found: dict[str, Any]) -> Placeholder | None:
    """Return the placeholder that a JSON object stands for, if it does."""
    if STEP_KEY in found:
        return StepResult(found[STEP_KEY])
    if PARENTS_KEY in found:
        return ParentResults(tuple(found[PARENTS_KEY]))
    return None


def placeholders_in(value: Any) -> Iterator[Placeholder]:
    """Yield the placeholders in ``value``, and in what it contains; it may contain itself."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, Placeholder):
            yield one
        elif isinstance(one, _CONTAINERS) and id(one) not in seen:
            seen.add(id(one))
            todo += reversed(list(one.values() if isinstance(one, dict) else one))


def has_placeholders(value: Any) -> bool:
    """Whether ``value`` contains what is not known before the call starts."""
    return any(True for _ in placeholders_in(value))


def replaced(value: Any, replace: Callable[[Placeholder], Any]) -> Any:
    """Return ``value`` with another value for each placeholder; itself if there is none."""
    if isinstance(value, Placeholder):
        return replace(value)
    if not has_placeholders(value):
        return value
    if isinstance(value, dict):
        return {key: replaced(item, replace) for key, item in value.items()}
    items = [replaced(item, replace) for item in value]
    if isinstance(value, tuple):
        # A named tuple takes its items one by one.
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return items if isinstance(value, list) else type(value)(items)
