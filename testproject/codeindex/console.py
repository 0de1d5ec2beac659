"""Tell a person at a terminal how a long run fares: plain text, no database, no dependency."""

import time
from collections.abc import Iterable, Sequence
from typing import TextIO

BAR_CELLS = 30
# A terminal is redrawn in place; a log file gets a line now and then.
SECONDS_BETWEEN_LINES = 3.0


class ProgressBar:
    """Shows how many of ``total`` are done.

    Args:
        total: The number that means "finished".
        out: Where to; on a terminal one line is redrawn.
    """

    def __init__(self, total: int, *, out: TextIO) -> None:
        self._total = total
        self._out = out
        self._redraws = out.isatty()
        self._width = 0
        self._started = time.monotonic()
        self._line_due = self._started
        self._is_full = False

    @property
    def seconds(self) -> float:
        """Seconds since the bar was made."""
        return time.monotonic() - self._started

    def show(self, done: int, note: str = "") -> None:
        """Draw the state; without a terminal at most every few seconds, and at the end."""
        if not self._redraws and not self._is_line_due(done):
            return
        line = self._line(done, note)
        if self._redraws:
            # Spaces cover what a longer line left behind.
            self._out.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._out.write(line + "\n")
        self._out.flush()

    def close(self) -> None:
        """Leave the line, so that what follows starts on its own."""
        if self._redraws:
            self._out.write("\n")
            self._out.flush()

    def _is_line_due(self, done: int) -> bool:
        was_full, self._is_full = self._is_full, done >= self._total
        if was_full or (time.monotonic() < self._line_due and not self._is_full):
            return False
        self._line_due = time.monotonic() + SECONDS_BETWEEN_LINES
        return True

    def _line(self, done: int, note: str) -> str:
        share = done / self._total if self._total else 1.0
        cells = int(share * BAR_CELLS)
        bar = "#" * cells + "." * (BAR_CELLS - cells)
        line = f"[{bar}] {share:4.0%}  {done:,} of {self._total:,}  {self.seconds:.0f} s"
        return f"{line}  {note}" if note else line


def table(rows: Iterable[tuple[str, int | float]]) -> str:
    """Return labelled numbers, one a line, aligned; floats with one decimal."""
    cells = [
        (label, f"{number:,.1f}" if isinstance(number, float) else f"{number:,}")
        for label, number in rows
    ]
    label_width = max(len(label) for label, _ in cells)
    number_width = max(len(number) for _, number in cells)
    return "\n".join(
        f"  {label.ljust(label_width)}  {number.rjust(number_width)}" for label, number in cells
    )


def few(names: Sequence[str], *, most: int = 4) -> str:
    """Return the first ``most`` names, and how many there are besides."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
