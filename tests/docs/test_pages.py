"""The pages hold together: links resolve, decisions have their parts, nothing is left open."""

import re
from pathlib import Path

import pytest

import firefly_jobs

from .pages import DOCS, PAGES, ROOT, anchors, headings, links, name_of

README_LINES_MAX = 200
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))
PARTS = [
    "Situation",
    "Decision",
    "Consequences",
    "Considered",
    "How we would notice that it was wrong",
]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        for link in links(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.exists() and target not in seen:
                ahead.append(target)
    assert set(PAGES) - seen == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_nothing_is_left_open(page: Path) -> None:
    assert re.findall(r"\b(?:TODO|TBD|FIXME|XXX)\b", page.read_text()) == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < README_LINES_MAX


@pytest.mark.parametrize("page", DECISIONS, ids=name_of)
def test_a_decision_has_its_parts(page: Path) -> None:
    assert headings(page.read_text(), 2) == PARTS


def test_decisions_are_numbered_without_gaps() -> None:
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


def test_the_changelog_has_the_version_of_the_package() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {firefly_jobs.__version__}" in text
    assert "## Unreleased" in text
