"""Plain text tables, and a progress line that stays in place on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

LINE_EVERY_S = {True: 0.2, False: 10.0}  # terminal: in place; otherwise (a log file): sparse lines


def format_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned on the right, the first on the left; floats to 3 significant digits, None as `-`."""
    cells = [list(header), *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float) -> str:
    """To 3 significant digits, whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def rounded(value: Any) -> Any:
    """A float to 5 significant digits, for headline lines; anything else as it is."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


class ProgressLine:
    """One line on `stream` (default stderr): rewritten in place on a terminal, now and then otherwise."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._next = time.monotonic() + LINE_EVERY_S[self._tty]
        self._width = 0

    def show(self, text: str) -> None:
        """Shows the line unless the last one is too recent."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + LINE_EVERY_S[self._tty]
        if self._tty:
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leaves the last line on the terminal."""
        if self._tty and self._width:
            self._stream.write("\n")
            self._stream.flush()
