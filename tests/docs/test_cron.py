"""The examples of the reference of cron expressions, each row."""

import re
from datetime import UTC, date, datetime, timedelta
from itertools import takewhile
from zoneinfo import ZoneInfo

import pytest

from firefly_jobs.cron import MACROS, parse

from .pages import read, section

PAGE = read("reference/cron.md")
EXAMPLES = re.findall(
    r"^\| `(.+?)` \| (\S+) \| (\d{4}-\d\d-\d\d) \| (.+?) \|$",
    section(PAGE, "When clocks are set"),
    re.MULTILINE,
)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == section(PAGE, "When clocks are set").count("\n| `") > 0


@pytest.mark.parametrize(("expression", "zone", "day", "fires"), EXAMPLES)
def test_an_expression_fires_on_the_day_as_the_page_says(
    expression: str, zone: str, day: str, fires: str
) -> None:
    wanted = date.fromisoformat(day)
    start = datetime(wanted.year, wanted.month, wanted.day, tzinfo=UTC) - timedelta(days=1)
    end = start + timedelta(days=3)
    moments = takewhile(lambda one: one < end, parse(expression, timezone=zone).following(start))
    local = [moment.astimezone(ZoneInfo(zone)) for moment in moments]

    found = [one.isoformat()[11:16] + one.isoformat()[19:] for one in local if one.date() == wanted]

    assert (", ".join(found) or "never") == fires


def test_every_name_of_an_expression_is_documented() -> None:
    assert set(re.findall(r"`(@\w+)`", PAGE)) - {"@reboot"} == set(MACROS)
