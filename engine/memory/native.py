"""The native store: every sequence reserves its whole context, contiguous in each layer (both papers' "native" bars).

All reservations are equal, so there is nothing to allocate: the arena is cut once into one run of pages for each
(layer, slot), layer after layer, and opening a slot takes its runs. What a short sequence leaves empty nobody else can
use: that is the internal fragmentation that paging removes. No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.errors import OutOfPages
from engine.memory.host import HostTier
from engine.memory.slots import SlotStore

RESERVED = 1  # pages before the first run: the zero page


class NativeStore(SlotStore):
    """Implements `KVStore`. A sequence maps the pages of its runs that its tokens need; it has taken all of them."""

    view = "run"
    table_width = 1  # the first page of the run

    def __init__(self, num_slots: int, num_layers: int, page_size: int, max_tokens: int, host: HostTier | None = None):
        super().__init__(num_slots, num_layers, page_size, max_tokens, host)
        self.run_pages = self.pages_for(max_tokens)
        self.num_pages = num_layers * num_slots * self.run_pages
        self.arena_pages = RESERVED + self.num_pages
        runs = np.arange(num_layers * num_slots, dtype=np.int32).reshape(num_layers, num_slots)
        self.start = RESERVED + runs * np.int32(self.run_pages)  # [L, slots] first page of each run
        self._opened: list[int] = []  # slots, since the last deltas

    @property
    def num_free_pages(self) -> int:
        """Pages of runs that no sequence has taken, over all layers."""
        return self.num_free_slots * self.num_layers * self.run_pages

    @property
    def num_mapped_pages(self) -> int:
        """Pages for the tokens that sequences have."""
        return int(self.mapped.sum()) * self.num_layers

    def pages(self, slot: int) -> np.ndarray:
        """Pages that hold a sequence's tokens, int32 [L, mapped]."""
        return self.start[:, slot, None] + np.arange(self.mapped[slot], dtype=np.int32)

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether one run is long enough."""
        return num_tokens <= self.max_tokens

    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a slot is free. `reserve` changes nothing: what others need to grow they have taken already."""
        return bool(self._slots) and self.can_ever_hold(num_tokens)

    def open(self, num_tokens: int) -> int:
        """Takes a slot and its runs for a new sequence, and returns it.

        Raises:
          OutOfPages: none is free, or no run is so long; nothing was taken.
        """
        if not self.fits(num_tokens):
            raise OutOfPages(f"{num_tokens} tokens: {self.num_free_slots} runs of {self.max_tokens} are free")
        slot = self._slots.pop()
        self.mapped[slot] = self.pages_for(num_tokens)
        self._opened.append(slot)
        return slot

    def can_grow(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether the runs are long enough; nothing else can be in the way."""
        return bool((lengths <= self.max_tokens).all())

    def grow(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Maps what sequences `slots` [n] lack for `lengths` [n] tokens, all of them or none.

        Raises:
          OutOfPages: a run is too short; nothing was mapped.
        """
        if not self.can_grow(slots, lengths):
            raise OutOfPages(f"{int(lengths.max())} tokens in a run of {self.max_tokens}")
        self.mapped[slots] += self.lacking(slots, lengths)

    def take_deltas(self) -> np.ndarray:
        """First pages of the runs opened since the last call, int32 [n, 4]: layer, slot, 0, page."""
        slots, self._opened = np.array(self._opened, np.int32), []
        deltas = np.zeros((self.num_layers, len(slots), 4), np.int32)
        deltas[..., 0] = np.arange(self.num_layers)[:, None]
        deltas[..., 1], deltas[..., 3] = slots, self.start[:, slots]
        return deltas.reshape(-1, 4)

    def unmapped_pages(self) -> np.ndarray:
        """Pages of the arena that hold no sequence's tokens, the zero page aside, bool [P]."""
        unmapped = np.zeros(self.arena_pages, bool)
        runs = unmapped[RESERVED:].reshape(self.num_layers, self.num_slots, self.run_pages)
        runs[:] = np.arange(self.run_pages) >= self.mapped[:, None]
        return unmapped

    def check(self) -> None:
        """Asserts every invariant: slots, the host tier, and that nobody maps more than a run."""
        super().check()
        assert (self.mapped <= self.run_pages).all(), "a sequence maps pages beyond its run"
