"""The last so many rows of numbers, oldest first. No JAX here."""

from __future__ import annotations

import numpy as np


class Window:
    """Rows of `width` numbers, the last `capacity` of them. `count` says how many there have been."""

    def __init__(self, capacity: int, width: int):
        self.capacity, self.count = capacity, 0
        self._rows, self._end = np.empty((2 * capacity, width)), 0

    def push(self, rows: np.ndarray) -> None:
        """Adds rows [k, width], the newest last."""
        self.count += len(rows)
        rows = rows[-self.capacity :]
        if self._end + len(rows) > len(self._rows):  # once in at least `capacity` rows
            held = self.rows.copy()
            self._rows[: len(held)], self._end = held, len(held)
        self._rows[self._end : self._end + len(rows)] = rows
        self._end += len(rows)

    @property
    def rows(self) -> np.ndarray:
        """What is held: float64 [n, width], n <= capacity; a view, until the next push."""
        return self._rows[max(0, self._end - self.capacity) : self._end]
