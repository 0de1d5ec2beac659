"""Where the boxes and arrows of a workflow's picture stand.

A layered drawing after Sugiyama, Tagawa and Toda, "Methods for visual understanding of
hierarchical system structures" (1981): boxes in rows by the longest path from the start, each
row ordered by the mean place of its neighbours so that fewer arrows cross, then moved
sideways to where their neighbours are.  Levels of priority are bands of rows.

What keeps it readable: many boxes with the same parents and the same children stand in one
frame, and an arrow to or from the frame means each of them; arrows that pass rows share a
trunk per source, and have room of their own in each row, so that they cross no box.

Pure: the same boxes and arrows give the same drawing.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, sqrt

# As many alike as this stand in a frame, in at most so many columns.
FRAME_MIN = 7
COLUMNS_MAX = 6
SWEEPS = 12
_GAP, _ROW_GAP_MIN, _ROW_GAP_MAX = 20, 40, 88
_FRAME_PADDING, _FRAME_GAP = 10, 10
_TRUNK_WIDTH, _TRUNK_GAP = 6, 10
_BAND_LABEL, _BAND_PADDING = 26, 12
# A trunk is pulled straight harder than a box is pulled to its neighbours.
_BOX_PULL, _TRUNK_PULL = 1.0, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A box to place.

    Attributes:
        width: In pixels.
        height: Likewise.
        level: Its band; higher ones stand above.
        row: The first row of its band that it may stand in.
    """

    width: int
    height: int
    level: int = 0
    row: int = 0


@dataclass(frozen=True, slots=True)
class Arrow:
    """That one box comes before another, by their places; ``kind`` keeps trunks apart."""

    parent: int
    child: int
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; ``x`` and ``y`` are its upper left corner."""

    x: int
    y: int
    width: int
    height: int

    @property
    def right(self) -> int:  # noqa: D102 - see the name
        return self.x + self.width

    @property
    def bottom(self) -> int:  # noqa: D102 - see the name
        return self.y + self.height

    @property
    def middle(self) -> int:
        """Where arrows leave it and arrive, sideways."""
        return self.x + self.width // 2


@dataclass(frozen=True, slots=True)
class Line:
    """An arrow from below a box, or a frame, to above another.

    Attributes:
        parents: The places of the boxes that it comes from; several if they are framed.
        children: The places of those that it leads to.
        points: From its start to its end, downwards.
    """

    parents: tuple[int, ...]
    children: tuple[int, ...]
    kind: str
    points: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A drawing.

    Attributes:
        boxes: In the order of the items.
        frames: Around boxes that are alike, where arrows meet them.
        bands: By level, if there are several.
        lines: The arrows.
    """

    width: int
    height: int
    boxes: tuple[Box, ...]
    frames: tuple[Box, ...]
    bands: tuple[tuple[int, Box], ...]
    lines: tuple[Line, ...]


def layout(items: Sequence[Item], arrows: Iterable[Arrow]) -> Layout:
    """Place boxes and arrows.

    Args:
        items: The boxes.
        arrows: Which come before which.  One that closes a circle is left out.
    """
    return _Drawing(items, arrows).placed()


@dataclass(slots=True, eq=False)
class _Cell:
    """Something with a place in a row: a box, a frame of boxes, or where a trunk passes."""

    members: tuple[int, ...] = ()
    width: int = _TRUNK_WIDTH
    height: int = 0
    columns: int = 1
    above: list[_Cell] = field(default_factory=list)
    below: list[_Cell] = field(default_factory=list)
    x: float = 0.0
    place: int = 0

    @property
    def is_trunk(self) -> bool:
        return not self.members

    @property
    def is_frame(self) -> bool:
        return len(self.members) > 1


class _Drawing:
    """The rows, and what stands in them."""

    def __init__(self, items: Sequence[Item], arrows: Iterable[Arrow]) -> None:
        self._items = items
        known = {a: None for a in arrows if a.parent != a.child}
        self._arrows, order = _downward(len(items), list(known))
        self._levels = self._drawn_levels(order)
        self._cells = self._frame_alike()
        self._cell_of = {n: cell for cell in self._cells for n in cell.members}
        self._kinds = list(
            dict.fromkeys(
                (self._cell_of[a.parent], self._cell_of[a.child], a.kind) for a in self._arrows
            )
        )
        self._row_of: dict[_Cell, int] = {}
        self._bands: list[tuple[int, int, int]] = []
        self._stack(order)
        self._rows: list[list[_Cell]] = [[] for _ in range(self._bands[-1][2] if items else 0)]
        for cell in self._cells:
            self._rows[self._row_of[cell]].append(cell)
        self._ways = self._route()

    # --- which row

    def _drawn_levels(self, order: Sequence[int]) -> list[int]:
        """Return the band of each box: its own, or that of a lower one before it."""
        levels = [item.level for item in self._items]
        parents: defaultdict[int, list[int]] = defaultdict(list)
        for arrow in self._arrows:
            parents[arrow.child].append(arrow.parent)
        for n in order:
            levels[n] = min([levels[n], *(levels[parent] for parent in parents[n])])
        return levels

    def _frame_alike(self) -> list[_Cell]:
        before: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)
        after: defaultdict[int, set[tuple[int, str]]] = defaultdict(set)
        for arrow in self._arrows:
            before[arrow.child].add((arrow.parent, arrow.kind))
            after[arrow.parent].add((arrow.child, arrow.kind))
        alike: defaultdict[object, list[int]] = defaultdict(list)
        for n, item in enumerate(self._items):
            level = self._levels[n]
            alike[level, item.row, frozenset(before[n]), frozenset(after[n])].append(n)
        cells = []
        for members in alike.values():
            if len(members) < FRAME_MIN:
                cells += [self._cell((n,)) for n in members]
            else:
                cells.append(self._cell(tuple(members)))
        return sorted(cells, key=lambda cell: cell.members)

    def _cell(self, members: tuple[int, ...]) -> _Cell:
        width = max(self._items[n].width for n in members)
        height = max(self._items[n].height for n in members)
        if len(members) == 1:
            return _Cell(members, width, height)
        columns = min(COLUMNS_MAX, max(3, ceil(sqrt(len(members)))))
        rows = ceil(len(members) / columns)
        return _Cell(
            members,
            columns * (width + _FRAME_GAP) - _FRAME_GAP + 2 * _FRAME_PADDING,
            rows * (height + _FRAME_GAP) - _FRAME_GAP + 2 * _FRAME_PADDING,
            columns,
        )

    def _stack(self, order: Sequence[int]) -> None:
        """Give each cell its row: the longest path from the start of its band."""
        depth = {n: self._items[n].row for n in order}
        children: defaultdict[int, list[int]] = defaultdict(list)
        for arrow in self._arrows:
            if self._levels[arrow.parent] == self._levels[arrow.child]:
                children[arrow.parent].append(arrow.child)
        for n in order:
            for child in children[n]:
                depth[child] = max(depth[child], depth[n] + 1)
        first = 0
        for level in sorted(set(self._levels), reverse=True):
            found = sorted({depth[n] for n in order if self._levels[n] == level})
            rows = {old: first + new for new, old in enumerate(found)}
            for cell in self._cells:
                n = cell.members[0]
                if self._levels[n] == level:
                    self._row_of[cell] = rows[depth[n]]
            self._bands.append((level, first, first + len(found)))
            first += len(found)

    # --- arrows that pass rows

    def _route(self) -> list[tuple[str, list[_Cell]]]:
        """Give each arrow a way through the rows that it passes, shared per source."""
        trunks: defaultdict[tuple[_Cell, str], list[_Cell]] = defaultdict(list)
        routes = []
        joined: set[tuple[int, int]] = set()
        for parent, child, kind in self._kinds:
            trunk, first = trunks[parent, kind], self._row_of[parent] + 1
            passed = self._row_of[child] - first
            while len(trunk) < passed:
                cell = _Cell()
                self._rows[first + len(trunk)].append(cell)
                trunk.append(cell)
            way = [parent, *trunk[:passed], child]
            for upper, lower in pairwise(way):
                if (id(upper), id(lower)) not in joined:
                    joined.add((id(upper), id(lower)))
                    upper.below.append(lower)
                    lower.above.append(upper)
            routes.append((kind, way))
        return routes

    # --- where in the row

    def _order(self) -> None:
        """Order the rows by the mean places of neighbours, down and up; keep the best."""
        self._number()
        best, fewest = [list(row) for row in self._rows], self._crossings()
        for sweep in range(SWEEPS):
            if not fewest:
                break
            is_down = sweep % 2 == 0
            for row in self._rows if is_down else reversed(self._rows):
                means = {cell: _mean(cell.above if is_down else cell.below, cell) for cell in row}
                row.sort(key=means.__getitem__)
                _number(row)
            crossings = self._crossings()
            if crossings < fewest:
                best, fewest = [list(row) for row in self._rows], crossings
        self._rows = best
        self._number()

    def _number(self) -> None:
        for row in self._rows:
            _number(row)

    def _crossings(self) -> int:
        count = 0
        for row in self._rows:
            seen: list[int] = []
            for cell in row:
                places = sorted(lower.place for lower in cell.below)
                count += sum(len(seen) - bisect_left(seen, place + 1) for place in places)
                for place in places:
                    insort(seen, place)
        return count

    def _spread(self) -> None:
        """Move each cell to where its neighbours are, as far as its row has room."""
        for row in self._rows:
            _settle(row, [0.0] * len(row), [1.0] * len(row))
        for sweep in range(SWEEPS):
            is_down = sweep % 2 == 0
            for row in self._rows if is_down else reversed(self._rows):
                wanted, pulls = [], []
                for cell in row:
                    near = (cell.above if is_down else cell.below) or [cell]
                    wanted.append(sum(one.x for one in near) / len(near))
                    pulls.append(_TRUNK_PULL if cell.is_trunk else _BOX_PULL)
                _settle(row, wanted, pulls)
        self._close_gaps()
        left = self._left()
        for row in self._rows:
            # Nothing pulls these anywhere.
            if row and not any(cell.above or cell.below for cell in row):
                shift = left - (row[0].x - row[0].width / 2)
                for cell in row:
                    cell.x += shift

    def _close_gaps(self) -> None:
        """Move what stands to the right of an empty column to the left."""
        cells = sorted((cell for row in self._rows for cell in row), key=lambda cell: cell.x)
        spans = [(c.x - c.width / 2, c.x + c.width / 2) for c in cells]
        spans += [(min(c.x, b.x), max(c.x, b.x)) for c in cells for b in c.below]
        end, gaps = float("inf"), []
        for start, stop in sorted(spans):
            if start - end > _GAP:
                gaps.append((start, start - end - _GAP))
            end = stop if end == float("inf") else max(end, stop)
        for cell in cells:
            cell.x -= sum(width for start, width in gaps if cell.x >= start)

    def _left(self) -> float:
        return min((c.x - c.width / 2 for row in self._rows for c in row), default=0.0)

    # --- all of it

    def placed(self) -> Layout:
        """Return the drawing."""
        self._order()
        self._spread()
        left = self._left()
        padding = _BAND_PADDING if len(self._bands) > 1 else 0
        for row in self._rows:
            for cell in row:
                cell.x = round(cell.x - left) + padding
        right = max((c.x + c.width / 2 for row in self._rows for c in row), default=0)
        width = ceil(right) + padding
        tops, bottoms, bands = self._heights(width)
        boxes: dict[int, Box] = {}
        frames = []
        outlines: dict[_Cell, Box] = {}
        for cell in self._cells:
            x, y = int(cell.x) - cell.width // 2, tops[self._row_of[cell]]
            outlines[cell] = Box(x, y, cell.width, cell.height)
            boxes |= self._boxes_in(cell, outlines[cell])
            if cell.is_frame and (cell.above or cell.below):
                frames.append(outlines[cell])
        lines = tuple(
            Line(
                way[0].members,
                way[-1].members,
                kind,
                _points(way, outlines, tops, bottoms, self._row_of),
            )
            for kind, way in self._ways
        )
        placed = tuple(boxes[n] for n in range(len(self._items)))
        height = (bottoms[-1] if bottoms else 0) + padding
        return Layout(width, height, placed, tuple(frames), bands, lines)

    def _boxes_in(self, cell: _Cell, outline: Box) -> dict[int, Box]:
        if not cell.is_frame:
            return {cell.members[0]: outline}
        width = max(self._items[n].width for n in cell.members)
        height = max(self._items[n].height for n in cell.members)
        found = {}
        for place, n in enumerate(cell.members):
            row, column = divmod(place, cell.columns)
            x = outline.x + _FRAME_PADDING + column * (width + _FRAME_GAP)
            y = outline.y + _FRAME_PADDING + row * (height + _FRAME_GAP)
            found[n] = Box(x, y, width, height)
        return found

    def _heights(self, width: int) -> tuple[list[int], list[int], tuple[tuple[int, Box], ...]]:
        """Return where rows begin and end, and the bands around them."""
        tops: list[int] = []
        bottoms: list[int] = []
        bands = []
        y = 0
        is_banded = len(self._bands) > 1
        for level, first, end in self._bands:
            start = y
            y += _BAND_LABEL if is_banded else 0
            for n in range(first, end):
                tops.append(y)
                bottoms.append(y + max(cell.height for cell in self._rows[n]))
                y = bottoms[-1] + (self._room_below(n) if n + 1 < end else 0)
            if is_banded:
                bands.append((level, Box(0, start, width, y + _BAND_PADDING - start)))
                y += _BAND_PADDING + self._room_below(end - 1)
        return tops, bottoms, tuple(bands)

    def _room_below(self, n: int) -> int:
        """Return how far the next row is: the farther arrows go sideways, the farther."""
        ways = [abs(cell.x - lower.x) for cell in self._rows[n] for lower in cell.below]
        return int(min(_ROW_GAP_MAX, max(_ROW_GAP_MIN, max(ways, default=0) / 8)))


def _downward(count: int, arrows: Sequence[Arrow]) -> tuple[list[Arrow], list[int]]:
    """Return the arrows that close no circle, and the boxes with each after those before it."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    missing = [0] * count
    for arrow in arrows:
        children[arrow.parent].append(arrow.child)
        missing[arrow.child] += 1
    order: dict[int, None] = {}
    free = [n for n in range(count) if not missing[n]]
    while len(order) < count:
        if not free:
            free = [next(n for n in range(count) if n not in order)]
        n = free.pop(0)
        if n in order:
            continue
        order[n] = None
        for child in children[n]:
            missing[child] -= 1
            if not missing[child]:
                free.append(child)
    places = {n: place for place, n in enumerate(order)}
    return [a for a in arrows if places[a.parent] < places[a.child]], list(order)


def _number(row: Sequence[_Cell]) -> None:
    for place, cell in enumerate(row):
        cell.place = place


def _mean(near: Sequence[_Cell], cell: _Cell) -> float:
    return sum(one.place for one in near) / len(near) if near else float(cell.place)


def _distance(left: _Cell, right: _Cell) -> float:
    """Return how far apart the middles of two neighbours in a row have to be."""
    gap = _TRUNK_GAP if left.is_trunk or right.is_trunk else _GAP
    return (left.width + right.width) / 2 + gap


def _settle(row: Sequence[_Cell], wanted: Sequence[float], pulls: Sequence[float]) -> None:
    """Place a row's cells as near to where they want to be as their order and size allow.

    The least sum of squares, by pooling adjacent violators: cells that push each other move
    as one block to the mean of what they want.
    """
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + _distance(left, right))
    blocks: list[list[float]] = []  # mean, pull, how many
    for n, wish in enumerate(wanted):
        block = [wish - offsets[n], pulls[n], 1.0]
        while blocks and blocks[-1][0] >= block[0]:
            mean, pull, count = blocks.pop()
            total = pull + block[1]
            block = [(mean * pull + block[0] * block[1]) / total, total, count + block[2]]
        blocks.append(block)
    n = 0
    for mean, _, count in blocks:
        for _ in range(int(count)):
            row[n].x = mean + offsets[n]
            n += 1


def _points(
    way: Sequence[_Cell],
    outlines: dict[_Cell, Box],
    tops: Sequence[int],
    bottoms: Sequence[int],
    row_of: dict[_Cell, int],
) -> tuple[tuple[int, int], ...]:
    """Return where an arrow passes: straight through rows, with its bends between them."""
    start, end = outlines[way[0]], outlines[way[-1]]
    row = row_of[way[0]]
    points = [(start.middle, start.bottom), (start.middle, bottoms[row])]
    for cell in way[1:-1]:
        row += 1
        points += [(int(cell.x), tops[row]), (int(cell.x), bottoms[row])]
    points.append((end.middle, end.y))
    return tuple(dict.fromkeys(points))
