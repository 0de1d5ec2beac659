"""One benchmark on one database: what it is told, and how it hands on what it found."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .figures import Figure
from .servers import Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What ``measure`` gets: the place to measure at, and how much to measure."""

    name: str
    place: Place
    rounds: int
    sizes: Mapping[str, float]

    @property
    def kind(self) -> str:
        """``postgresql``, ``mariadb`` or ``sqlite``."""
        return self.place.kind

    def size(self, name: str) -> int:
        """Return one of the benchmark's sizes."""
        return int(self.sizes[name])

    def processes(self) -> int:
        """Return the number of processes; more than one writer helps nothing on SQLite."""
        return 1 if self.kind == "sqlite" else self.size("processes")

    def figure(self, **attributes: Any) -> Figure:
        """Return a figure of this benchmark on this database."""
        return Figure(benchmark=self.name, database=self.kind, **attributes)

    def in_turns(
        self, ours: Callable[[], float], reference: Callable[[], float]
    ) -> list[tuple[float, float]]:
        """Measure both in each round, so that what else the machine does meets both."""
        pairs = []
        for _ in range(self.rounds):
            theirs = reference()
            pairs.append((ours(), theirs))
        return pairs


def medians(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Return the medians of (ours, reference), and our samples, as attributes of a figure."""
    ours, reference = zip(*pairs, strict=True)
    return {
        "value": statistics.median(ours),
        "reference": statistics.median(reference),
        "samples": ours,
    }
