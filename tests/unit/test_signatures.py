from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, Optional, Protocol, TypedDict

import pytest

from firefly_jobs.exceptions import TaskDefinitionError
from firefly_jobs.signatures import CallSignature, by_name, call_with, check_called_by_name


class Named(Protocol):
    name: str


class Shape(TypedDict):
    x: int


def made(function, **options):
    return CallSignature(function, name="shop.f", takes_context=False, **options)


def spread(a, /, b, *rest, c=3, **more):
    return None


def test_arguments_are_known_by_name_with_defaults_applied():
    bound = made(spread).bind((1, 2, 8, 9), {"d": 4})

    assert by_name(bound) == {"a": 1, "b": 2, "rest": (8, 9), "c": 3, "d": 4}


def test_a_callable_gets_the_arguments_it_takes():
    arguments = {"a": 1, "b": 2}

    assert call_with(lambda b: b, arguments) == 2
    assert call_with(lambda **every: every, arguments) == arguments
    assert call_with(lambda: "none", arguments) == "none"
    with pytest.raises(TypeError, match="missing 1 required"):
        call_with(lambda other: other, arguments)


def test_a_callable_that_takes_more_than_names_is_called_all_the_same():
    assert call_with(lambda b, *a: (a, b), {"a": (1, 2), "b": 2}) == ((), 2)


@pytest.mark.parametrize(
    "function",
    [lambda: "k", lambda a, *, b=1: a, lambda **k: k, lambda *a, **k: k, "text".upper, Named],
)
def test_a_callable_whose_parameters_have_names_is_accepted(function):
    check_called_by_name("unique_key", function)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (type("Odd", (), {"__call__": str, "__signature__": 5})(), "does not know the parameters"),
        (lambda *a: a, "unique_key takes arguments by position, and is given those of a call by n"),
        (lambda a, /, **k: a, "takes arguments by position"),
        (print, "takes arguments by position"),
    ],
)
def test_a_callable_that_cannot_be_called_by_name_is_refused(function, message):
    with pytest.raises(TypeError, match=f"{message}.*as in lambda user_id: str"):
        check_called_by_name("unique_key", function)


def test_defaults_give_way_to_what_a_call_says_in_whatever_way():
    def function(a, b=0, *, c=0):
        return None

    complete = made(function).complete
    defaults = {"b": 5, "c": 6}
    assert complete((1,), {}, defaults) == {"b": 5, "c": 6}
    assert complete((1, 2), {}, defaults) == {"c": 6}
    assert complete((1,), {"b": 2, "c": None}, defaults) == {"b": 2, "c": None}


def test_a_default_that_the_function_does_not_take_is_refused():
    with pytest.raises(TaskDefinitionError, match=r"default for 'z', which shop\.f does not take"):
        made(lambda a: a).check_defaults({"z": 1})
    made(spread).check_defaults({"z": 1})
    with pytest.raises(TaskDefinitionError):
        made(lambda a, /: a).check_defaults({"a": 1})


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, 1, "1"),
        (float, 1, "1"),
        (str, "x", b"x"),
        (int | None, None, "x"),
        (Optional[timedelta], timedelta(1), 5),  # noqa: UP045 - what older code says
        (list[int], ["not looked at"], (1,)),
        (Sequence[int], (1,), 5),
        (Annotated[int, "positive"], 1, "x"),
        (None, None, 0),
    ],
)
def test_simple_annotations_are_checked(hint, good, bad):
    def function(value):
        return value

    function.__annotations__["value"] = hint
    signature = made(function)
    signature.check_types(signature.bind((good,), {}))
    with pytest.raises(TypeError, match=r"shop\.f takes value as \w+.*, got a \w+ \(check_types"):
        signature.check_types(signature.bind((bad,), {}))


@pytest.mark.parametrize("hint", [Any, Literal[1], Named, Shape, "Unknown", int | Any])
def test_other_annotations_are_not_checked(hint):
    def function(value):
        return value

    function.__annotations__["value"] = hint
    signature = made(function)
    signature.check_types(signature.bind((object(),), {}))


def test_each_of_many_arguments_is_checked_and_none_is_told():
    def function(*numbers: int, **words: str):
        return None

    signature = made(function)
    signature.check_types(signature.bind((1, 2), {"a": "b"}))
    for args, kwargs in (((1, "secret"), {}), ((), {"a": 12345})):
        with pytest.raises(TypeError) as caught:
            signature.check_types(signature.bind(args, kwargs))
        assert "secret" not in str(caught.value)
        assert "12345" not in str(caught.value)
