"""A workflow as a picture: SVG to stand in a page, without scripts.

:func:`draw` takes boxes and arrows and returns markup; where they stand is the business of
``layout``.  Colours are classes, which the stylesheet of the admin fills in for light and
dark pages.  Whatever is written in a box is escaped, and shortened in its middle, since
names of steps often differ at their ends; the whole of it is the tooltip.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext as _

from firefly_jobs.graphs import When
from firefly_jobs.states import Status

from .layout import Arrow, Box, Item, Line, layout

WIDTH, HEIGHT = 150, 44
# A box that stands for many has their states as a bar, and those in words.
GROUP_WIDTH, GROUP_HEIGHT = 200, 64
_PADDING = 10
_MARGIN = 12
_HEAD_HEIGHT, _HEAD_HALF = 7, 4
_LEGEND_HEIGHT, _SWATCH = 26, 12
_NAME_SIZE, _NOTE_SIZE = 13.0, 11.0
_WIDE, _NARROW = "mwMW@%&", "iljtfrI.,:;|!'()[]- "
_OTHER = "other"
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A box of the picture: a step, or many.

    Attributes:
        id: What arrows call it.
        name: What is written in it.
        status: The state of the step.
        counts: How many steps it stands for, by state; empty for one step.
        note: A second line.
        hint: More for the tooltip.
        href: Where it leads.
        level: Its priority in the workflow.
        row: The first row of its level that it may stand in.
    """

    id: int
    name: str
    status: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    note: str = ""
    hint: str = ""
    href: str = ""
    level: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Edge:
    """That ``child`` waits for ``parent``, by their ids."""

    parent: int
    child: int
    when: str = When.SUCCESS


def draw(nodes: Sequence[Node], edges: Iterable[Edge], *, label: str) -> SafeString:
    """Return the picture of a workflow.

    Args:
        nodes: Its boxes, in order.
        edges: Which of them wait for which; those of unknown boxes are left out.
        label: What the picture is called, for people who do not see it.
    """
    places = {node.id: n for n, node in enumerate(nodes)}
    arrows = [
        Arrow(places[edge.parent], places[edge.child], edge.when)
        for edge in edges
        if edge.parent in places and edge.child in places
    ]
    drawing = layout([_item(node) for node in nodes], arrows)
    legend, legend_width = _legend(nodes, {arrow.kind for arrow in arrows})
    width = max(drawing.width, legend_width) + 2 * _MARGIN
    height = drawing.height + _LEGEND_HEIGHT + 2 * _MARGIN
    parts = [
        *(_band(level, box) for level, box in drawing.bands),
        *(_rectangle(box, "firefly-frame") for box in drawing.frames),
        *_lines(drawing.lines),
        *(_node(node, box) for node, box in zip(nodes, drawing.boxes, strict=True)),
    ]
    return format_html(
        '<svg xmlns="http://www.w3.org/2000/svg" class="firefly-picture" role="group"'
        ' aria-label="{}" width="{}" height="{}" viewBox="0 0 {} {}">'
        '<g transform="translate({},{})">{}</g><g transform="translate({},{})">{}</g></svg>',
        *(_clean(label), width, height, width, height),
        *(_MARGIN, _MARGIN, legend),
        *(_MARGIN, _MARGIN + _LEGEND_HEIGHT, _joined(parts)),
    )


def _item(node: Node) -> Item:
    width, height = (GROUP_WIDTH, GROUP_HEIGHT) if node.counts else (WIDTH, HEIGHT)
    return Item(width=width, height=height, level=node.level, row=node.row)


def _joined(parts: Iterable[SafeString]) -> SafeString:
    return format_html_join("", "{}", ((part,) for part in parts))


# --- boxes


def _rectangle(box: Box, css: str, radius: int = 6) -> SafeString:
    return format_html(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}"/>',
        *(css, box.x, box.y, box.width, box.height, radius),
    )


def _text(css: str, x: int, y: int, text: str) -> SafeString:
    return format_html('<text class="{}" x="{}" y="{}">{}</text>', css, x, y, text)


def _band(level: int, box: Box) -> SafeString:
    label = _("priority {level}").format(level=level)
    name = _text("firefly-note", box.x + _PADDING, box.y + 17, label)
    return _joined([_rectangle(box, "firefly-band", 8), name])


def _node(node: Node, box: Box) -> SafeString:
    room = box.width - 2 * _PADDING
    outline = _rectangle(box, f"firefly-box firefly-is-{_known(node.status)}")
    name = shortened(node.name, room, _NAME_SIZE)
    parts = [outline, _text("firefly-name", box.x + _PADDING, box.y + 18, name)]
    if node.counts:
        parts += _bar(node.counts, Box(box.x + _PADDING, box.y + 26, room, 8))
    if node.note:
        note = shortened(node.note, room, _NOTE_SIZE)
        parts.append(_text("firefly-note", box.x + _PADDING, box.bottom - 11, note))
    hint = "\n".join(_clean(line) for line in (node.name, node.note, node.hint) if line)
    body = format_html("<title>{}</title>{}", hint, _joined(parts))
    if not node.href:
        return format_html("<g>{}</g>", body)
    return format_html('<a href="{}">{}</a>', _clean(node.href), body)


def _bar(counts: Mapping[str, int], box: Box) -> list[SafeString]:
    """Return how many are in each state, as parts of a bar."""
    total = sum(counts.values()) or 1
    parts, before = [], 0
    for status in _in_order(counts):
        left = box.x + box.width * before // total
        before += counts[status]
        # A single failure among a million is seen.
        width = max(3, box.x + box.width * before // total - left)
        left = min(left, box.right - width)
        part = Box(left, box.y, width, box.height)
        parts.append(_rectangle(part, f"firefly-box firefly-is-{_known(status)}", 0))
    return parts


def _in_order(counts: Mapping[str, int]) -> list[str]:
    order = [Status.COMPLETED, Status.RUNNING, Status.CREATED, Status.BLOCKED]
    order += [Status.CANCELLED, Status.FAILED]
    known = [str(status) for status in order if counts.get(status)]
    return known + sorted(s for s in counts if s not in Status.values and counts[s])


def _known(status: str) -> str:
    """Return a state as it may stand in a class."""
    return str(status) if status in Status.values else _OTHER


# --- arrows


def _lines(lines: Sequence[Line]) -> list[SafeString]:
    """Return the arrows: what several share is drawn once, and all heads point down."""
    drawn: set[tuple[str, tuple[int, int], tuple[int, int]]] = set()
    parts = []
    heads: dict[tuple[str, tuple[int, int]], None] = {}
    for line in lines:
        path, at = [], None
        for start, end in pairwise(line.points):
            if (line.kind, start, end) in drawn:
                continue
            drawn.add((line.kind, start, end))
            if at != start:
                path.append(f"M{start[0]} {start[1]}")
            path.append(_segment(start, end, is_last=end == line.points[-1]))
            at = end
        if path:
            css = f"firefly-edge {_style(line.kind)}".strip()
            parts.append(format_html('<path class="{}" d="{}"/>', css, "".join(path)))
        heads[line.kind, line.points[-1]] = None
    for _kind, (x, y) in heads:
        head = f"M{x} {y}l{-_HEAD_HALF} {-_HEAD_HEIGHT}h{2 * _HEAD_HALF}z"
        parts.append(format_html('<path class="firefly-head" d="{}"/>', head))
    return parts


def _segment(start: tuple[int, int], end: tuple[int, int], *, is_last: bool) -> str:
    """Return a curve that leaves and arrives straight down; at the end it leaves room."""
    (x, y), (to_x, to_y) = start, end
    to_y -= _HEAD_HEIGHT - 1 if is_last else 0
    if x == to_x:
        return f"V{to_y}"
    bend = (to_y - y) * 2 // 3
    return f"C{x} {y + bend} {to_x} {to_y - bend} {to_x} {to_y}"


def _style(when: str) -> str:
    is_dashed = when in {When.FAILURE, When.ALWAYS}
    return f"firefly-when-{when}" if is_dashed else ""


# --- what it means


def _legend(nodes: Sequence[Node], whens: set[str]) -> tuple[SafeString, int]:
    """Return what colours and dashes mean that are there, and how wide that is."""
    found: dict[str, int] = {}
    for node in nodes:
        for status, count in (node.counts or {node.status: 1}).items():
            found[status] = found.get(status, 0) + count
    parts: list[SafeString] = []
    x = 0
    for status in _in_order(found):
        css = f"firefly-box firefly-is-{_known(status)}"
        parts.append(_rectangle(Box(x, 2, _SWATCH, _SWATCH), css, 3))
        word = str(Status(status).label) if status in Status.values else status
        text = f"{shortened(word, WIDTH, _NOTE_SIZE)} {found[status]:,}"
        parts.append(_text("firefly-note", x + _SWATCH + 5, 12, text))
        x += _SWATCH + 5 + int(_length(text, _NOTE_SIZE)) + 18
    words = {When.FAILURE: _("if it fails"), When.ALWAYS: _("however it ends")}
    for when, word in words.items():
        if when in whens:
            css = f"firefly-edge {_style(when)}"
            parts.append(format_html('<path class="{}" d="M{} 8h26"/>', css, x))
            parts.append(_text("firefly-note", x + 32, 12, word))
            x += 32 + int(_length(word, _NOTE_SIZE)) + 18
    return _joined(parts), max(0, x - 18)


# --- text


def _clean(text: str) -> str:
    """Return a text without characters that no markup may contain."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def _length(text: str, size: float) -> float:
    """Return about how wide a text is: no font is known here, so on the safe side."""
    return sum(_advance(c) for c in text) * size


def _advance(c: str) -> float:
    if unicodedata.east_asian_width(c) in {"W", "F"}:
        return 1.05
    if c in _WIDE:
        return 0.92
    if c in _NARROW:
        return 0.38
    return 0.7 if c.isupper() else 0.58


def shortened(text: str, width: float, size: float) -> str:
    """Return a text that fits into ``width``, shortened in its middle if need be."""
    text = " ".join(_clean(text).split()) or "\N{NO-BREAK SPACE}"
    if _length(text, size) <= width:
        return text
    room = width - size * 0.9  # of the ellipsis
    start, end = "", ""
    for left, right in zip(text, reversed(text), strict=True):
        if _length(start + left + end, size) > room:
            break
        start += left
        if _length(start + right + end, size) > room:
            break
        end = right + end
    return f"{start}…{end}"
