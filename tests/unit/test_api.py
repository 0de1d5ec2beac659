"""What annotations and values are in JSON."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from typing import Any, Literal

import pytest

from firefly_jobs.api import schema_of


@pytest.mark.parametrize(
    ("annotation", "schema"),
    [
        (int, {"type": "integer"}),
        (bool, {"type": "boolean"}),
        (str | None, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
        (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        (Literal["a", 1, None], {"enum": ["a", 1, None]}),
        (datetime, {"type": "string", "format": "date-time"}),
        (date, {"type": "string", "format": "date"}),
        (uuid.UUID, {"type": "string", "format": "uuid"}),
        (list[int], {"type": "array"}),
        (tuple[int], {"type": "array"}),
        (Sequence[int], {"type": "array"}),
        (Mapping[str, int], {"type": "object"}),
    ],
)
def test_what_is_simple_has_a_schema(annotation: Any, schema: dict[str, Any]) -> None:
    assert schema_of(annotation) == schema


@pytest.mark.parametrize(
    "annotation",
    # What nobody can say is anything.
    [None, Any, type[int], Callable[[int], None], Literal[b"x"], int | type[int], "int"],
)
def test_what_is_not_simple_may_be_anything(annotation: Any) -> None:
    assert schema_of(annotation) == {}
