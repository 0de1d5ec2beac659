"""Cron expressions against a slow oracle, over zones whose clocks are set in odd ways."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly_jobs import cron
from firefly_jobs.cron import parse

MINUTE = timedelta(minutes=1)
DAYS = 3

# A day on which clocks are set, or the date line moves: half an hour, two hours, over midnight,
# back into the day before, a whole day, back in winter instead of forward in summer.
TRANSITIONS = [
    ("Europe/Oslo", 2026, 3, 29),
    ("Europe/Oslo", 2026, 10, 25),
    ("Australia/Lord_Howe", 2026, 4, 5),
    ("Australia/Lord_Howe", 2026, 10, 4),
    ("Africa/Casablanca", 2026, 2, 15),
    ("Africa/Casablanca", 2026, 3, 22),
    ("Pacific/Apia", 2011, 12, 30),
    ("Antarctica/Troll", 2026, 3, 29),
    ("Antarctica/Troll", 2026, 10, 25),
    ("America/Sao_Paulo", 2018, 2, 18),
    ("America/Sao_Paulo", 2018, 11, 4),
    ("America/St_Johns", 2006, 4, 2),
    ("America/St_Johns", 2006, 10, 29),
    ("America/Havana", 2026, 11, 1),
    ("Asia/Beirut", 2026, 3, 29),
]
EXPRESSIONS = [
    "* * * * *",
    "0 * * * *",
    "*/5 2 * * *",
    "*/15 0 * * *",
    "*/7 1-3 * * SUN",
    "0 */2 * * *",
    "0 0 * * *",
    "30 1 * * *",
    "0,30 2 * * *",
    "15 2,3 * * *",
    "10 23 * * *",
    "30 2 30 12 *",
]


class Oracle:
    """Watches the clock on the wall, minute by minute."""

    def __init__(self, expression, zone):
        self._fires = CronSim(expression, datetime(2000, 1, 1, tzinfo=UTC))
        self._zone = ZoneInfo(zone)
        minute, hour = expression.split()[:2]
        self._names_times = not minute.startswith("*") and not hour.startswith("*")

    def between(self, start, minutes):
        moments = [start + MINUTE * n for n in range(minutes)]
        if not self._names_times:
            return [m for m in moments if self._matches(self._wall(m))]
        found, latest = [], self._wall(start - 2 * timedelta(days=1))
        for moment in [start - MINUTE * n for n in range(2 * 1_440, 0, -1)] + moments:
            wall = self._wall(moment)
            shown_first = [latest + MINUTE * n for n in range(1, (wall - latest) // MINUTE + 1)]
            latest = max(latest, wall)
            if moment >= start and any(map(self._matches, shown_first)):
                found.append(moment)
        return found

    def _wall(self, moment):
        return moment.astimezone(self._zone).replace(tzinfo=None)

    def _matches(self, wall):
        fires = self._fires
        is_time = wall.minute in fires.minutes and wall.hour in fires.hours
        return is_time and wall.month in fires.months and fires.match_day(wall.date())


@pytest.mark.parametrize(("zone", "year", "month", "day"), TRANSITIONS)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_occurrences_around_a_day_on_which_clocks_are_set(zone, year, month, day, expression):
    start = datetime(year, month, day, tzinfo=UTC) - timedelta(hours=30)
    wanted = Oracle(expression, zone).between(start, DAYS * 1_440)
    rule = parse(expression, timezone=zone)

    found = rule.upcoming(start - timedelta(microseconds=1), len(wanted) + 1)

    assert found[:-1] == wanted
    assert found[-1] >= start + timedelta(days=DAYS)
    # From wherever one starts, in both directions.
    for hours in range(1, DAYS * 24, 5):
        moment = start + timedelta(hours=hours, minutes=hours % 60, seconds=hours % 2)
        later = [one for one in wanted if one > moment]
        former = [one for one in wanted if one <= moment]
        assert not later or rule.next_after(moment) == later[0]
        assert not former or rule.latest_until(moment) == former[-1]


@given(
    st.integers(0, 2**31).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)),
    st.sampled_from([zone for zone, *_ in TRANSITIONS]),
    st.sampled_from(EXPRESSIONS),
)
@settings(max_examples=200, deadline=None)
def test_occurrences_rise_and_are_found_from_both_sides(moment, zone, expression):
    rule = parse(expression, timezone=zone)
    first, second, third = rule.upcoming(moment, 3)
    assert moment < first < second < third
    assert rule.next_after(first) == second
    assert rule.latest_until(third - timedelta(microseconds=1)) == second
    assert rule.latest_until(third) == third


@pytest.mark.parametrize(
    ("zone", "expression", "after", "expected"),
    [
        # Half past two comes not at all, and is made up for when it would have; then twice.
        ("Europe/Oslo", "30 2 * * *", "2026-03-28T12:00", ["2026-03-29T01:00", "2026-03-30T00:30"]),
        ("Europe/Oslo", "30 2 * * *", "2026-10-24T12:00", ["2026-10-25T00:30", "2026-10-26T01:30"]),
        ("Europe/Oslo", "30 * * * *", "2026-03-29T00:00", ["2026-03-29T00:30", "2026-03-29T01:30"]),
        ("Europe/Oslo", "30 * * * *", "2026-10-25T00:00", ["2026-10-25T00:30", "2026-10-25T01:30"]),
        # The 30th of December 2011 did not take place in Samoa.
        ("Pacific/Apia", "0 12 30 12 *", "2011-12-01T00:00", ["2011-12-30T10:00"]),
        ("UTC", "0 0 29 2 *", "2096-03-01T00:00", ["2104-02-29T00:00"]),
        ("UTC", "0 0 L * *", "2026-02-01T00:00", ["2026-02-28T00:00"]),
        ("UTC", "@weekly", "2026-11-26T00:00", ["2026-11-29T00:00"]),
    ],
)
def test_examples(zone, expression, after, expected):
    after = datetime.fromisoformat(after).replace(tzinfo=UTC)
    wanted = [datetime.fromisoformat(one).replace(tzinfo=UTC) for one in expected]
    assert parse(expression, timezone=zone).upcoming(after, len(wanted)) == wanted


def test_the_latest_after_years_is_found_at_once():
    rule = parse("* * * * *", timezone="Europe/Oslo")
    moment = datetime(2036, 1, 1, 0, 0, 30, tzinfo=UTC)
    assert rule.latest_until(moment) == datetime(2036, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("* * * *", "has 4 fields. It must have five"),
        ("* * * * * *", "has 6 fields. It must have five"),
        ("", "has 0 fields"),
        ("@never", "Known names are @hourly"),
        ("60 * * * *", "Bad minute"),
        ("* 24 * * *", "Bad hour"),
        ("* * * * X", "Bad day-of-week"),
        ("*/0 * * * *", "Bad minute"),
        ("0 0 31 2 *", "Bad day-of-month"),
        ("0 0 31 4,6 */1", "Bad day-of-month"),
        (None, "is a text of five fields, got None"),
    ],
)
def test_expressions_that_are_refused(expression, reason):
    with pytest.raises(ValueError, match="cron expression") as caught:
        parse(expression, timezone="UTC")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("zone", "reason"),
    [
        ("Europe/Olso", "Did you mean 'Europe/Oslo'"),
        ("", "no time zone ''"),
        ("../etc/passwd", "no time zone"),
        (2, "IANA name"),
    ],
)
def test_zones_that_are_refused(zone, reason):
    with pytest.raises(ValueError, match=reason):
        parse("* * * * *", timezone=zone)


def test_naive_moments_are_refused():
    with pytest.raises(ValueError, match="aware"):
        parse("* * * * *", timezone="UTC").next_after(
            datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None)
        )


def test_without_cronsim_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cronsim", None)
    cron._parse.cache_clear()
    with pytest.raises(ImproperlyConfigured, match=r"pip install 'firefly_jobs\[cron\]'"):
        parse("1 2 3 4 5", timezone="UTC")


def test_the_zone_is_the_projects_unless_said(settings):
    assert parse("* * * * *").timezone == settings.TIME_ZONE
    assert parse("* * * * *", timezone=ZoneInfo("Asia/Tokyo")).timezone == "Asia/Tokyo"
