"""Cron expressions in a time zone: the moments at which one fires.

The syntax is read by `cronsim <https://pypi.org/project/cronsim/>`_.  The moments are ours,
by two rules, those of Vixie's and Debian's cron (cron(8), "Local time changes"):

- If neither the minute nor the hour begins with ``*``, the expression names times of day.
  Each fires once on a day that matches: when clocks first show it, or go past it because
  they are set forward.  Times that end up at the same moment fire once.
- Any other fires at each real minute whose local time matches: twice where clocks are set
  back, and not at all for what is left out.

Cronsim's own iterator means the same, but is not used: as of version 2.8 it leaves out the
first part of an hour where clocks are set by a fraction of one (Lord Howe, Kathmandu), comes
to no end where they are set back over midnight by a minute more (St. John's), and answers
with a moment before the one it was asked about while they show an hour for the second time.

To add a field: there is none to add; seconds are an interval's business.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from .conf import suggestion

MACROS = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
EXPRESSION_LENGTH_MAX = 200
_FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day of month": "1-31, L or LW",
    "month": "1-12 or JAN-DEC",
    "day of week": "0-7 or SUN-SAT, 5L for the last or 5#2 for the second Friday",
}
# The longest there is between two days that match is 40 years, for a weekday on 29 February.
_DAYS_MAX = 50 * 366
# Far enough for what the time zone database knows of the future to be one rule for ever; and
# every kind of year comes within the 28 years after it.
_PROBE = datetime(2100, 1, 1, tzinfo=UTC)
# A machine's own zone, and copies that count leap seconds: not the same everywhere.
_NO_ZONES = {"localtime", "posixrules", "Factory", "posix", "right"}
_NAME_LENGTH_MAX = 100
_INSTANT, _MINUTE, _DAY = timedelta(microseconds=1), timedelta(minutes=1), timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression in a time zone; see :func:`parse`.

    Attributes:
        expression: Its five fields.
        timezone: IANA name of the zone whose clocks it goes by.
    """

    expression: str
    timezone: str
    _rule: _Rule = field(repr=False, compare=False)

    def following(self, moment: datetime) -> Iterator[datetime]:
        """Yield the occurrences after an aware moment, in UTC, as far as the calendar goes."""
        return self._rule.following(in_utc(moment))

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence after an aware moment, in UTC.

        Raises:
            ValueError: If the calendar, which ends with the year 9999, has none.
        """
        return first_of(self.following(moment), moment)

    def upcoming(self, moment: datetime, count: int) -> list[datetime]:
        """Return the first ``count`` occurrences after an aware moment, in UTC."""
        return list(islice(self.following(moment), count))

    def latest_until(self, moment: datetime) -> datetime | None:
        """Return the last occurrence at or before an aware moment, in UTC, if there is one."""
        return self._rule.latest_until(in_utc(moment))


def parse(expression: str, *, timezone: Any = None) -> Cron:
    """Read a cron expression.

    Args:
        expression: ``minute hour day-of-month month day-of-week``, or ``@daily`` and its like.
        timezone: IANA name of a zone, or a ``ZoneInfo``; default ``settings.TIME_ZONE``.

    Raises:
        ValueError: If it is malformed or never fires, or there is no such zone.
        ImproperlyConfigured: If cronsim is not installed.
    """
    zone = zone_of(settings.TIME_ZONE if timezone is None else timezone)
    given: Any = expression
    if not isinstance(given, str):
        message = (
            f"A cron expression must be a text of five fields, such as '30 2 * * *', got a "
            f"{type(given).__name__}."
        )
        raise ValueError(message)  # noqa: TRY004 - as for every other one that is none
    if len(given) > EXPRESSION_LENGTH_MAX:
        message = (
            f"A cron expression must have {EXPRESSION_LENGTH_MAX} characters at most, got one of "
            f"{len(given)}. Write lists of values as ranges and steps."
        )
        raise ValueError(message)
    return _parse(given.strip(), zone.key)


def zone_of(zone: Any) -> ZoneInfo:
    """Return a time zone by its IANA name, or the one that some other object has as its key.

    Raises:
        ValueError: If there is none.
    """
    name = "UTC" if zone is UTC else getattr(zone, "key", zone)
    if not isinstance(name, str):
        message = (
            f"A time zone must be an IANA name or a ZoneInfo that has one, such as 'Europe/Oslo', "
            f"got {zone!r}."
        )
        raise ValueError(message)  # noqa: TRY004 - as for every other one that is none
    if name.split("/")[0] not in _NO_ZONES and len(name) <= _NAME_LENGTH_MAX:
        with suppress(KeyError, ValueError, OSError):
            return ZoneInfo(name)
    raise ValueError(_unknown_zone(name[:_NAME_LENGTH_MAX]))


def _unknown_zone(name: str) -> str:
    known = available_timezones()
    if not known:
        return (
            f"There is no time zone {name!r}, because this machine has no time zone database. "
            f"Install one: pip install tzdata"
        )
    hint = suggestion(name, known - _NO_ZONES)
    return f"There is no time zone {name!r}.{hint} Give an IANA name, such as 'Europe/Oslo'."


def in_utc(moment: Any, *, word: str = "moment") -> datetime:
    """Return an aware moment in UTC.

    Raises:
        ValueError: If it is none: without an offset it would be read in the machine's own zone.
    """
    if not isinstance(moment, datetime) or moment.utcoffset() is None:
        message = (
            f"{word} must be an aware datetime, got {moment!r}. Give it a time zone, such as "
            f"datetime(2026, 3, 29, tzinfo=UTC)."
        )
        raise ValueError(message)
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        message = f"{word} must be within the years 1 to 9999 in UTC, got {moment!r}."
        raise ValueError(message) from None


def first_of(occurrences: Iterator[datetime], moment: datetime) -> datetime:
    """Return the first of the occurrences after a moment.

    Raises:
        ValueError: If there is none.
    """
    found = next(occurrences, None)
    if found is None:
        message = f"Nothing fires after {moment}: the calendar ends with the year 9999."
        raise ValueError(message)
    return found


# --- reading


@lru_cache(maxsize=1_000)
def _parse(expression: str, zone: str) -> Cron:
    fields = MACROS.get(expression.lower(), expression).split()
    if len(fields) != len(_FIELDS):
        raise ValueError(_wrong_number(expression, len(fields)))
    fires = _read(expression, fields)
    is_of_day = not fields[0].startswith("*") and not fields[1].startswith("*")
    rule = (_TimesOfDay if is_of_day else _Minutes)(fires, ZoneInfo(zone))
    if next(rule.days(_PROBE.date(), _DAY), None) is None:
        raise ValueError(_no_such_day(expression))
    if next(rule.following(_PROBE), None) is None:
        message = (
            f"The cron expression {expression!r} never fires: on the days that it names, clocks "
            f"in {zone} are set forward over its times. Take another hour, or begin neither the "
            f"minute nor the hour with '*': then it fires when the gap ends."
        )
        raise ValueError(message)
    return Cron(" ".join(fields), zone, rule)


def _read(expression: str, fields: Sequence[str]) -> Any:
    """Return what cronsim makes of the fields."""
    try:
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = (
            "Cron expressions need the package cronsim. Install it with: "
            "pip install 'django-firefly-jobs[cron]'"
        )
        raise ImproperlyConfigured(message) from error

    def read(texts: Sequence[str]) -> Any:
        try:
            # The moment is of no importance; nobody asks this one for the next.
            return CronSim(" ".join(texts), _PROBE)
        except (CronSimError, ValueError, AssertionError):
            return None

    fires = read(fields)
    if fires is not None:
        return fires
    for number, (name, values) in enumerate(_FIELDS.items()):
        text = fields[number]
        if read([text if other == number else "*" for other in range(len(_FIELDS))]) is None:
            message = (
                f"The cron expression {expression!r} cannot be read: {text!r} is no {name}. Write "
                f"{values}; lists 1,2; ranges 1-5; steps */2 or 1-9/2; or * for every one."
            )
            raise ValueError(message)
    # Each can be read by itself: no month has the day.
    raise ValueError(_no_such_day(expression))


def _wrong_number(expression: str, count: int) -> str:
    if expression.startswith("@"):
        hint = suggestion(expression.lower(), MACROS)
        return (
            f"The cron expression {expression!r} is not known.{hint} There are {', '.join(MACROS)}."
        )
    remedy = ""
    if count == len(_FIELDS) + 1:
        remedy = " For seconds use an interval: every=10."
    return (
        f"The cron expression {expression!r} must have five fields, minute, hour, day of month, "
        f"month and day of week, got {count}.{remedy}"
    )


def _no_such_day(expression: str) -> str:
    return (
        f"The cron expression {expression!r} never fires: no year has a day with this day of "
        f"month, month and day of week. Change one of them, or take 'L' for the last day of a "
        f"month."
    )


# --- rules


class _Rule:
    """When an expression fires, in both directions of time.

    No zone has ever set its clocks twice within two days (tzdata 2025b), so within one day
    there is one change at most.

    Args:
        fires: What cronsim has read: ``minutes``, ``hours``, ``months``, ``match_day``.
        zone: Whose clocks.
    """

    def __init__(self, fires: Any, zone: ZoneInfo) -> None:
        self._fires, self._zone = fires, zone
        # As minutes since midnight, in order.
        self._times: list[int] = sorted(
            60 * hour + minute for hour in fires.hours for minute in fires.minutes
        )

    def following(self, moment: datetime) -> Iterator[datetime]:
        """Yield what comes after a moment, until nothing has come for very long."""
        try:
            yield from self._following(moment)
        except OverflowError:  # the last or the first year
            return

    def latest_until(self, moment: datetime) -> datetime | None:
        """Return what comes last at or before a moment, unless that is very long ago."""
        try:
            return self._latest_until(moment)
        except OverflowError:
            return None

    @abstractmethod
    def _following(self, moment: datetime) -> Iterator[datetime]: ...

    @abstractmethod
    def _latest_until(self, moment: datetime) -> datetime | None: ...

    def days(self, start: date, step: timedelta) -> Iterator[date]:
        """Yield the days that match, from ``start`` on, until none has come for very long."""
        day, left = start, _DAYS_MAX
        while left:
            left -= 1
            if self._matches(day):
                yield day
                left = _DAYS_MAX
            day += step

    def _matches(self, day: date) -> bool:
        return day.month in self._fires.months and self._fires.match_day(day)

    def _wall(self, moment: datetime) -> datetime:
        """Return what clocks show."""
        return moment.astimezone(self._zone).replace(tzinfo=None)

    def _offset(self, moment: datetime) -> timedelta:
        return self._wall(moment) - moment.replace(tzinfo=None)

    def _change(self, start: datetime, end: datetime) -> datetime:
        """Return when clocks are set between two moments, to the second; ``end`` if never."""
        start, second = start.replace(microsecond=0), timedelta(seconds=1)
        before = self._offset(start)
        places = range((end - start) // second)
        number = bisect_left(
            places, True, key=lambda number: self._offset(start + number * second) != before
        )
        return start + number * second


class _TimesOfDay(_Rule):
    """Fires at times of day, each once on a day that matches.

    That is when clocks show it for the first time or have gone past it, which comes in the
    same order as the times.
    """

    def _following(self, moment: datetime) -> Iterator[datetime]:
        # What fires later is later than what clocks have shown so far.
        for day in self.days(self._wall(moment).date(), _DAY):
            place = self._places(day)
            for time in self._times[bisect_right(self._times, moment, key=place) :]:
                if (found := place(time)) > moment:
                    yield found
                    moment = found

    def _latest_until(self, moment: datetime) -> datetime | None:
        # They may have shown the next day, and have been set back over midnight.
        for day in self.days(self._wall(moment).date() + _DAY, -_DAY):
            place = self._places(day)
            if number := bisect_right(self._times, moment, key=place):
                return place(self._times[number - 1])
        return None

    def _places(self, day: date) -> Callable[[int], datetime]:
        """Return what turns minutes since midnight into moments."""
        midnight = datetime(day.year, day.month, day.day)  # noqa: DTZ001 - a wall clock's
        start, end = self._first(midnight), self._first(midnight + _DAY)
        if end - start == _DAY:
            # Clocks are not set within it, or only behind the first time that its end is shown.
            return lambda time: start + time * _MINUTE
        return lambda time: self._first(midnight + time * _MINUTE)

    def _first(self, wall: datetime) -> datetime:
        """Return the first moment at which clocks show this time, or have gone past it."""
        moment = wall.replace(tzinfo=self._zone).astimezone(UTC)
        if self._wall(moment) == wall:
            return moment
        # In a gap fold=0 goes by the offset before it, so ends up behind it, and fold=1 in front
        # of it (PEP 495).
        return self._change(wall.replace(tzinfo=self._zone, fold=1).astimezone(UTC), moment)


class _Minutes(_Rule):
    """Fires at each real minute whose local time matches."""

    def _following(self, moment: datetime) -> Iterator[datetime]:
        start, left = moment + _INSTANT, _DAYS_MAX
        while left:
            left -= 1
            end = start.replace(hour=0, minute=0, second=0, microsecond=0) + _DAY
            for base, times in self._within(start, end):
                for time in times:
                    yield base + time * _MINUTE
                    left = _DAYS_MAX
            start = end

    def _latest_until(self, moment: datetime) -> datetime | None:
        end = moment + _INSTANT
        for _ in range(_DAYS_MAX):
            start = (end - _INSTANT).replace(hour=0, minute=0, second=0, microsecond=0)
            for base, times in reversed(self._within(start, end)):
                if times:
                    return base + times[-1] * _MINUTE
            end = start
        return None

    def _within(self, start: datetime, end: datetime) -> list[tuple[datetime, list[int]]]:
        """Return the times from one moment of a day of UTC to before another, by their midnight."""
        # Local dates are those of UTC, or a day off.
        if not any(self._matches(start.date() + number * _DAY) for number in (-1, 0, 1)):
            return []
        before, after = self._offset(start), self._offset(end)
        if before == after:
            return self._shown(start, end, before)
        change = self._change(start, end)
        return [*self._shown(start, change, before), *self._shown(change, end, after)]

    def _shown(
        self, start: datetime, end: datetime, offset: timedelta
    ) -> list[tuple[datetime, list[int]]]:
        found = []
        for day in dict.fromkeys(((start + offset).date(), (end + offset).date())):
            if self._matches(day):
                midnight = datetime(day.year, day.month, day.day, tzinfo=UTC) - offset
                low = bisect_left(self._times, (start - midnight) / _MINUTE)
                high = bisect_left(self._times, (end - midnight) / _MINUTE)
                found.append((midnight, self._times[low:high]))
        return found
