"""Arguments that several commands share."""

from __future__ import annotations

import os
import re
from argparse import ArgumentParser, ArgumentTypeError
from datetime import timedelta
from typing import Any

from django.core.management.base import CommandError
from django.db import connections

from firefly_jobs.conf import get_settings, suggestion
from firefly_jobs.options import check_queue
from firefly_jobs.priorities import Band, at_least, bands

_AGE = re.compile(r"(\d+)\s*([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def queue_list(text: str) -> list[str]:
    """Parse ``a,b`` or ``*``."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name != "*":
            try:
                check_queue(name)
            except (TypeError, ValueError) as error:
                raise ArgumentTypeError(str(error)) from error
    if not names:
        message = "a queue needs a name"
        raise ArgumentTypeError(message)
    return names


def priority_bands(text: str) -> list[Band]:
    """Parse ``low,background``, ``5`` or ``-50..100``."""
    try:
        return list(bands(part for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def priorities_from(text: str) -> list[Band]:
    """Parse ``high`` or ``10``: that and everything above."""
    try:
        return [at_least(text)]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def positive(text: str) -> int:
    """Parse a whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        message = f"must be a whole number, 1 or more, got {text!r}"
        raise ArgumentTypeError(message)
    return int(text)


def process_count(text: str) -> int:
    """Parse a whole number, 1 or more, or ``auto``: the processors this process may use."""
    if text != "auto":
        return positive(text)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def positive_or_zero(text: str) -> float:
    """Parse a number of seconds, zero or more."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        message = f"must be zero or more seconds, got {text!r}"
        raise ArgumentTypeError(message)
    return number


def age(text: str) -> timedelta:
    """Parse ``7d``, ``12h``, ``30m``, ``90s`` or ``2w``."""
    match = _AGE.fullmatch(text.strip())
    if match is None:
        message = f"must be a number and a unit, such as 7d, 12h, 30m, 90s or 2w, got {text!r}"
        raise ArgumentTypeError(message)
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError as error:
        message = f"is too long an age: {text!r}"
        raise ArgumentTypeError(message) from error


def add_database(parser: ArgumentParser) -> None:
    """Declare ``--database``; :func:`database_alias` reads it."""
    parser.add_argument(
        "--database",
        metavar="ALIAS",
        help="Database alias. Default: FIREFLY_JOBS['DATABASE'].",
    )


def database_alias(options: dict[str, Any]) -> str:
    """Return what ``--database`` or the setting names.

    Raises:
        CommandError: If it is not in ``DATABASES``.
    """
    # Not a default of the parser: with bad settings even --help would end in a traceback.
    using = options["database"] or get_settings().DATABASE
    if using not in connections:
        message = f"There is no database {using!r} in DATABASES.{suggestion(using, connections)}"
        raise CommandError(message, returncode=2)
    return str(using)
