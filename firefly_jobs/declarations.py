"""What recurs, as the code declares it: a name, a call, and when.

Declared when modules are imported, like tasks; ``syncing`` makes rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from django.conf import settings as django_settings
from django.db.models.enums import TextChoices
from django.utils.translation import gettext_lazy as _

from .conf import DURATION_SECONDS_MAX, get_settings
from .cron import parse, zone_of
from .exceptions import TaskDefinitionError
from .recurrence import Interval, jitter_seconds
from .storable import CHARACTERS, is_storable

NAME_LENGTH_MAX, DIGEST_LENGTH = 200, 32
RUNS_MAX = 2**31 - 1


class Misfire(TextChoices):
    """What becomes of occurrences whose moment passed while nobody could fire them."""

    ONCE = "once", _("the latest is made up for")
    SKIP = "skip", _("they are left out")
    ALL = "all", _("all are made up for")


class Overlap(TextChoices):
    """What becomes of an occurrence while a former one has not ended."""

    SKIP = "skip", _("it is left out")
    ALLOW = "allow", _("both run")
    QUEUE = "queue", _("it waits")


class Occurrence(NamedTuple):
    """One start of a schedule.

    Attributes:
        schedule: The schedule's id.
        moment: When it was planned for; ``None`` if a person started it.
        jitter: Seconds by which such starts are spread.
    """

    schedule: int
    moment: datetime | None
    jitter: float = 0.0

    @property
    def due(self) -> datetime | None:
        """When its call is due; ``None``: at once."""
        if self.moment is None:
            return None
        seconds = jitter_seconds(str(self.schedule), self.moment, self.jitter)
        return self.moment + timedelta(seconds=seconds)

    @property
    def is_manual(self) -> bool:  # noqa: D102 - see above
        return self.moment is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """What recurs; fields are checked when it is made.

    Attributes:
        name: Unique in the database.
        call: A job or a workflow.
        former_names: What it was called before.
        cron / every: A cron expression, or seconds; neither: it runs by hand only.
        timezone: IANA name of the zone in which ``cron`` is read.
        starts_at / ends_at: Aware moments between which it runs.
        max_runs: How often at most.
        misfire / overlap: See :class:`Misfire`, :class:`Overlap`.
        jitter: Seconds by which calls are spread.

    Raises:
        ValueError, TypeError: If something is wrong; the message names the schedule.
    """

    name: str
    call: Any
    # What it was called before: rows under these names are its own.
    former_names: tuple[str, ...] = ()
    cron: str = ""
    every: float | None = None
    timezone: str = ""
    starts_at: datetime | None = None
    ends_at: datetime | None = None
    max_runs: int | None = None
    misfire: str = Misfire.ONCE
    overlap: str = Overlap.SKIP
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for field, problem in problems_of(self).items():
            message = f"Schedule {self.name!r}, {field}: {problem}"
            raise ValueError(message)

    @property
    def alias(self) -> str:
        """The alias of the database that its calls, and so its row, belong to."""
        return str(self.call.alias)


def problems_of(plan: Any) -> dict[str, str]:
    """Return what is wrong with a declaration, or a row, by field.

    Args:
        plan: Whatever has the fields of :class:`Declaration`, but for its call.
    """
    found: dict[str, str] = {}
    for check in (
        _name_problem,
        _zone_problem,
        _recurrence_problem,
        _span_problem,
        _number_problem,
    ):
        if (problem := check(plan)) is not None:
            found.setdefault(*problem)
    for word, kind in (("misfire", Misfire), ("overlap", Overlap)):
        if getattr(plan, word) not in kind.values:
            words = ", ".join(map(repr, kind.values))
            found[word] = f"It must be one of {words}, got {getattr(plan, word)!r}."
    if (plan.misfire, plan.overlap) == (Misfire.ALL, Overlap.SKIP):
        found["misfire"] = (
            'Missed runs that are all made up for would overlap, and overlap="skip" leaves those '
            'out. Choose overlap="queue", one after the other, or overlap="allow".'
        )
    return found


def _name_problem(plan: Any) -> tuple[str, str] | None:
    name = plan.name
    if not isinstance(name, str) or not name or name != name.strip():
        return "name", f"It must be a text without outer spaces, got {name!r}."
    if not is_storable(name):
        return "name", f"It has {CHARACTERS}."
    if len(name) > NAME_LENGTH_MAX:
        return "name", f"It must have {NAME_LENGTH_MAX} characters at most, and has {len(name)}."
    return None


def _zone_problem(plan: Any) -> tuple[str, str] | None:
    if not plan.timezone:
        return None
    if not plan.cron:
        return "timezone", "A time zone belongs to a cron expression; an interval has none."
    try:
        zone_of(plan.timezone)
    except (ValueError, TypeError) as error:
        return "timezone", str(error)
    return None


def _recurrence_problem(plan: Any) -> tuple[str, str] | None:
    if plan.cron and plan.every is not None:
        return "every", "Give either a cron expression or an interval, not both."
    field = "cron" if plan.cron else "every"
    try:
        if plan.cron:
            # In any zone, so that what is wrong with either is told at once.
            parse(plan.cron, timezone=None if _zone_problem(plan) else plan.timezone or None)
        elif plan.every is not None:
            Interval(plan.every, datetime.now(UTC))
    except (ValueError, TypeError) as error:
        return field, str(error)
    return None


def _span_problem(plan: Any) -> tuple[str, str] | None:
    for word in ("starts_at", "ends_at"):
        moment = getattr(plan, word)
        if moment is not None and (not isinstance(moment, datetime) or moment.tzinfo is None):
            return word, f"It must be an aware datetime, got {moment!r}."
        if moment is not None and not 1000 <= moment.year < 9999:  # noqa: PLR2004 - what all databases hold, in any zone
            return word, f"It must be between the years 1000 and 9998, got {moment!r}."
    if plan.starts_at and plan.ends_at and plan.ends_at < plan.starts_at:
        return "ends_at", f"It ends at {plan.ends_at}, before it starts at {plan.starts_at}."
    return None


def _number_problem(plan: Any) -> tuple[str, str] | None:
    runs, jitter = plan.max_runs, plan.jitter
    is_count = isinstance(runs, int) and not isinstance(runs, bool) and 1 <= runs <= RUNS_MAX
    if runs is not None and not is_count:
        message = f"It must be a whole number, 1 to {RUNS_MAX:,}, or empty for ever; got {runs!r}."
        return "max_runs", message
    is_number = isinstance(jitter, int | float) and not isinstance(jitter, bool)
    if not is_number or not 0 <= jitter <= DURATION_SECONDS_MAX:
        return "jitter", f"It must be 0 to {DURATION_SECONDS_MAX} seconds, got {jitter!r}."
    return None


_declarations: dict[str, Declaration] = {}


def declare(declaration: Declaration) -> None:
    """Remember what a module declares.

    Raises:
        TaskDefinitionError: If another one has the name.  That of a module that is reloaded
            replaces what was there.
    """
    other = _declarations.get(declaration.name)
    if other is not None and other != declaration and not _is_reloaded(other, declaration):
        message = (
            f"The schedule {declaration.name!r} of {_kind(declaration.call)} cannot be declared: "
            f"{_kind(other.call)} has that name already. Names are unique; give one of them "
            f"another with name=."
        )
        raise TaskDefinitionError(message)
    _declarations[declaration.name] = declaration


def declared(name: str) -> Declaration | None:
    """Return what this process knows under a name."""
    return _declarations.get(name)


def all_declared() -> Iterator[Declaration]:
    """Return everything that this process knows."""
    return iter(list(_declarations.values()))


def callee(call: Any) -> str:
    """Return the name of the task or the workflow that a call is one of."""
    return str(call.task.name if hasattr(call, "task") else call.name)


def _is_reloaded(other: Declaration, declaration: Declaration) -> bool:
    """Return whether both may be the same lines of code, run again: its task is a new object."""
    task, before = (getattr(d.call, "task", d.call) for d in (declaration, other))
    return _kind(declaration.call) == _kind(other.call) and task is not before


def _kind(call: Any) -> str:
    return callee(call) if hasattr(call, "task") else f"workflow {callee(call)}"


def owner() -> str:
    """Return whose declarations those of this process are."""
    if named := get_settings().SCHEDULE_OWNER:
        return named
    module = getattr(django_settings, "SETTINGS_MODULE", None) or "project"
    return str(module).partition(".")[0]
