"""What the admin shows: stored data as code, moments to the second, spans in words.

Nothing here is trusted: text is escaped, what a stored object calls its ``repr`` is cut,
and a payload is decoded only if its signature verifies or its format runs no code.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from django.utils import timezone
from django.utils.formats import date_format
from django.utils.html import format_html
from django.utils.translation import gettext_lazy as _

from firefly_jobs.conf import get_settings
from firefly_jobs.exceptions import PayloadError
from firefly_jobs.models import TaskModel

ARGUMENTS_SHOWN = 50
NOTHING = "-"
_MINUTE, _HOUR_MINUTES, _DAYS_FROM_HOURS = 60, 60, 48

short_repr = reprlib.Repr()
short_repr.maxstring = short_repr.maxother = 300
short_repr.maxlong = 100
short_repr.maxdict = short_repr.maxlist = short_repr.maxtuple = 20
short_repr.maxset = short_repr.maxfrozenset = 20


def shown(raw: str, read: Callable[[], str]) -> str:
    """Return what ``read`` makes of a stored payload, or why it is not shown."""
    if raw.startswith("pickle:") and not get_settings().SIGNING:
        reason = _("it is pickled and not signed, so reading it could run anybody's code.")
        return _refused(reason)
    try:
        return format_html('<pre class="firefly-code">{}</pre>', read())
    except PayloadError as error:
        return _refused(str(error))
    except Exception as error:  # noqa: BLE001 - a stored object's own __repr__ may raise
        return _refused(f"{type(error).__name__}: {error}")


def _refused(reason: Any) -> str:
    return format_html('<p class="firefly-refused">{} {}</p>', _("Not shown:"), reason)


def as_call(task: TaskModel) -> str:
    """Return the call as it would be written; raises what ``task.params`` does."""
    params = task.params
    arguments = [short_repr.repr(value) for value in params["args"]]
    arguments += [f"{name}={short_repr.repr(value)}" for name, value in params["kwargs"].items()]
    more = len(arguments) - ARGUMENTS_SHOWN
    if more > 0:
        arguments = [*arguments[:ARGUMENTS_SHOWN], f"… {more} more"]
    name = task.func_name.rpartition(".")[2]
    if not arguments:
        return f"{name}()"
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


def moment(value: Any) -> str:
    """Return a moment to the second; the admin's own format stops at minutes."""
    return date_format(timezone.localtime(value), "Y-m-d H:i:s") if value else NOTHING


def brief_moment(value: Any) -> str:
    """Return a moment for a column: the time if it is today, else the day and the minute."""
    if not value:
        return NOTHING
    local = timezone.localtime(value)
    brief = "H:i:s" if local.date() == timezone.localdate() else "M j, H:i"
    return format_html(
        '<time datetime="{}" title="{}">{}</time>',
        *(local.isoformat(), moment(value), date_format(local, brief)),
    )


def span_of(seconds: float | None) -> str:
    """Return a number of seconds in words, or a dash for none."""
    return NOTHING if seconds is None else span(timedelta(seconds=seconds))


def span(value: timedelta) -> str:
    """Return a span in the two units that matter."""
    seconds = max(0.0, value.total_seconds())
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if round(seconds, 1) < _MINUTE:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), _MINUTE)
    if minutes < _HOUR_MINUTES:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, _HOUR_MINUTES)
    return (
        f"{hours} h {minutes} min"
        if hours < _DAYS_FROM_HOURS
        else f"{hours // 24} d {hours % 24} h"
    )
