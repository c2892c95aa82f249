"""The paged store of a simulation in which all layers of a sequence are always together: a page of every layer is one
block, as request-level paging (vLLM) has it.

What fits, who is preempted and what moves is what `PagedStore` says with one page per chunk (a test); the books are L
times smaller. On a device pages need ids of their own in every layer, on a virtual clock nobody looks. No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.config import cdiv
from engine.memory.host import HostTier
from engine.memory.paged import PagedStore
from engine.memory.pages import PagePool


class BlockStore(PagedStore):
    """Implements `KVStore` over a pool of blocks; speaks of pages, over all layers, as the others do."""

    def __init__(
        self,
        num_pages: int,
        num_layers: int,
        num_slots: int,
        page_size: int,
        max_tokens: int,
        host: HostTier | None = None,
    ):
        super().__init__(PagePool(num_pages // num_layers, 1), num_slots, page_size, max_tokens, host)
        self.num_layers = num_layers
        self.num_pages = self.pool.num_pages * num_layers
        self.device_table = False  # a device would need one

    @property
    def num_free_pages(self) -> int:
        """Pages no sequence maps, over all layers."""
        return self.pool.num_free * self.num_layers

    def pages(self, slot: int) -> np.ndarray:
        """The blocks of a sequence, in every layer: int32 [L, mapped]."""
        blocks = super().pages(slot)
        return np.broadcast_to(blocks, (self.num_layers, blocks.shape[1]))

    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """See `PagedStore`."""
        return super().fits(num_tokens, cdiv(reserve, self.num_layers))

    def close(self, slot: int) -> None:
        """See `SlotStore`."""
        if self.mapped[slot] == 0:
            raise RuntimeError(f"slot {slot} is closed already")
        self._free(slot, self.table[slot, 0, : self.mapped[slot]])
