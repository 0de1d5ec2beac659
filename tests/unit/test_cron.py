"""Cron expressions against somebody who watches the clock on the wall, minute by minute.

The watcher reads no cron expression: what it looks for is drawn together with the text.
"""

import pickle
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from functools import lru_cache
from itertools import islice, pairwise, takewhile
from zoneinfo import ZoneInfo

import pytest
from django.core.exceptions import ImproperlyConfigured
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly_jobs import cron
from firefly_jobs.cron import MACROS, parse

INSTANT, MINUTE, DAY = timedelta(microseconds=1), timedelta(minutes=1), timedelta(days=1)
EPOCH = datetime(1970, 1, 1)  # noqa: DTZ001 - a wall clock's
NEW_YEAR = datetime(2026, 1, 1, tzinfo=UTC)

# Days on which clocks were set, or are, in local time.
TRANSITIONS = [
    # by an hour
    ("Europe/Oslo", date(2026, 3, 29)),
    ("Europe/Oslo", date(2026, 10, 25)),
    ("America/New_York", date(2026, 3, 8)),
    ("America/New_York", date(2026, 11, 1)),
    # back in winter, and back for Ramadan, both as negative summer time
    ("Europe/Dublin", date(2025, 10, 26)),
    ("Africa/Casablanca", date(2025, 2, 23)),
    ("Africa/Casablanca", date(2025, 4, 6)),
    # by half an hour, a quarter, two hours, three, seven, and by 44 minutes and a half
    ("Australia/Lord_Howe", date(2025, 4, 6)),
    ("Australia/Lord_Howe", date(2025, 10, 5)),
    ("Asia/Kathmandu", date(1986, 1, 1)),
    ("Antarctica/Troll", date(2025, 3, 30)),
    ("Antarctica/Troll", date(2025, 10, 26)),
    ("Antarctica/Casey", date(2023, 3, 9)),
    ("Antarctica/Vostok", date(1994, 2, 1)),
    ("Antarctica/Vostok", date(1994, 11, 1)),
    # at midnight: a day without its first hour, a day with a second last one
    ("America/Sao_Paulo", date(2018, 11, 4)),
    ("America/Sao_Paulo", date(2018, 2, 17)),
    ("America/Havana", date(2025, 3, 9)),
    ("America/Havana", date(2025, 11, 2)),
    ("Asia/Beirut", date(2025, 3, 30)),
    ("Asia/Tehran", date(2022, 3, 22)),
    # a minute after it, back into the day before
    ("America/St_Johns", date(2006, 4, 2)),
    ("America/St_Johns", date(2006, 10, 29)),
    # up to it: a day without its last half hour, or hour
    ("Asia/Pyongyang", date(2018, 5, 4)),
    ("America/Nuuk", date(2025, 3, 29)),
    ("Africa/Juba", date(2021, 1, 31)),
    # over a whole day
    ("Pacific/Apia", date(2011, 12, 30)),
    ("Pacific/Kwajalein", date(1993, 8, 21)),
    # a day shown twice but for an hour
    ("Pacific/Kwajalein", date(1969, 9, 30)),
    # not at all
    ("UTC", date(2024, 2, 29)),
]


@dataclass(frozen=True)
class Expression:
    """A cron expression, and what it means."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday

    @property
    def names_times_of_day(self):
        return not any(field.startswith("*") for field in self.text.split()[:2])

    def means(self, day):
        is_day, is_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        _, _, days, _, weekdays = self.text.split()
        needs_both = days.startswith("*") or weekdays.startswith("*")
        fits = (is_day and is_weekday) if needs_both else (is_day or is_weekday)
        return fits and day.month in self.months


@lru_cache(maxsize=len(TRANSITIONS))
def watched(zone, day):
    """Return what clocks show at each minute, from two days before ``day`` to one after it."""
    noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)
    moments = [noon + MINUTE * n for n in range(-3 * 1_440, 3 * 720)]
    where = ZoneInfo(zone)
    return [(m, (m.astimezone(where).replace(tzinfo=None) - EPOCH) // MINUTE) for m in moments]


def seen(expression, minutes, start):
    """Return when somebody who watches the clock lets the expression fire, from ``start`` on."""
    shown_days = {wall // 1_440 for _, wall in minutes}
    numbers = range(min(shown_days), max(shown_days) + 1)  # one that is left out counts as well
    days = {number for number in numbers if expression.means(EPOCH + number * DAY)}

    def matches(wall):
        is_time = wall % 60 in expression.minutes and wall // 60 % 24 in expression.hours
        return is_time and wall // 1_440 in days

    found, latest, names_times = [], minutes[0][1], expression.names_times_of_day
    for moment, wall in minutes:
        shown = range(latest + 1, wall + 1) if names_times else (wall,)
        if moment >= start and any(map(matches, shown)):
            found.append(moment)
        latest = max(latest, wall)
    return found


# --- what is drawn


def _values(first, last, favourites):
    value = st.sampled_from(favourites)
    single = value.map(lambda one: (f"{one}", {one}))
    span = st.tuples(value, value).map(sorted)
    ranges = span.map(lambda ends: (f"{ends[0]}-{ends[1]}", {*range(ends[0], ends[1] + 1)}))
    steps = st.tuples(st.just(first), st.just(last), st.integers(2, 20)).map(
        lambda of: (f"{of[0]}-{of[1]}/{of[2]}", {*range(of[0], of[1] + 1, of[2])})
    )
    lists = st.lists(single | ranges | steps, min_size=2, max_size=3).map(
        lambda parts: (",".join(text for text, _ in parts), set().union(*(of for _, of in parts)))
    )
    return single | ranges | steps | lists


def _stars(first, last):
    steps = st.integers(1, last + 3).map(lambda n: (f"*/{n}", {*range(first, last + 1, n)}))
    return st.just(("*", {*range(first, last + 1)})) | steps


@st.composite
def expressions(draw, day):
    """Draw an expression that has something to do with a day."""
    minutes = draw(_stars(0, 59) | _values(0, 59, [0, 1, 14, 15, 29, 30, 31, 45, 59]))
    hours = draw(_stars(0, 23) | _values(0, 23, [0, 1, 2, 3, 4, 16, 17, 22, 23]))
    any_day, any_month = ("*", {*range(1, 32)}), ("*", {*range(1, 13)})
    on_day = (f"{day.day}", {day.day})
    before = (f"{day - DAY:%d},{day:%d}", {(day - DAY).day, day.day})
    days = draw(st.sampled_from([any_day, any_day, any_day, on_day, before]) | _stars(1, 31))
    months = draw(st.sampled_from([any_month, any_month, (f"{day.month}", {day.month})]))
    weekday = day.isoweekday()
    others = [("*", {*range(7)}), ("*", {*range(7)}), (f"{weekday}", {weekday % 7})]
    weekdays = draw(
        st.sampled_from([*others, (f"{day:%a}", {weekday % 7}), ("0-3", {0, 1, 2, 3}), ("7", {0})])
    )
    fields = [minutes, hours, days, months, weekdays]
    return Expression(" ".join(text for text, _ in fields), *(frozenset(of) for _, of in fields))


@st.composite
def cases(draw):
    zone, day = draw(st.sampled_from(TRANSITIONS))
    return zone, day, draw(expressions(day))


@given(cases(), st.data())
@settings(max_examples=200, deadline=None)
def test_occurrences_are_those_that_a_watcher_sees_from_wherever_one_starts(case, data):
    zone, day, expression = case
    minutes = watched(zone, day)
    start, end = minutes[1_440][0], minutes[-1][0]
    wanted = seen(expression, minutes, start)
    rule = parse(expression.text, timezone=zone)

    found = list(takewhile(lambda one: one <= end, rule.following(start - INSTANT)))

    assert found == wanted
    assert all(moment.tzinfo is UTC for moment in found)
    span = int((end - start).total_seconds())
    places = st.tuples(st.integers(0, span), st.sampled_from([0, 0, 1, 999_999]))
    for seconds, micro in data.draw(st.lists(places, min_size=5, max_size=10)):
        moment = start + timedelta(seconds=seconds, microseconds=micro)
        later = [one for one in wanted if one > moment]
        former = [one for one in wanted if one <= moment]
        assert list(islice(rule.following(moment), len(later[:20]))) == later[:20]
        assert not former or rule.latest_until(moment) == former[-1]


@pytest.mark.parametrize(("zone", "day"), TRANSITIONS)
@pytest.mark.parametrize("text", ["*/5 * * * *", "7-59/10 0-23 * * *", "0 */2 * * *", "0 0 * * *"])
def test_one_step_in_either_direction_leads_to_the_neighbour(zone, day, text):
    rule = parse(text, timezone=zone)
    moment = watched(zone, day)[0][0]
    for _ in range(80):
        following = rule.next_after(moment)
        assert following > moment
        assert rule.latest_until(following) == following
        assert rule.next_after(following - INSTANT) == following
        assert rule.latest_until(following - INSTANT) in {moment, rule.latest_until(moment)}
        moment = following


def test_days_of_the_tables_are_those_on_which_clocks_are_set():
    steady = [
        zone
        for zone, day in TRANSITIONS
        if (walls := [wall for _, wall in watched(zone, day)])
        and all(after - before == 1 for before, after in pairwise(walls))
    ]

    assert steady == ["UTC"]


# --- examples


def local(text, zone):
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


@pytest.mark.parametrize(
    ("expression", "after", "expected"),
    [
        ("0 0 29 2 *", "2096-03-01", ["2104-02-29T00:00"]),
        ("0 0 */28 2 MON", "2100-01-01", ["2100-02-01T00:00", "2106-02-01T00:00"]),
        ("0 0 L * *", "2026-02-01", ["2026-02-28T00:00", "2026-03-31T00:00"]),
        ("0 0 LW * *", "2026-02-01", ["2026-02-27T00:00", "2026-03-31T00:00"]),
        ("0 0 * * 5#2", "2026-02-01", ["2026-02-13T00:00", "2026-03-13T00:00"]),
        ("0 0 * * 7L", "2026-02-01", ["2026-02-22T00:00", "2026-03-29T00:00"]),
        ("0 0 13 * FRI", "2026-02-01", ["2026-02-06T00:00", "2026-02-13T00:00"]),
        ("0 0 1-31 * FRI", "2026-02-01", ["2026-02-02T00:00"]),
        ("0 0 */1 * fri", "2026-02-01", ["2026-02-06T00:00"]),
        ("10/20 5 * jan,Mar *", "2026-02-01", ["2026-03-01T05:10", "2026-03-01T05:30"]),
        ("  0\t12 * *  * ", "2026-02-01", ["2026-02-01T12:00"]),
    ],
)
def test_syntax_means_what_the_reference_says(expression, after, expected):
    wanted = [local(one, "UTC") for one in expected]
    assert parse(expression, timezone="UTC").upcoming(local(after, "UTC"), len(wanted)) == wanted


def test_a_midnight_has_fired_when_clocks_were_set_back_over_it():
    rule = parse("0 0,12 * * *", timezone="America/St_Johns")
    first = local("2006-10-29T00:00", "America/St_Johns")
    # A minute after midnight it was 23:01 again, for nearly an hour.
    for minutes in (1, 2, 30, 60, 61):
        moment = first + minutes * MINUTE
        assert rule.latest_until(moment) == first
        assert rule.next_after(moment) == local("2006-10-29T12:00", "America/St_Johns")


@pytest.mark.parametrize("name", MACROS)
def test_a_name_stands_for_five_fields_in_any_case(name):
    assert parse(f" {name.title()} ", timezone="UTC") == parse(MACROS[name], timezone="UTC")


@pytest.mark.parametrize("text", ["* * * * *", "0-59 0-23 * * *", "0 0 * * *", "30 2 29 2 *"])
def test_the_latest_after_years_is_found_without_going_through_them(text, monkeypatch):
    rule = parse(text, timezone="Europe/Oslo")
    looks, look = 0, cron._Rule._wall

    def counted(self, moment):
        nonlocal looks
        looks += 1
        return look(self, moment)

    monkeypatch.setattr(cron._Rule, "_wall", counted)
    found = rule.latest_until(datetime(2036, 5, 1, 0, 0, 30, tzinfo=UTC))

    assert found is not None
    assert found.year == 2036
    assert 0 < looks < 100


def test_moments_of_any_zone_are_understood():
    rule = parse("0 12 * * *", timezone="Europe/Oslo")
    moment = datetime(2026, 1, 1, 20, 0, tzinfo=timezone(timedelta(hours=9)))  # in Oslo it is noon

    assert rule.latest_until(moment) == moment
    assert rule.next_after(moment) == datetime(2026, 1, 2, 11, tzinfo=UTC)


@pytest.mark.parametrize("text", ["0 0 * * *", "* * * * *"])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/New_York"])
def test_the_calendar_has_two_ends(text, zone):
    rule = parse(text, timezone=zone)
    first, last = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

    assert rule.latest_until(first) in {None, first}
    assert (rule.latest_until(first + 3 * DAY) or first) > first
    assert rule.next_after(last - 3 * DAY) < last
    assert len(rule.upcoming(last - 3 * DAY, 9_999)) < 9_999
    with pytest.raises(ValueError, match=r"Nothing fires after .*: the calendar ends"):
        rule.next_after(last)


def test_equal_expressions_are_equal_values_and_can_be_pickled():
    rule = parse("0  0 * * *", timezone="Europe/Oslo")

    assert rule == parse("@daily", timezone="Europe/Oslo") != parse("@daily", timezone="UTC")
    assert pickle.loads(pickle.dumps(rule)).next_after(NEW_YEAR) == rule.next_after(NEW_YEAR)


# --- what is refused


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("* * * *", "five fields, minute, hour, day of month, month and day of week, got 4."),
        ("* * * * * *", "got 6. For seconds use an interval: every=10."),
        ("* * * * * * *", "got 7."),
        ("", "'' must have five fields"),
        ("@dayly", "'@dayly' is not known. Did you mean '@daily'? There are @hourly,"),
        ("@reboot", "'@reboot' is not known."),
        ("60 * * * *", "'60' is no minute. Write 0-59;"),
        ("*/0 * * * *", "'*/0' is no minute"),
        ("5-1 * * * *", "'5-1' is no minute"),
        ("1,,2 * * * *", "'1,,2' is no minute"),
        ("-1 * * * *", "'-1' is no minute"),
        ("* 24 * * *", "'24' is no hour. Write 0-23;"),
        ("* * 0 * *", "'0' is no day of month. Write 1-31, L or LW;"),
        ("* * * 13 *", "'13' is no month. Write 1-12 or JAN-DEC;"),
        ("* * * * X", "'X' is no day of week. Write 0-7 or SUN-SAT,"),
        ("* * * * 5#6", "'5#6' is no day of week"),
        ("? * * * *", "'?' is no minute"),
        (f"{'9' * 190} * * * *", "is no minute"),
        (f"{'1,' * 100}1 * * * *", "must have 200 characters at most, got one of 209"),
        ("0 0 30 2 *", "never fires: no year has a day with this day of month"),
        ("0 0 31 4,6 */1", "never fires: no year has a day"),
        ("0 0 */30 2 1#2", "never fires: no year has a day"),
        (None, "must be a text of five fields, such as '30 2 * * *', got a NoneType"),
        (b"* * * * *", "got a bytes"),
    ],
)
def test_expressions_that_are_refused(expression, reason):
    with pytest.raises(ValueError, match=r"^(The|A) cron expression") as caught:
        parse(expression, timezone="UTC")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("expression", "zone"),
    [
        # The last Sunday of March has no such hour.
        ("*/5 2 * 3 7L", "Europe/Oslo"),
        # So has the second one, since 2007: what fired before never will.
        ("*/5 2 * 3 7#2", "America/New_York"),
    ],
)
def test_an_expression_whose_times_clocks_always_leave_out_is_refused(expression, zone):
    with pytest.raises(ValueError, match=f"never fires: .* clocks in {zone} are set forward"):
        parse(expression, timezone=zone)
    # What the message advises.
    named = expression.replace("*/5", "0-59/5")
    assert parse(named, timezone=zone).next_after(NEW_YEAR).minute == 0
    assert parse(expression, timezone="UTC").next_after(NEW_YEAR).minute == 0


@pytest.mark.parametrize(
    ("zone", "reason"),
    [
        ("Europe/Olso", "Did you mean 'Europe/Oslo'"),
        ("Europe", "no time zone 'Europe'"),
        ("", "no time zone ''"),
        ("../etc/passwd", "no time zone"),
        ("a\0b", "no time zone"),
        ("x" * 5_000, f"no time zone '{'x' * 100}'"),
        ("localtime", "no time zone 'localtime'. Give"),
        ("right/Europe/Oslo", "Did you mean 'Europe/Oslo'"),
        (2, "must be an IANA name or a ZoneInfo that has one, such as 'Europe/Oslo', got 2"),
        (timezone(timedelta(hours=1)), "must be an IANA name"),
    ],
)
def test_zones_that_are_refused(zone, reason):
    with pytest.raises(ValueError, match=r"time zone") as caught:
        parse("* * * * *", timezone=zone)
    assert reason in str(caught.value)


def test_a_machine_without_time_zones_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cron, "available_timezones", set)
    with pytest.raises(
        ValueError, match=r"no time zone database\. Install one: pip install tzdata"
    ):
        parse("* * * * *", timezone="Europe/Nowhere")


@pytest.mark.parametrize("moment", [NEW_YEAR.replace(tzinfo=None), None, 0, NEW_YEAR.date()])
def test_moments_that_are_not_aware_are_refused(moment):
    rule = parse("* * * * *", timezone="UTC")
    for call in (rule.next_after, rule.latest_until, rule.following):
        with pytest.raises(ValueError, match="moment must be an aware datetime, got"):
            call(moment)
    with pytest.raises(ValueError, match="moment must be an aware datetime, got"):
        rule.upcoming(moment, 1)


def test_a_moment_that_utc_has_no_year_for_is_refused():
    late = datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))
    with pytest.raises(ValueError, match="moment must be within the years 1 to 9999 in UTC"):
        parse("* * * * *", timezone="UTC").next_after(late)


def test_without_cronsim_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cronsim", None)
    cron._parse.cache_clear()
    with pytest.raises(ImproperlyConfigured, match=r"pip install 'django-firefly-jobs\[cron\]'"):
        parse("1 2 3 4 5", timezone="UTC")


def test_the_zone_is_the_projects_unless_said(settings):
    settings.TIME_ZONE = "Asia/Tokyo"

    assert parse("* * * * *").timezone == "Asia/Tokyo"
    assert parse("* * * * *", timezone=ZoneInfo("Asia/Tokyo")) == parse("* * * * *")
    assert parse("* * * * *", timezone=UTC).timezone == "UTC"
