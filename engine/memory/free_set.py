"""The set of free ids: taking n of them is one slice, whatever n is. No JAX here."""

from __future__ import annotations

import numpy as np

from engine.errors import OutOfPages


class FreeSet:
    """Ids 1 .. n, each free or taken: a sparse set (Briggs and Torczon, LOPLAS 1993).

    The free ids lie on a stack, and `_place[id]` says where. An id is free if and only if its place lies below the top
    and holds that very id. So nothing need be written for an id that is taken, only the top moves down; and an id that
    is put back twice is seen at once. Id 0 lies at the bottom and is never taken.
    """

    def __init__(self, n: int):
        self._stack = np.arange(n + 1, dtype=np.int32)
        self._place = self._stack.copy()
        self._top = n + 1

    def __len__(self) -> int:
        return self._top - 1

    def take(self, count: int) -> np.ndarray:
        """Takes the ids that were put back last, int32 [count], in the order they were put back.

        Raises:
          OutOfPages: fewer are free; nothing was taken.
        """
        top = self._top - count
        if top < 1:
            raise OutOfPages(f"{count} chunks wanted, {len(self)} free")
        ids = self._stack[top : self._top].copy()
        self._top = top
        return ids

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id is free, bool [n]."""
        place = self._place[ids]
        return (place < self._top) & (self._stack.take(place, mode="clip") == ids)

    def put(self, ids: np.ndarray) -> None:
        """Puts taken ids back.

        Raises:
          RuntimeError: one is free already, or is named twice; nothing was changed.
        """
        end = self._top + len(ids)
        places = np.arange(self._top, end, dtype=np.int32)
        wrong = self.contains(ids)
        if not wrong.any():
            self._place[ids] = places  # not believed before the top moves
            wrong = self._place[ids] != places  # an id named twice has one place
        if wrong.any():
            raise RuntimeError(f"double free of page {int(ids[wrong][0])}")
        self._stack[self._top : end] = ids
        self._top = end

    def check(self) -> None:
        """Asserts that the stack and the places agree, so that no id lies on the stack twice."""
        stack = self._stack[: self._top]
        assert 1 <= self._top <= len(self._stack) and stack[0] == 0, "id 0 was taken"
        assert (self._place[stack] == np.arange(self._top)).all(), "an id is free twice"
