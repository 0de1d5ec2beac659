"""The picture of a workflow: nothing overlaps, arrows point down, and no name is markup."""

import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import firefly_jobs
from firefly_jobs.admin.layout import (
    COLUMNS_MAX,
    FRAME_MIN,
    Arrow,
    Box,
    Item,
    Layout,
    _Drawing,
    layout,
)
from firefly_jobs.admin.pictures import Edge, Node, draw, shortened
from firefly_jobs.states import Status

SVG = "{http://www.w3.org/2000/svg}"


def items(*levels: int) -> list[Item]:
    return [Item(width=100, height=40, level=level) for level in levels]


def arrows(*pairs: tuple[int, int], kind: str = "success") -> list[Arrow]:
    return [Arrow(parent, child, kind) for parent, child in pairs]


def overlap(one: Box, other: Box) -> bool:
    return (
        one.x < other.right
        and other.x < one.right
        and one.y < other.bottom
        and other.y < one.bottom
    )


def carrier(drawing: Layout, members: tuple[int, ...]) -> Box:
    """Return the box that an arrow meets: that of the only member, or the frame around all."""
    boxes = [drawing.boxes[n] for n in members]
    if len(boxes) == 1:
        return boxes[0]
    (frame,) = [f for f in drawing.frames if all(inside(box, f) for box in boxes)]
    return frame


def inside(box: Box, outer: Box) -> bool:
    return (
        outer.x <= box.x
        and box.right <= outer.right
        and outer.y <= box.y
        and box.bottom <= outer.bottom
    )


def is_sound(drawing: Layout, drawn: list[Arrow]) -> None:
    boxes = drawing.boxes
    for n, box in enumerate(boxes):
        assert inside(box, Box(0, 0, drawing.width, drawing.height))
        assert not any(overlap(box, other) for other in boxes[n + 1 :])
    for n, frame in enumerate(drawing.frames):
        assert not any(overlap(frame, other) for other in drawing.frames[n + 1 :])
        assert all(inside(box, frame) or not overlap(box, frame) for box in boxes)
    told = {
        (p, c, line.kind) for line in drawing.lines for p in line.parents for c in line.children
    }
    assert told == {(a.parent, a.child, a.kind) for a in drawn}
    for line in drawing.lines:
        parent, child = carrier(drawing, line.parents), carrier(drawing, line.children)
        assert line.points[0] == (parent.middle, parent.bottom)
        assert line.points[-1] == (child.middle, child.y)
        assert parent.bottom < child.y
        for (x, y), (to_x, to_y) in pairwise(line.points):
            assert y < to_y
            # A curve stays between the two heights; where a box is beside, it goes straight.
            for box in boxes:
                if box.y < to_y and y < box.bottom:
                    assert x == to_x
                    assert not box.x <= x <= box.right


@st.composite
def graphs(draw_from):
    count = draw_from(st.integers(1, 24))
    levels = draw_from(st.lists(st.sampled_from([0, 0, 5, -3]), min_size=count, max_size=count))
    places = st.integers(0, count - 1)
    kinds = st.sampled_from(["success", "failure", "always"])
    pairs = draw_from(st.lists(st.tuples(places, places, kinds), max_size=60))
    found = [Arrow(min(a, b), max(a, b), kind) for a, b, kind in pairs if a != b]
    return items(*levels), list(dict.fromkeys(found))


@given(graphs())
@settings(max_examples=200, deadline=None)
def test_whatever_the_graph_nothing_overlaps_and_arrows_lead_down_past_all_boxes(graph):
    boxes, drawn = graph
    is_sound(layout(boxes, drawn), drawn)


@given(graphs())
@settings(max_examples=50, deadline=None)
def test_the_same_graph_gives_the_same_drawing(graph):
    boxes, drawn = graph
    assert layout(boxes, drawn) == layout(boxes, drawn)


def test_a_diamond_is_symmetric():
    a, b, c, d = layout(items(0, 0, 0, 0), arrows((0, 1), (0, 2), (1, 3), (2, 3))).boxes

    assert a.y < b.y == c.y < d.y
    assert abs(a.middle - d.middle) <= 1
    assert abs((b.middle + c.middle) / 2 - a.middle) <= 1


def crossings(drawing: Layout) -> int:
    ends = [(line.points[0][0], line.points[-1][0]) for line in drawing.lines]
    return sum((a - c) * (b - d) < 0 for n, (a, b) in enumerate(ends) for c, d in ends[n + 1 :])


def test_arrows_that_need_not_cross_do_not():
    drawn = arrows((0, 7), (1, 6), (2, 5), (3, 4))

    assert crossings(layout(items(*[0] * 8), drawn)) == 0


def test_boxes_that_are_alike_stand_in_a_frame():
    count = 48
    drawn = arrows(*((0, n) for n in range(1, count + 1)), *((n, 49) for n in range(1, count + 1)))
    drawing = layout(items(*[0] * (count + 2)), drawn)

    is_sound(drawing, drawn)
    assert len(drawing.frames) == 1
    assert len(drawing.lines) == 2
    assert len({box.x for box in drawing.boxes[1:-1]}) == COLUMNS_MAX


def test_a_few_that_are_alike_stand_side_by_side():
    count = FRAME_MIN - 1
    drawing = layout(items(*[0] * (count + 1)), arrows(*((0, n) for n in range(1, count + 1))))

    assert not drawing.frames
    assert len({box.y for box in drawing.boxes[1:]}) == 1


def test_levels_of_priority_are_bands_with_the_highest_on_top():
    drawing = layout(items(-5, 10, 10, 0), arrows((1, 2)))

    assert [level for level, _ in drawing.bands] == [10, 0, -5]
    assert all(upper.bottom < lower.y for (_, upper), (_, lower) in pairwise(drawing.bands))
    bands = dict(drawing.bands)
    for box, level in zip(drawing.boxes, (-5, 10, 10, 0), strict=True):
        assert inside(box, bands[level])


def test_a_step_added_behind_a_lower_level_stands_below_it():
    drawing = layout(items(-3, 0), arrows((0, 1)))

    is_sound(drawing, arrows((0, 1)))


def test_a_circle_is_drawn_without_one_of_its_arrows():
    drawing = layout(items(0, 0, 0), arrows((0, 1), (1, 2), (2, 0)))

    is_sound(drawing, arrows((0, 1), (1, 2)))


def test_nothing_is_drawn_of_nothing():
    assert layout([], []).boxes == ()
    assert draw([], [], label="empty").startswith("<svg ")


def test_arrows_that_pass_rows_share_one_trunk_per_box():
    drawn = arrows(*((a, b) for b in range(60) for a in range(b)))

    drawing = _Drawing(items(*[0] * 60), drawn)

    # Without trunks a place in each passed row for each arrow: 34,220.
    assert sum(len(row) for row in drawing._rows) == 60 + sum(range(59))
    assert len(drawing.placed().lines) == len(drawn)


# --- the markup


def parsed(nodes: list[Node], edges: list[Edge] | None = None) -> ET.Element:
    return ET.fromstring(draw(nodes, edges or [], label="picture"))


def texts(picture: ET.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "]]></text></svg><script>",
    "{{ 7 * 7 }} {% load %} {0} %s",
    "\x00\x08\ud800\uffff bell",
    "\u202egnp.exe",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_markup(name):
    hostile = Node(id=1, name=name, status=name, note=name, hint=name, href=f'/x?{name[:1]}&y="<')
    counted = Node(id=2, name=name, counts={name: 3})
    markup = draw([hostile, counted], [Edge(1, 2, name)], label=name)

    picture = ET.fromstring(markup)
    tags = {element.tag.removeprefix(SVG) for element in picture.iter()}
    assert tags == {"svg", "g", "a", "title", "rect", "text", "path"}
    assert not any(a.startswith("on") for element in picture.iter() for a in element.attrib)
    classes = {css for element in picture.iter() for css in element.get("class", "").split()}
    assert all(re.fullmatch(r"firefly-[a-z-]+", css) for css in classes)


@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_whatever_a_step_is_called_the_picture_can_be_read(name, note):
    (title,) = parsed([Node(id=1, name=name, note=note, status="created")]).iter(f"{SVG}title")
    assert all(word in (title.text or "") for word in re.findall(r"[a-zA-Z0-9]+", name))


def test_a_long_name_is_shortened_in_its_middle_and_told_in_full():
    name = "convert-the-orders-of-customer-0017"
    picture = parsed([Node(id=1, name=name, status="failed", href="/task/1")])

    shown = next(text for text in texts(picture) if "…" in text)
    before, _, after = shown.partition("…")
    assert name.startswith(before)
    assert name.endswith(after)
    assert len(shown) > 12
    (link,) = picture.iter(f"{SVG}a")
    assert link.get("href") == "/task/1"
    assert next(link.iter(f"{SVG}title")).text == name


def test_what_fits_is_not_shortened():
    assert shortened("transform", 120, 13) == "transform"
    assert shortened("iiiiiiiiiiiiiiiiiii", 120, 13) == "iiiiiiiiiiiiiiiiiii"
    assert "…" in shortened("MMMMMMMMMMMMMMMMMMM", 120, 13)


def test_the_legend_tells_which_states_and_conditions_there_are():
    nodes = [Node(id=n, name=f"s{n}", status=s) for n, s in enumerate(("failed", "completed"))]

    with_conditions = texts(parsed(nodes, [Edge(1, 0, "failure"), Edge(1, 0, "always")]))
    plain = texts(parsed(nodes, [Edge(1, 0)]))

    assert plain[:2] == ["completed 1", "failed 1"]
    assert with_conditions[2:4] == ["if it fails", "however it ends"]
    assert "if it fails" not in plain


def test_arrows_on_failure_and_on_any_end_are_told_apart():
    nodes = [Node(id=n, name=f"s{n}", status="created") for n in range(4)]
    edges = [Edge(0, 1), Edge(0, 2, "failure"), Edge(0, 3, "always")]
    paths = [p.get("class") for p in parsed(nodes, edges).iter(f"{SVG}path")]

    assert paths.count("firefly-edge") == 1
    # Once as an arrow, once in the legend.
    assert paths.count("firefly-edge firefly-when-failure") == 2
    assert paths.count("firefly-edge firefly-when-always") == 2
    assert paths.count("firefly-head") == 3


def test_a_single_failure_among_many_is_seen():
    picture = parsed([Node(id=1, name="extract", counts={"completed": 999_999, "failed": 1})])
    (group,) = [g for g in picture.iter(f"{SVG}g") if g.find(f"{SVG}title") is not None]
    bars = list(group.iter(f"{SVG}rect"))[1:]

    assert [bar.get("class", "").split("-")[-1] for bar in bars] == ["completed", "failed"]
    assert int(bars[1].get("width", 0)) >= 3


@pytest.mark.parametrize("status", list(Status))
def test_every_state_has_a_colour_of_its_own(status):
    css = (Path(firefly_jobs.__file__).parent / "static/firefly_jobs/admin.css").read_text()
    assert f".firefly-is-{status} " in css
