import base64
import pickle
import threading
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.core import signing
from django.test import override_settings
from hypothesis import example, given
from hypothesis import strategies as st

from firefly_jobs import serializers
from firefly_jobs.exceptions import BadSignature, PayloadError, PayloadTooLargeError
from tests.factories import create_effect
from tests.testapp.models import Effect

TASK = "shop.tasks.charge"
SECRET = "card-4111-1111"

# What JSON objects stand for other things by.
RESERVED = {"$model", "$step_result", "$parent_results"}
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text().filter(lambda k: k not in RESERVED), inner)
    ),
    max_leaves=10,
)
pickle_values = st.recursive(
    json_values
    | st.binary()
    | st.datetimes(timezones=st.just(UTC))
    | st.dates()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.sets(st.integers())
    | st.floats(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.dictionaries(st.tuples(st.integers()), inner),
    max_leaves=10,
)


class WritesAFile:
    """A pickle that would leave a file behind if anybody loaded it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _write_file, (str(self.path),)


def _write_file(path: str) -> str:
    Path(path).write_text("unpickled", encoding="utf-8")
    return path


class RefusesToBePickled:
    """An object whose own refusal quotes what it holds."""

    def __repr__(self) -> str:
        return SECRET

    def __reduce__(self) -> tuple[Any, ...]:
        message = f"cannot pickle {self!r}"
        raise TypeError(message)


class PretendsToBeAGlobal:
    """An object whose repr the pickle module quotes."""

    def __repr__(self) -> str:
        return SECRET

    def __reduce__(self) -> str:
        return "nowhere"


class RefusesToBeLoaded:
    """An object whose loading quotes what was stored."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _raise_secret, (SECRET,)


def _raise_secret(secret: str) -> None:
    raise ValueError(secret)


def dumps(value: Any, *, serializer: str = "pickle", task_name: str = TASK) -> str:
    return serializers.dumps_returned(value, task_name=task_name, serializer=serializer)


def loads(text: str, *, task_name: str = TASK) -> Any:
    return serializers.loads_returned(text, task_name=task_name)


def is_same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down; -0.0 is not 0.0."""
    return (
        repr(one) == repr(other)
        if isinstance(one, float)
        else (type(one) is type(other) and one == other)
    )


# --- round trips


@given(pickle_values)
@example(0)
@example(False)
@example("")
@example(None)
@example(())
@example({})
@example(b"")
def test_pickle_gives_back_what_it_stored(value):
    assert is_same(loads(dumps(value)), value)


@given(json_values)
@example(0)
@example(False)
@example("")
@example(None)
@example([])
@example({})
def test_json_gives_back_what_it_stored(value):
    assert is_same(loads(dumps(value, serializer="json")), value)


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.parametrize("value", [0, False, "", None, 0.0, [], {}])
def test_empty_values_keep_their_type(serializer, value):
    again = loads(dumps(value, serializer=serializer))

    assert type(again) is type(value)
    assert again == value


@given(
    st.lists(json_values).map(tuple),
    st.dictionaries(st.text().filter(lambda k: k not in RESERVED), json_values),
    st.sampled_from(["pickle", "json"]),
)
def test_arguments_come_back_as_a_tuple_and_a_dictionary(args, kwargs, serializer):
    text = serializers.dumps_params(args, kwargs, task_name=TASK, serializer=serializer)

    assert serializers.loads_params(text, task_name=TASK) == (args, kwargs)


@pytest.mark.parametrize(
    "value",
    [
        date(2026, 2, 28),
        datetime(2026, 2, 28, 12, tzinfo=UTC),
        Decimal("1.10"),
        UUID(int=7),
        {1: "a", (2, 3): "b"},
        frozenset({1}),
        "\0\ud800\N{SNOWMAN}",
        float("inf"),
    ],
)
def test_pickle_stores_what_json_cannot(value):
    assert is_same(loads(dumps(value)), value)


def test_json_is_readable_in_the_database():
    text = serializers.dumps_params((1, [2]), {"note": "hi"}, task_name=TASK, serializer="json")

    name, signature, body = text.split(":", 2)
    assert name == "json"
    assert len(bytes.fromhex(signature)) == 32
    assert body == '[[1,[2]],{"note":"hi"}]'


@pytest.mark.parametrize("serializer", ["pickle", "json"])
def test_a_payload_is_plain_ascii_without_nul(serializer):
    text = dumps({"text": "\0\ud800\N{SNOWMAN}"}, serializer=serializer)

    assert text.isascii()
    assert text.isprintable()


# --- what must not be decoded


def _planted(path: Path) -> str:
    return dumps(WritesAFile(path))


def test_a_payload_that_verifies_is_unpickled(tmp_path):
    path = tmp_path / "proof"

    assert loads(_planted(path)) == str(path)

    assert path.read_text() == "unpickled"


def test_no_changed_character_of_a_payload_gets_it_unpickled(tmp_path):
    path = tmp_path / "proof"
    text = _planted(path)

    for place, character in enumerate(text):
        for other in {"A", "0", "b", ":", "=", "\n", "\N{SNOWMAN}"} - {character}:
            with pytest.raises(PayloadError):
                loads(text[:place] + other + text[place + 1 :])
    assert not path.exists()


def test_no_added_or_missing_character_of_a_payload_gets_it_unpickled(tmp_path):
    path = tmp_path / "proof"
    text = _planted(path)

    for place in range(len(text)):
        with pytest.raises(PayloadError):
            loads(text[:place] + "A" + text[place:])
        with pytest.raises(PayloadError):
            loads(text[:place])
    assert not path.exists()


@given(st.binary(max_size=40), st.text(max_size=40))
def test_no_made_up_payload_is_decoded(body, signature):
    encoded = base64.b64encode(body).decode()

    with pytest.raises(PayloadError):
        loads(f"pickle:{signature}:{encoded}")


def test_a_payload_of_another_task_is_not_unpickled(tmp_path):
    path = tmp_path / "proof"
    text = _planted(path)

    for name in ("shop.tasks.charge2", "shop.tasks.Charge", "", "shop.tasks.charge\0"):
        with pytest.raises(BadSignature):
            loads(text, task_name=name)
    assert not path.exists()


def test_a_result_is_not_taken_for_arguments_nor_arguments_for_a_result(tmp_path):
    path = tmp_path / "proof"
    arguments = serializers.dumps_params(
        (WritesAFile(path),), {}, task_name=TASK, serializer="pickle"
    )

    with pytest.raises(BadSignature):
        loads(arguments)
    with pytest.raises(BadSignature):
        serializers.loads_params(_planted(path), task_name=TASK)
    assert not path.exists()


def test_a_body_is_not_read_in_another_format():
    text = dumps("gASVBQAAAAAAAACMAWGULg==", serializer="json")

    with pytest.raises(BadSignature):
        loads("pickle" + text.removeprefix("json"))


def test_a_bad_signature_says_what_to_do_and_is_one_of_djangos():
    text = dumps(SECRET)

    with pytest.raises(signing.BadSignature, match=r"not decoded.*SECRET_KEY_FALLBACKS") as caught:
        loads(text, task_name="shop.tasks.refund")

    assert isinstance(caught.value, PayloadError)
    assert SECRET not in str(caught.value)
    assert "shop.tasks.refund" in str(caught.value)


@pytest.mark.parametrize("text", ["", ":", "yaml::x", "pickle", "PICKLE::gA=="])
def test_a_text_that_is_no_payload_is_refused(text):
    with pytest.raises(PayloadError):
        loads(text)


def test_a_rotated_key_still_reads_what_the_former_one_signed():
    with override_settings(SECRET_KEY="former"):
        text = dumps("kept")

    with override_settings(SECRET_KEY="present", SECRET_KEY_FALLBACKS=["older", "former"]):
        assert loads(text) == "kept"
        assert dumps("kept") != text
    with (
        override_settings(SECRET_KEY="present", SECRET_KEY_FALLBACKS=[]),
        pytest.raises(BadSignature),
    ):
        loads(text)


def test_a_fallback_key_signs_nothing():
    with override_settings(SECRET_KEY="present", SECRET_KEY_FALLBACKS=["former"]):
        texts = [dumps("new"), dumps(None)]

    with override_settings(SECRET_KEY="present", SECRET_KEY_FALLBACKS=[]):
        assert [loads(text) for text in texts] == ["new", None]


def test_a_key_may_be_bytes():
    with override_settings(SECRET_KEY=b"bytes"):
        text = dumps(1)
    with override_settings(SECRET_KEY="bytes"):
        assert loads(text) == 1


def test_without_signing_nothing_is_signed_and_everything_is_read():
    signed = dumps("signed")

    with override_settings(FIREFLY_JOBS={"SIGNING": False}):
        text = dumps("plain")
        assert text.startswith("pickle::")
        assert loads(text) == "plain"
        assert loads(signed) == "signed"
    with pytest.raises(BadSignature):
        loads(text)


def test_a_pickle_that_no_consumer_would_read_is_refused_at_schedule():
    with override_settings(FIREFLY_JOBS={"SIGNING": False, "SERIALIZER": "json"}):
        serializers.refuse_unreadable("json")
        with pytest.raises(PayloadError, match="'SIGNING': False"):
            serializers.refuse_unreadable("pickle")
    for readable in ({"SIGNING": False}, {"SERIALIZER": "json"}):
        with override_settings(FIREFLY_JOBS=readable):
            serializers.refuse_unreadable("pickle")


def test_none_is_signed_again_once_signing_is_on_again():
    with override_settings(FIREFLY_JOBS={"SIGNING": False}):
        dumps(None, task_name="shop.tasks.none")

    assert loads(dumps(None, task_name="shop.tasks.none"), task_name="shop.tasks.none") is None


# --- what cannot be stored


@pytest.mark.parametrize(
    "value",
    [
        {(1, 2): "tuple"},
        {1: "int"},
        {None: "none"},
        {True: "bool"},
        [{"deep": ({1: 2},)}],
        {"$model": "auth.user"},
        {"$step_result": "load"},
        {"$parent_results": []},
        [{"$model": "auth.user", "using": "default", "pk": "1"}],
        float("nan"),
        [float("inf")],
        {"deep": -float("inf")},
    ],
)
def test_json_refuses_what_it_would_change(value):
    with pytest.raises(PayloadError, match=rf"'{TASK}' cannot be stored with serializer 'json'"):
        dumps(value, serializer="json")


@pytest.mark.parametrize(
    "value", [b"bytes", {1, 2}, Decimal(1), object(), date(2026, 1, 1), UUID(int=1), 1j]
)
def test_json_refuses_types_it_has_no_form_for_and_says_what_to_do(value):
    with pytest.raises(PayloadError, match=r"serializer 'json' \(TypeError\)\. Pass plain values"):
        dumps(value, serializer="json")


def test_json_refuses_a_value_that_contains_itself():
    value: list[Any] = []
    value.append(value)

    with pytest.raises(PayloadError):
        dumps(value, serializer="json")


@pytest.mark.parametrize(
    "value", [lambda: 1, threading.Lock(), (n for n in [1]), RefusesToBePickled()]
)
def test_an_argument_that_cannot_be_pickled_is_named_by_its_task_with_the_remedy(value):
    with pytest.raises(
        PayloadError, match=rf"Argument number 2 \(a .* of '{TASK}' cannot be .* Pass pl"
    ):
        serializers.dumps_params((1, value), {}, task_name=TASK, serializer="pickle")


def test_a_result_that_cannot_be_stored_is_called_a_result():
    with pytest.raises(PayloadError, match=rf"The result of '{TASK}' cannot be stored"):
        dumps(threading.Lock())


@pytest.mark.parametrize(
    ("serializer", "value"),
    [
        ("pickle", [SECRET, threading.Lock()]),
        ("pickle", RefusesToBePickled()),
        ("pickle", PretendsToBeAGlobal()),
        ("json", {(SECRET, 1): 1}),
        ("json", [SECRET, object()]),
        ("json", {SECRET: float("nan")}),
    ],
)
def test_an_error_about_a_value_never_quotes_it(serializer, value):
    with pytest.raises(PayloadError) as caught:
        dumps(value, serializer=serializer)

    assert SECRET not in str(caught.value)


def test_an_error_about_reading_a_payload_never_quotes_it():
    text = dumps(RefusesToBeLoaded())

    with pytest.raises(PayloadError, match=rf"'{TASK}' cannot be read \(ValueError\)") as caught:
        loads(text)

    assert SECRET not in str(caught.value)


def test_a_payload_of_the_largest_size_is_stored_and_one_byte_more_is_refused():
    body = '"' + "x" * 98 + '"'

    with override_settings(FIREFLY_JOBS={"MAX_PAYLOAD_BYTES": 100}):
        assert dumps("x" * 98, serializer="json").endswith(body)
        with pytest.raises(PayloadTooLargeError, match=r"take 101 bytes, more than.* = 100\."):
            dumps("x" * 99, serializer="json")


def test_arguments_that_are_too_large_are_never_quoted():
    with pytest.raises(PayloadTooLargeError, match=rf"The arguments of '{TASK}' take") as caught:
        serializers.dumps_params((SECRET * 100_000,), {}, task_name=TASK, serializer="pickle")

    assert SECRET not in str(caught.value)
    assert "pass a reference" in str(caught.value)


def test_a_vanished_class_makes_an_error_that_says_so():
    body = base64.b64encode(b"cnowhere.to\nBeFound\n.").decode()

    with (
        override_settings(FIREFLY_JOBS={"SIGNING": False}),
        pytest.raises(PayloadError, match=r"\(ModuleNotFoundError\).*may have been moved"),
    ):
        loads(f"pickle::{body}")


# --- model instances


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.django_db
def test_a_model_instance_travels_as_a_reference_and_comes_back_as_the_row_is_then(serializer):
    effect = create_effect(value=1)
    text = dumps({"of": [effect]}, serializer=serializer)
    Effect.objects.filter(pk=effect.pk).update(value=2)

    (again,) = loads(text)["of"]

    assert again == effect
    assert again.value == 2


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.django_db
def test_a_reference_holds_no_field_of_the_row(serializer):
    body = dumps(create_effect(note=SECRET), serializer=serializer).split(":", 2)[2]

    assert SECRET not in body
    assert serializer == "json" or SECRET.encode() not in base64.b64decode(body)


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.django_db(databases=["default", "other"])
def test_a_reference_remembers_its_database(serializer):
    effect = create_effect(value=1)
    there = Effect.objects.using("other").create(pk=effect.pk, task_key="there", value=2)

    again = loads(dumps(there, serializer=serializer))

    assert (again.value, again._state.db) == (2, "other")


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.django_db
def test_a_vanished_instance_makes_a_clear_error(serializer):
    effect = create_effect()
    text, pk = dumps(effect, serializer=serializer), effect.pk
    effect.delete()

    with pytest.raises(PayloadError, match=rf"testapp\.Effect '?{pk}'? no longer exists in dat"):
        loads(text)


@pytest.mark.parametrize("serializer", ["pickle", "json"])
@pytest.mark.parametrize("effect", [Effect(), Effect(pk=5)])
def test_an_unsaved_instance_is_refused_with_the_remedy(serializer, effect):
    with pytest.raises(PayloadError, match=r"An unsaved testapp\.Effect .* Save it first"):
        dumps(effect, serializer=serializer)


def test_a_model_that_no_longer_exists_makes_a_clear_error():
    text = 'json::{"$model":"shop.gone","using":"default","pk":"1"}'

    with (
        override_settings(FIREFLY_JOBS={"SIGNING": False}),
        pytest.raises(PayloadError, match=r"The model 'shop\.gone' no longer exists"),
    ):
        loads(text)


def test_the_pickle_protocol_is_one_that_every_supported_python_reads():
    body = base64.b64decode(dumps([1]).split(":", 2)[2])

    assert body[:2] == pickle.PROTO + bytes([5])
