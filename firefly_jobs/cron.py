"""Cron expressions in a time zone: the moments at which one fires.

The syntax is read by `cronsim <https://pypi.org/project/cronsim/>`_.  The moments are ours,
by two rules, those of Vixie's and Debian's cron (cron(8), "Local time changes"):

- If neither the minute nor the hour begins with ``*``, the expression names times of day.
  Each fires once on a day that matches: at its first moment where clocks are set back, and
  when the gap ends where they are set forward over it.  Times that end up at the same moment
  fire once.
- Any other fires at each real minute whose local time matches: twice where clocks are set
  back, and not at all for what is left out.

To add a field: there is none to add; seconds are an interval's business.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
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
# Whatever has not come within so many years, such as a Monday on 29 February, never does.
_YEARS_MAX = 50
_MINUTE, _DAY = timedelta(minutes=1), timedelta(days=1)
_DAYS_MAX = _YEARS_MAX * 366
_FIELDS = 5


@dataclass(frozen=True, slots=True)
class Cron:
    """A cron expression in a time zone; see :func:`parse`.

    Attributes:
        expression: Its five fields.
        timezone: IANA name of the zone whose clocks it goes by.
    """

    expression: str
    timezone: str
    _rule: Any = field(repr=False, compare=False)

    def next_after(self, moment: datetime) -> datetime:
        """Return the first occurrence after an aware moment, in UTC."""
        return self.upcoming(moment, 1)[0]

    def upcoming(self, moment: datetime, count: int) -> list[datetime]:
        """Return the ``count`` occurrences after an aware moment, in UTC."""
        found = self._rule.after(_in_utc(moment))
        return [next(found) for _ in range(count)]

    def latest_until(self, moment: datetime) -> datetime | None:
        """Return the last occurrence at or before an aware moment, in UTC, if there is one."""
        return next(self._rule.until(_in_utc(moment)), None)


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
        message = f"A cron expression is a text of five fields, got {expression!r}."
        raise ValueError(message)  # noqa: TRY004 - as for every other one that is none
    return _parse(expression.strip(), zone.key)


def zone_of(zone: Any) -> ZoneInfo:
    """Return a time zone by its IANA name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(zone, ZoneInfo) and zone.key:
        return zone
    if not isinstance(zone, str):
        message = f"A time zone is given by its IANA name, such as 'Europe/Oslo', got {zone!r}."
        raise ValueError(message)  # noqa: TRY004 - as for every other one that is none
    try:
        return ZoneInfo(zone)
    except (KeyError, ValueError, OSError):
        hint = suggestion(zone, available_timezones())
        message = f"There is no time zone {zone!r}.{hint} Give an IANA name, such as 'Europe/Oslo'."
        raise ValueError(message) from None


@lru_cache(maxsize=1_000)
def _parse(expression: str, zone: str) -> Cron:
    try:
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 - an extra
    except ImportError as error:
        message = (
            "Cron expressions need the package cronsim. Install it with: "
            "pip install 'firefly_jobs[cron]'"
        )
        raise ImproperlyConfigured(message) from error
    text = MACROS.get(expression.lower(), expression)
    fields = text.split()
    if len(fields) != _FIELDS:
        known = f" Known names are {', '.join(MACROS)}." if text.startswith("@") else ""
        message = (
            f"The cron expression {expression!r} has {len(fields)} fields. It must have five: "
            f"minute, hour, day of month, month, day of week.{known}"
        )
        raise ValueError(message)
    try:
        fires = CronSim(text, datetime(2000, 1, 1))  # noqa: DTZ001 - only its fields are used
    except (CronSimError, ValueError, AssertionError) as error:
        message = (
            f"The cron expression {expression!r} cannot be read: {error}. Its fields are minute "
            f"0-59, hour 0-23, day of month 1-31, month 1-12, day of week 0-7."
        )
        raise ValueError(message) from None
    is_of_day = not fields[0].startswith("*") and not fields[1].startswith("*")
    rule = (_TimesOfDay if is_of_day else _Minutes)(fires, ZoneInfo(zone))
    if next(rule.days(date(2000, 1, 1), _DAY), None) is None:
        message = (
            f"The cron expression {expression!r} never fires: no day has this day, month and "
            f"weekday. Change one of them."
        )
        raise ValueError(message)
    return Cron(" ".join(fields), zone, rule)


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        message = f"The moment must be an aware datetime, got {moment!r}."
        raise ValueError(message)
    return moment.astimezone(UTC)


class _Rule:
    """When an expression fires, in both directions of time.

    Args:
        fires: What cronsim has read: ``minutes``, ``hours``, ``months``, ``match_day``.
        zone: Whose clocks.
    """

    def __init__(self, fires: Any, zone: ZoneInfo) -> None:
        self._fires, self._zone = fires, zone
        # As minutes since midnight, in order.
        self._times = sorted(60 * hour + minute for hour in fires.hours for minute in fires.minutes)

    def days(self, start: date, step: timedelta) -> Iterator[date]:
        """Yield the days that match, from ``start`` on, until none has come for very long."""
        day, left = start, _DAYS_MAX
        while left:
            left -= 1
            try:
                if day.month in self._fires.months and self._fires.match_day(day):
                    yield day
                    left = _DAYS_MAX
                day += step
            except OverflowError:
                return

    def _wall(self, moment: datetime) -> datetime:
        return moment.astimezone(self._zone).replace(tzinfo=None)


class _TimesOfDay(_Rule):
    """Fires at times of day, each once on a day that matches."""

    def after(self, moment: datetime) -> Iterator[datetime]:
        # A gap may move the times of a day into the next one.
        for day in self.days(self._wall(moment).date() - 2 * _DAY, _DAY):
            for found in self._moments(day):
                if found > moment:
                    yield found
                    moment = found

    def until(self, moment: datetime) -> Iterator[datetime]:
        for day in self.days(self._wall(moment).date() + _DAY, -_DAY):
            for found in reversed(self._moments(day)):
                if found <= moment:
                    yield found
                    moment = found - _MINUTE

    def _moments(self, day: date) -> list[datetime]:
        midnight = datetime(day.year, day.month, day.day)  # noqa: DTZ001 - a wall clock's
        return [self._first(midnight + timedelta(minutes=time)) for time in self._times]

    def _first(self, wall: datetime) -> datetime:
        """Return the first moment at which clocks show this time, or have gone past it."""
        while True:
            moment = wall.replace(tzinfo=self._zone).astimezone(UTC)
            if self._wall(moment) == wall:
                return moment
            wall += _MINUTE


class _Minutes(_Rule):
    """Fires at each real minute whose local time matches."""

    def after(self, moment: datetime) -> Iterator[datetime]:
        start = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        for _ in range(_DAYS_MAX):
            found = self._moments(start)
            yield from found[bisect_right(found, moment) :]
            start += _DAY

    def until(self, moment: datetime) -> Iterator[datetime]:
        start = moment.replace(hour=0, minute=0, second=0, microsecond=0)
        for _ in range(_DAYS_MAX):
            found = self._moments(start)
            yield from reversed(found[: bisect_right(found, moment)])
            start -= _DAY

    def _moments(self, start: datetime) -> list[datetime]:
        """Return the occurrences within a day of UTC."""
        end = start + _DAY
        first, last = self._wall(start), self._wall(end)
        if last - first != _DAY:
            # Clocks are set within it: look at every minute.
            minutes = (start + _MINUTE * n for n in range(24 * 60))
            return [moment for moment in minutes if self._matches(self._wall(moment))]
        offset = first - start.replace(tzinfo=None)
        found = []
        for day in (first.date(), last.date()):
            if day.month in self._fires.months and self._fires.match_day(day):
                midnight = datetime(day.year, day.month, day.day, tzinfo=UTC) - offset
                low = bisect_left(self._times, (start - midnight) / _MINUTE)
                high = bisect_left(self._times, (end - midnight) / _MINUTE)
                found += [midnight + _MINUTE * time for time in self._times[low:high]]
        return found

    def _matches(self, wall: datetime) -> bool:
        fires = self._fires
        is_time = wall.minute in fires.minutes and wall.hour in fires.hours
        return is_time and wall.month in fires.months and fires.match_day(wall.date())
