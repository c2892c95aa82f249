"""What all stores share: slots, how far each is mapped, and the way to the host tier and back. No JAX here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import numpy as np

from engine.errors import OutOfPages
from engine.memory.host import HostTier, Owner
from engine.memory.moves import Copy, Move, Stream

NOT_WANTED = -1


class SlotStore(ABC):
    """The half of `KVStore` that does not depend on where pages lie; a store adds that."""

    pages_per_chunk = 1
    parks = False  # whether layers of running sequences may be on the host
    device_table = True  # False: no device keeps a page table, so nobody asks for its changes

    def __init__(self, num_slots: int, num_layers: int, page_size: int, max_tokens: int, host: HostTier | None = None):
        self.num_slots, self.num_layers = num_slots, num_layers
        self.page_size, self.max_tokens, self.host = page_size, max_tokens, host
        self._page_bits = page_size.bit_length() - 1  # a power of two
        self.mapped = np.zeros(num_slots, np.int32)  # pages of each layer, by slot; 0 = closed
        self._slots = list(range(num_slots - 1, -1, -1))
        self._moves: list[Move] = []
        self._arriving: set[int] = set()  # slots that moves of the coming plan bring pages to

    @abstractmethod
    def pages(self, slot: int) -> np.ndarray:
        """Pages that hold a sequence's tokens, in their order, int32 [L, mapped]."""

    @abstractmethod
    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """See `KVStore`."""

    @abstractmethod
    def open(self, num_tokens: int) -> int:
        """See `KVStore`."""

    def close(self, slot: int) -> None:
        """Unmaps a sequence. Raises RuntimeError when the slot is closed already."""
        if self.mapped[slot] == 0:
            raise RuntimeError(f"slot {slot} is closed already")
        self._free(slot, self.pages(slot).ravel())

    def _free(self, slot: int, pages: np.ndarray) -> None:
        """Frees a slot and its pages on the device; what the coming plan would have brought there is not wanted."""
        if slot in self._arriving:
            for move in self._moves:
                if not move.out:
                    move.pages[np.isin(move.pages, pages)] = NOT_WANTED
            self._arriving.remove(slot)
        self.mapped[slot] = 0
        self._slots.append(slot)

    @property
    def num_free_slots(self) -> int:
        """Slots no sequence holds."""
        return len(self._slots)

    def pages_for(self, num_tokens):
        """Pages of one layer for so many tokens (an int or an array)."""
        return (num_tokens + (self.page_size - 1)) >> self._page_bits  # a division takes NumPy four times as long

    def lacking(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pages of each layer that these sequences need and do not map for these lengths, int [n]."""
        return np.maximum(self.pages_for(lengths) - self.mapped[slots], 0)

    def holds(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether these sequences lack nothing for these lengths."""
        return not np.count_nonzero(self.pages_for(lengths) > self.mapped[slots])

    def streams(self, slots: np.ndarray) -> tuple[Stream, ...]:
        """How a step over sequences `slots` reads pages that are not on the device: here all are."""
        return ()

    def can_swap_out(self, slot: int) -> bool:
        """Whether the host tier can take all pages of a sequence now: copies out go before copies in."""
        room = self.host is not None and self.host.fits(int(self.mapped[slot]) * self.num_layers)
        return room and slot not in self._arriving

    def swap_out(self, slot: int, owner: Owner) -> None:
        """Moves a sequence to the host, tail pages too, one block per layer, and closes its slot. Its pages are free
        at once: whoever reuses them runs after the gather.

        Raises:
          OutOfPages: the host tier is full, or there is none; nothing was moved.
        """
        n = int(self.mapped[slot])
        if not self.can_swap_out(slot):
            raise OutOfPages(f"{n} pages of each layer do not fit the host tier")
        host = cast(HostTier, self.host)
        for layer, pages in enumerate(self.pages(slot).copy()):
            self._moves.append(Move(True, host.store(layer, [(owner, 0, n)]), layer, pages))
        self.close(slot)

    def can_swap_in(self, owner: Owner, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a swapped sequence has landed on the host and fits the device with `num_tokens` tokens."""
        return cast(HostTier, self.host).landed(owner) and self.fits(num_tokens, reserve)

    def swap_in(self, owner: Owner, num_tokens: int) -> int:
        """Maps `num_tokens` tokens for a swapped sequence and brings its pages back. Returns its slot.

        Raises:
          OutOfPages: no slot or not enough pages; it stays on the host.
        """
        slot = self.open(num_tokens)
        for layer in range(self.num_layers):
            self._fetch(owner, layer, slot)
        cast(HostTier, self.host).drop(owner)
        return slot

    def _fetch(self, owner: Owner, layer: int, slot: int) -> None:
        """Moves a layer's pages on the host to the pages that the slot maps for them."""
        host, mapped = cast(HostTier, self.host), self.pages(slot)[layer]
        self._arriving.add(slot)
        for e in host.extents(owner, layer):
            host.begin_fetch(e.block)
            pages = np.full(host.blocks[e.block].num_pages, NOT_WANTED, np.int32)
            pages[e.offset : e.offset + e.end - e.start] = mapped[e.start : e.end]
            self._moves.append(Move(False, e.block, layer, pages, (owner,)))

    def forget(self, owner: Owner) -> None:
        """A swapped sequence is gone: its pages on the host die."""
        cast(HostTier, self.host).drop(owner)

    @property
    def copies_in_flight(self) -> bool:
        """Whether a move of an earlier plan has not ended."""
        return self.host is not None and self.host.busy

    @property
    def num_host_pages(self) -> int:
        """Pages the host tier holds."""
        return self.host.used if self.host else 0

    def copied(self, copy: Copy) -> list[Owner]:
        """A move has ended. Returns the owners whose KV is lost with it, if it failed."""
        return cast(HostTier, self.host).copied(copy)

    def take_freed_blocks(self) -> tuple[int, ...]:
        """Host blocks freed since the last call."""
        return self.host.take_freed() if self.host else ()

    def take_moves(self) -> tuple[Move, ...]:
        """Copies decided since the last call."""
        moves, self._moves = tuple(self._moves), []
        self._arriving.clear()
        return moves

    def check(self) -> None:
        """Asserts that no slot is lost, and every invariant of the host tier."""
        if self.host is not None:
            self.host.check()
        held = np.flatnonzero(self.mapped).tolist()
        assert sorted([*held, *self._slots]) == list(range(self.num_slots)), "slots leaked"
