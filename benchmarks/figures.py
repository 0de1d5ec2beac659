"""What a benchmark finds: figures with their marks, as text, JSON and a Markdown table.

Values only: nothing here measures, and nothing needs a database.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

HEADINGS = ("benchmark", "database", "what", "figure", "by hand", "ratio", "mark", "reached")
WIDTHS = (11, 10, 46, 18, 18, 7, 24, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A bound that a figure, or its ratio to the hand-written one, is held to.

    Attributes:
        of: ``"value"`` or ``"ratio"``.
        at_least: The bound from below, itself included.
        below: The bound from above, itself excluded.
    """

    of: str = "value"
    at_least: float | None = None
    below: float | None = None

    @property
    def text(self) -> str:
        """The mark as the table shows it."""
        bounds = [("≥", self.at_least), ("<", self.below)]
        shown = [
            f"{sign} {f'{bound:.0%}' if self.of == 'ratio' else number(bound)}"
            for sign, bound in bounds
            if bound is not None
        ]
        return " and ".join(shown)

    def is_met(self, measured: float | None) -> bool:
        """Whether ``measured`` is within the bounds; nothing measured is outside."""
        if measured is None:
            return False
        if self.at_least is not None and measured < self.at_least:
            return False
        return self.below is None or measured < self.below


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing that was measured on one database.

    Attributes:
        case: What was measured, with the sizes that were used.
        value: Ours, in ``unit``.
        reference: The hand-written figure of the same run, if there is one to compare with.
        reference_name: What that was.
        marks: What it is held to; all of them must be met.
        samples: What each round gave, if ``value`` is the median of several.
        details: What else is worth keeping, by name.
    """

    benchmark: str
    database: str
    case: str
    unit: str
    value: float
    reference: float | None = None
    reference_name: str = ""
    marks: tuple[Mark, ...] = ()
    samples: tuple[float, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Ours as a share of the hand-written figure."""
        return self.value / self.reference if self.reference else None

    @property
    def is_reached(self) -> bool | None:
        """Whether every mark is met; ``None`` if there is none."""
        if not self.marks:
            return None
        return all(
            mark.is_met(self.ratio if mark.of == "ratio" else self.value) for mark in self.marks
        )

    def cells(self) -> tuple[str, ...]:
        """Return what stands under each of ``HEADINGS``."""
        reached = {True: "yes", False: "no", None: "-"}[self.is_reached]
        return (
            self.benchmark,
            self.database,
            self.case,
            f"{number(self.value)} {self.unit}".strip(),
            "-" if self.reference is None else f"{number(self.reference)} {self.unit}".strip(),
            "-" if self.ratio is None else share(self.ratio),
            ", ".join(mark.text for mark in self.marks) or "-",
            reached,
        )

    def as_line(self) -> str:
        """Return the figure as one line of the text that a person watches."""
        return line(self.cells())

    def as_json(self) -> dict[str, Any]:
        """Return the figure as JSON knows it, with what follows from it."""
        return asdict(self) | {"ratio": self.ratio, "is_reached": self.is_reached}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Figure:
        """Return what :meth:`as_json` was made from."""
        given = {key: value for key, value in found.items() if key not in {"ratio", "is_reached"}}
        given["marks"] = tuple(Mark(**mark) for mark in given["marks"])
        given["samples"] = tuple(given["samples"])
        return cls(**given)


def number(value: float) -> str:
    """Return a number with three digits or more, and no more decimals than that takes."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    decimals = 1 if abs(value) >= 10 else 2
    return f"{value:.{decimals}f}".rstrip("0").rstrip(".")


def share(ratio: float) -> str:
    """Return a ratio in percent, or as a factor where percents would be hard to read."""
    return f"{ratio:.0%}" if ratio < 10 else f"x {ratio:.0f}"


def line(cells: Iterable[str]) -> str:
    """Return cells side by side, in the widths of the columns."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def as_markdown(figures: Iterable[Figure]) -> str:
    """Return the table of ``docs/explanation/performance.md``."""
    rows = [HEADINGS, tuple("---" for _ in HEADINGS)]
    rows += [figure.cells() for figure in figures]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
