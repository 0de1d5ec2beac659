"""What comes as JSON becomes what annotations ask for, or is refused."""

import enum
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from inspect import signature
from typing import Any, Literal
from uuid import UUID

import pytest
from django.core.serializers.json import DjangoJSONEncoder
from hypothesis import given
from hypothesis import strategies as st

from firefly_jobs.json_arguments import (
    NoSuchValueError,
    arguments_from_json,
    from_json,
    positional_from_json,
)


class Colour(enum.Enum):
    RED = "red"
    BLUE = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Odd(enum.Enum):
    A = "a"

    @classmethod
    def _missing_(cls, value: object) -> Any:
        raise KeyError(value)


NUMBER = UUID("12345678-1234-5678-1234-567812345678")
MOMENT = datetime(2026, 11, 26, 9, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (None, {"a": [1]}, {"a": [1]}),
        (Any, "x", "x"),
        ("a name", "x", "x"),
        (int, 7, 7),
        (float, 7, 7.0),
        (bool, True, True),
        (str, "2026-11-26", "2026-11-26"),
        (date, "2026-11-26", date(2026, 11, 26)),
        (datetime, "2026-11-26T09:30:00Z", MOMENT),
        (datetime, "2026-11-26T10:30:00+01:00", MOMENT),
        (time, "09:30", time(9, 30)),
        (timedelta, 90, timedelta(seconds=90)),
        (timedelta, "1 00:00:00", timedelta(days=1)),
        (timedelta, "PT1H", timedelta(hours=1)),
        (Decimal, "9.90", Decimal("9.90")),
        (Decimal, 9.9, Decimal("9.9")),
        (UUID, str(NUMBER), NUMBER),
        (Colour, "RED", Colour.RED),
        (Colour, "red", Colour.RED),
        (Colour, 2, Colour.BLUE),
        (Literal["a", 1], 1, 1),
        (date | None, None, None),
        (date | None, "2026-11-26", date(2026, 11, 26)),
        (date | str, "2026-11-26", "2026-11-26"),
        (int | date, "2026-11-26", date(2026, 11, 26)),
        (list[date], ["2026-11-26"], [date(2026, 11, 26)]),
        (list, [1, "a"], [1, "a"]),
        (set[int], [1, 1], {1}),
        (tuple[int, str], [1, "a"], (1, "a")),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (Sequence[Decimal], ["1"], [Decimal(1)]),
        (dict[str, date], {"a": "2026-11-26"}, {"a": date(2026, 11, 26)}),
        (Mapping, {"a": 1}, {"a": 1}),
        (dict[int, date], {"5": "2026-11-26"}, {5: date(2026, 11, 26)}),
        (dict[date, int], {"2026-11-26": 5}, {date(2026, 11, 26): 5}),
        (Literal[Colour.RED], "RED", Colour.RED),
        (Level, 2, Level.HIGH),
        (Odd, "a", Odd.A),
    ],
)
def test_a_value_becomes_what_is_asked_for(hint: Any, value: Any, expected: Any) -> None:
    found = from_json(hint, value)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("hint", "value", "words"),
    [
        (int, "banana", "a whole number"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (float, "1", "a number"),
        (bool, 1, "true or false"),
        (str, 1, "a text"),
        (date, "26.11.2026", "a day such as"),
        (date, "2026-02-30", "a day such as"),
        (date, 20261126, "a day such as"),
        (datetime, "2026-11-26T09:30:00", "with its offset"),
        (timedelta, "soon", "a number of seconds"),
        (timedelta, 1e300, "a number of seconds"),
        (Decimal, "x", "a decimal number"),
        (UUID, "x", "a UUID"),
        (Colour, "green", "one of 'RED', 'BLUE'"),
        (Literal["a", "b"], "c", "one of 'a', 'b'"),
        (Literal[1], True, "one of 1"),
        (int | None, "x", "a whole number or null"),
        (list[date], "2026-11-26", "a list"),
        (list[date], ["x"], "a day such as"),
        (tuple[int, str], [1], "a list of 2"),
        (dict[str, int], [1], "an object"),
        (dict[str, int], {"a": "x"}, "an object in which each is a whole number"),
        (dict[int, int], {"five": 5}, "an object in which each is a whole number"),
        (list[int], ["x"], "a list in which each is a whole number"),
        (set, [[1]], "a list without lists"),
        (set[Any], [{}], "a list without lists"),
        (Level, True, "one of 'LOW', 'HIGH'"),
        (Odd, "b", "one of 'A'"),
        (float, float("nan"), "a number"),
        (float, float("inf"), "a number"),
    ],
)
def test_what_is_none_is_refused(hint: Any, value: Any, words: str) -> None:
    with pytest.raises(NoSuchValueError, match=words):
        from_json(hint, value)


@given(
    st.one_of(
        st.tuples(st.just(date), st.dates()),
        st.tuples(st.just(datetime), st.datetimes(timezones=st.just(UTC))),
        st.tuples(st.just(time), st.times()),
        st.tuples(st.just(Decimal), st.decimals(allow_nan=False, allow_infinity=False)),
        st.tuples(st.just(UUID), st.uuids()),
        st.tuples(st.just(int), st.integers()),
        st.tuples(st.just(list[date]), st.lists(st.dates(), max_size=3)),
    )
)
def test_what_django_writes_as_json_is_read_as_it_was(pair: tuple[Any, Any]) -> None:
    hint, value = pair
    found = from_json(hint, json.loads(json.dumps(value, cls=DjangoJSONEncoder)))
    if isinstance(value, datetime | time):
        # Django writes milliseconds.
        value = value.replace(microsecond=value.microsecond // 1000 * 1000)
    assert found == value


def test_arguments_are_named_when_one_is_refused() -> None:
    def function(day: date, keep: int = None, **more: str) -> None:  # type: ignore[assignment]  # noqa: RUF013
        pass

    parameters = signature(function).parameters
    found = arguments_from_json(function, parameters, {"day": "2026-11-26", "keep": None, "x": "y"})
    assert found == {"day": date(2026, 11, 26), "keep": None, "x": "y"}
    for value, word in (("x", "a text"), (7, "a number"), (None, "null"), ([], "a list")):
        with pytest.raises(ValueError, match=f"day must be a day such as 2026-11-26, got {word}"):
            arguments_from_json(function, parameters, {"day": value})


def test_what_is_not_named_is_of_the_type_of_all_the_others() -> None:
    def function(first: int, *rest: date, **more: date) -> None:
        pass

    parameters = signature(function).parameters
    day = date(2026, 11, 26)
    assert positional_from_json(function, parameters, [1, str(day), str(day)]) == [1, day, day]
    assert arguments_from_json(function, parameters, {"x": str(day)}) == {"x": day}
    with pytest.raises(ValueError, match=r"\*rest must be a day"):
        positional_from_json(function, parameters, [1, "x"])
    with pytest.raises(ValueError, match="x must be a day"):
        arguments_from_json(function, parameters, {"x": 1})


def test_an_annotation_that_cannot_be_read_is_the_only_one_that_says_nothing() -> None:
    def function(thing: "NoSuchName", day: date) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    parameters = signature(function).parameters
    given = {"thing": "x", "day": "2026-11-26"}
    found = arguments_from_json(function, parameters, given)
    assert found == {"thing": "x", "day": date(2026, 11, 26)}


def test_a_default_may_be_given_whatever_the_annotation_says() -> None:
    def function(day: date = "today all day") -> None:  # type: ignore[assignment]
        pass

    parameters = signature(function).parameters
    given = {"day": json.loads('"today all day"')}
    assert arguments_from_json(function, parameters, given) == given
