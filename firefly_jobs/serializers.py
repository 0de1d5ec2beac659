"""Turn arguments and results into signed text, and back.

A stored payload reads ``<format>:<signature>:<body>``.  ``pickle`` bodies are Base64,
``json`` bodies are JSON.  The signature (HMAC-SHA256, RFC 2104, keyed from
``SECRET_KEY`` and a salt that names this app) covers the format, whether it holds
parameters or a result, the task's name and the body, so a payload can neither be
changed nor moved to another task or column.  It is checked before anything is decoded:
a payload that does not verify is never unpickled.

Model instances travel as references: model, database alias, primary key.  Pickle has a
protocol for that, ``persistent_id`` (see "Persistence of External Objects" in
the Python manual); JSON gets an object with the key ``$model``.  Reading loads them.

To add a format: add a :class:`Format` to :data:`FORMATS` and a case to
``tests/unit/test_serializers.py``.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import io
import json
import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from django.apps import apps
from django.conf import settings as django_settings
from django.core.exceptions import ObjectDoesNotExist, SynchronousOnlyOperation
from django.core.signals import setting_changed
from django.db.models import Model

from . import placeholders
from .conf import get_settings
from .exceptions import (
    BadSignature,
    MemoryLimitExceeded,
    PayloadError,
    PayloadTooLargeError,
    TimeLimitExceeded,
)
from .placeholders import Placeholder

PARAMS = "params"
RETURNED = "returned"

_SALT = b"firefly_jobs.serializers\0"
_MODEL_KEY = "$model"
_JSON_KEYS = {_MODEL_KEY, placeholders.STEP_KEY, placeholders.PARENTS_KEY}
_LABELS = {PARAMS: "arguments", RETURNED: "results"}
_REMEDIES = {"json": ", or use serializer='pickle'"}
# What is no fault of the value's: a limit of the call that reads or stores it may pass meanwhile.
_PASSED_ON = (PayloadError, SynchronousOnlyOperation, TimeLimitExceeded, MemoryLimitExceeded)


def dumps_params(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, task_name: str, serializer: str
) -> str:
    """Return the text that stores a call's arguments.

    Raises:
        PayloadError: If an argument cannot be stored; nothing was written.
        PayloadTooLargeError: If the text is longer than ``MAX_PAYLOAD_BYTES``.
    """
    return _dumps((args, kwargs), kind=PARAMS, task_name=task_name, serializer=serializer)


def loads_params(text: str, *, task_name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments that :func:`dumps_params` stored, as ``(args, kwargs)``.

    Raises:
        BadSignature: If the text was not signed for this task by this project.
        PayloadError: If it cannot be decoded, or a referenced object has vanished.
    """
    args, kwargs = _loads(text, kind=PARAMS, task_name=task_name)
    return tuple(args), kwargs


def dumps_returned(value: Any, *, task_name: str, serializer: str) -> str:
    """Return the text that stores a call's result; errors as for arguments."""
    if value is None:
        return _none_returned(task_name, serializer)
    return _dumps(value, kind=RETURNED, task_name=task_name, serializer=serializer)


def loads_returned(text: str, *, task_name: str) -> Any:
    """Return the result that :func:`dumps_returned` stored; errors as for arguments."""
    return _loads(text, kind=RETURNED, task_name=task_name)


def refuse_unreadable(serializer: str) -> None:
    """Raise ``PayloadError`` for a serializer whose payloads no consumer would read."""
    settings = get_settings()
    if serializer == "pickle" != settings.SERIALIZER and not settings.SIGNING:
        message = (
            "serializer='pickle' needs signed payloads while FIREFLY_JOBS['SERIALIZER'] is "
            f"{settings.SERIALIZER!r}: an unsigned pickle would not be read. Remove "
            "'SIGNING': False from FIREFLY_JOBS, or use serializer='json'."
        )
        raise PayloadError(message)


def format_of(text: str) -> str:
    """Return the name of the serializer that wrote a stored payload."""
    return text.partition(":")[0]


@lru_cache(maxsize=1024)
def _none_returned(task_name: str, serializer: str) -> str:
    # Most tasks return None; their payload is the same text for every call.
    return _dumps(None, kind=RETURNED, task_name=task_name, serializer=serializer)


def _dumps(value: Any, *, kind: str, task_name: str, serializer: str) -> str:
    try:
        body = FORMATS[serializer].encode(value)
    except _PASSED_ON:
        raise
    except Exception as error:  # whatever a value's own __reduce__ raises
        what = _culprit(value, serializer) if kind == PARAMS else "The result"
        message = (
            f"{what} of {task_name!r} cannot be stored with serializer {serializer!r} "
            f"({type(error).__name__}). Pass plain values, or an id to load the object by"
            f"{_REMEDIES.get(serializer, '')}."
        )
        raise PayloadError(message) from error
    limit = get_settings().MAX_PAYLOAD_BYTES
    if len(body) > limit:
        what = "The arguments" if kind == PARAMS else "The result"
        message = (
            f"{what} of {task_name!r} take {len(body):,} bytes, more than "
            f"FIREFLY_JOBS['MAX_PAYLOAD_BYTES'] = {limit:,}. Store large data elsewhere and "
            f"pass a reference to it."
        )
        raise PayloadTooLargeError(message)
    return f"{serializer}:{_sign(serializer, kind, task_name, body)}:{body}"


def _culprit(value: Any, serializer: str) -> str:
    """Name the argument that cannot be stored, and its type; never its content."""
    args, kwargs = value
    for name, argument in [*enumerate(args, start=1), *kwargs.items()]:
        try:
            FORMATS[serializer].encode(argument)
        except Exception:  # noqa: BLE001 - whatever a value's own __reduce__ raises
            label = f"number {name}" if isinstance(name, int) else repr(name)
            return f"Argument {label} (a {type(argument).__name__})"
    return "An argument"


def _loads(text: str, *, kind: str, task_name: str) -> Any:
    name, _, rest = text.partition(":")
    signature, _, body = rest.partition(":")
    if name not in FORMATS:
        message = (
            f"The stored {_LABELS[kind]} of {task_name!r} have the unknown format {name[:20]!r}."
        )
        raise PayloadError(message)
    settings = get_settings()
    if settings.SIGNING:
        _verify(signature, name, kind, task_name, body)
    elif name == "pickle" and settings.SERIALIZER != "pickle":
        message = (
            f"The stored {_LABELS[kind]} of {task_name!r} are pickled and unsigned, so they were "
            f"not decoded: with SIGNING off, only the format named by SERIALIZER is read if it "
            f"can run code. Turn SIGNING on."
        )
        raise BadSignature(message)
    try:
        return FORMATS[name].decode(body)
    except _PASSED_ON:
        raise
    except Exception as error:  # unpickling runs the code of whatever was stored
        message = (
            f"The stored {_LABELS[kind]} of {task_name!r} cannot be read "
            f"({type(error).__name__}). "
            f"A class they refer to may have been moved, or changed since they were stored."
        )
        raise PayloadError(message) from error


# --- signatures


@lru_cache(maxsize=1)
def _signers() -> tuple[hmac.HMAC, ...]:
    """Return one keyed HMAC per secret, the current one first; signing copies it.

    ``hmac.digest`` would be one call, but it lets go of the interpreter lock for every
    payload, which costs a busy consumer more than all of pickling.
    """
    secrets = (django_settings.SECRET_KEY, *django_settings.SECRET_KEY_FALLBACKS)
    keys = [
        hashlib.sha256(_SALT + (s.encode() if isinstance(s, str) else s)).digest() for s in secrets
    ]
    return tuple(hmac.new(key, digestmod="sha256") for key in keys)


def _forget_secrets(*, setting: str, **_: Any) -> None:
    if setting in {"SECRET_KEY", "SECRET_KEY_FALLBACKS", "FIREFLY_JOBS"}:
        _signers.cache_clear()
        _none_returned.cache_clear()


setting_changed.connect(_forget_secrets, dispatch_uid="firefly_jobs.serializers")


def _digest(signer: hmac.HMAC, name: str, kind: str, task_name: str, body: str) -> str:
    signed = signer.copy()
    signed.update(f"{name}\0{kind}\0{task_name}\0{body}".encode())
    return signed.hexdigest()


def _sign(name: str, kind: str, task_name: str, body: str) -> str:
    if not get_settings().SIGNING:
        return ""
    return _digest(_signers()[0], name, kind, task_name, body)


def _verify(signature: str, name: str, kind: str, task_name: str, body: str) -> None:
    given = signature.encode()
    for signer in _signers():
        if hmac.compare_digest(given, _digest(signer, name, kind, task_name, body).encode()):
            return
    message = (
        f"The stored {_LABELS[kind]} of {task_name!r} carry no valid signature, so they were "
        f"not decoded. They were changed or moved in the database, or signed with another "
        f"SECRET_KEY: add the former key to SECRET_KEY_FALLBACKS."
    )
    raise BadSignature(message)


# --- model references


def _reference(value: Model) -> tuple[str, str, Any]:
    if value.pk is None or value._state.adding:
        message = (
            f"An unsaved {value._meta.label} cannot be stored, because model instances travel "
            f"as references. Save it first, or pass its field values."
        )
        raise PayloadError(message)
    return value._meta.label_lower, value._state.db or "default", value.pk


def _dereference(reference: tuple[str, str, Any]) -> Model:
    label, alias, pk = reference
    try:
        model = apps.get_model(label)
    except LookupError as error:
        message = f"The model {label!r} no longer exists in this project."
        raise PayloadError(message) from error
    try:
        found: Model = model._base_manager.using(alias).get(pk=pk)
    except ObjectDoesNotExist as error:
        message = f"{model._meta.label} {pk!r} no longer exists in database {alias!r}."
        raise PayloadError(message) from error
    return found


# --- formats


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[str, str, Any] | None:
        return _reference(obj) if isinstance(obj, Model) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Model:
        return _dereference(pid)


def _pickle_encode(value: Any) -> str:
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=5).dump(value)
    return binascii.b2a_base64(buffer.getvalue(), newline=False).decode("ascii")


def _pickle_decode(body: str) -> Any:
    return _Unpickler(io.BytesIO(binascii.a2b_base64(body))).load()


def _json_default(value: Any) -> Any:
    if isinstance(value, Model):
        label, alias, pk = _reference(value)
        return {_MODEL_KEY: label, "using": alias, "pk": str(pk)}
    if isinstance(value, Placeholder):
        return value.to_json()
    message = f"{type(value).__name__} has no JSON form; use serializer='pickle' or convert it"
    raise TypeError(message)


def _json_refuse(value: Any) -> None:
    """Refuse what JSON would silently change: dictionary keys that are no strings."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or key in _JSON_KEYS:
                message = f"a JSON object cannot have the key {key!r}"
                raise TypeError(message)
            _json_refuse(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _json_refuse(item)


def _json_encode(value: Any) -> str:
    _json_refuse(value)
    return json.dumps(value, default=_json_default, separators=(",", ":"), allow_nan=False)


def _json_decode(body: str) -> Any:
    def load(found: dict[str, Any]) -> Any:
        if _MODEL_KEY in found:
            return _dereference((found[_MODEL_KEY], found["using"], found["pk"]))
        placeholder = placeholders.from_json(found)
        return found if placeholder is None else placeholder

    return json.loads(body, object_hook=load)


class Format(NamedTuple):
    """How one serializer writes and reads a body."""

    encode: Callable[[Any], str]
    decode: Callable[[str], Any]


FORMATS = {
    "pickle": Format(_pickle_encode, _pickle_decode),
    "json": Format(_json_encode, _json_decode),
}
