"""What every one of the databases stores: texts and JSON."""

from __future__ import annotations

import json
from typing import Any

CHARACTERS = "a character that no database stores: NUL, or half a surrogate pair"


def is_storable(text: str) -> bool:
    """Return whether a text has only characters that every database stores."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def json_text(value: Any) -> str:
    """Return a value as JSON.

    Raises:
        TypeError, ValueError: If JSON cannot hold it, or no database would store that.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except RecursionError:
        message = "it is nested too deeply"
        raise ValueError(message) from None
    # NUL is escaped there, and PostgreSQL refuses it all the same.
    if "\\u0000" in text or not is_storable(text):
        message = f"it has {CHARACTERS}"
        raise ValueError(message)
    return text


def json_problem(value: Any) -> str | None:
    """Return why a value is none that can be stored as JSON, if it is not."""
    try:
        json_text(value)
    except (TypeError, ValueError) as error:
        return f"It must be what JSON can hold: {error}."
    return None
