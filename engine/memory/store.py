"""The store protocol: how sequences' tokens are mapped to pages of the device tier.

A store gives slots (rows of the page table) and maps pages under them. Policies talk to this protocol only, so they run
unchanged over `paged`, `native`, and later `extent` and `vmm`. One test suite covers all of them. No JAX here.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engine.memory.host import Owner
from engine.memory.moves import Copy, Move, Stream


class KVStore(Protocol):
    """What a scheduler may ask of KV memory."""

    view: str  # which KVView kernels get: "paged" | "run"
    num_slots: int
    page_size: int  # S, a power of two
    pages_per_chunk: int  # C; with 1, pages are interchangeable
    device_table: bool  # False: no device keeps a page table, so nobody asks for its changes
    parks: bool  # whether layers of running sequences may be on the host
    num_pages: int  # usable, over all layers
    arena_pages: int  # P: with the reserved ones
    table_width: int  # N: page-table entries of one sequence and layer on the device
    max_tokens: int  # of one sequence

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has taken, over all layers."""
        ...

    @property
    def num_mapped_pages(self) -> int:
        """Pages for the tokens that sequences have. What is neither mapped nor free is reserved and empty: internal
        fragmentation."""
        ...

    @property
    def num_free_slots(self) -> int:
        """Slots no sequence holds."""
        ...

    def can_ever_hold(self, num_tokens: int) -> bool:
        """Whether an empty store could hold one sequence of this length."""
        ...

    def fits(self, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a new sequence of this length fits now, with `reserve` pages left for the others to grow."""
        ...

    def open(self, num_tokens: int) -> int:
        """Maps a new sequence and returns its slot. Raises OutOfPages."""
        ...

    def lacking(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Pages of each layer that these sequences need and do not map for these lengths, int [n]."""
        ...

    def holds(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether these sequences lack nothing for these lengths."""
        ...

    def can_grow(self, slots: np.ndarray, lengths: np.ndarray) -> bool:
        """Whether all these sequences can grow to these lengths together."""
        ...

    def grow(self, slots: np.ndarray, lengths: np.ndarray) -> None:
        """Maps what the sequences lack, all of them or none. Raises OutOfPages."""
        ...

    def close(self, slot: int) -> None:
        """Unmaps a sequence; its slot and its unshared pages are free."""
        ...

    def streams(self, slots: np.ndarray) -> tuple[Stream, ...]:
        """How a step over these sequences reads pages that are parked on the host. Raises OutOfPages."""
        ...

    def can_swap_out(self, slot: int) -> bool:
        """Whether the host tier can take all pages of a sequence now."""
        ...

    def swap_out(self, slot: int, owner: Owner) -> None:
        """Moves a sequence to the host under a name and closes its slot. Raises OutOfPages."""
        ...

    def can_swap_in(self, owner: Owner, num_tokens: int, reserve: int = 0) -> bool:
        """Whether a swapped sequence has landed on the host and fits the device with so many tokens."""
        ...

    def swap_in(self, owner: Owner, num_tokens: int) -> int:
        """Brings a swapped sequence back and returns its slot. Raises OutOfPages."""
        ...

    def forget(self, owner: Owner) -> None:
        """A swapped sequence is gone: its pages on the host die."""
        ...

    @property
    def copies_in_flight(self) -> bool:
        """Whether a move of an earlier plan has not ended."""
        ...

    @property
    def num_host_pages(self) -> int:
        """Pages the host tier holds."""
        ...

    def copied(self, copy: Copy) -> list[Owner]:
        """A move has ended. Returns the owners whose KV is lost with it, if it failed."""
        ...

    def take_moves(self) -> tuple[Move, ...]:
        """Moves decided since the last call."""
        ...

    def take_freed_blocks(self) -> tuple[int, ...]:
        """Host blocks freed since the last call."""
        ...

    def take_deltas(self) -> np.ndarray:
        """Page-table entries changed since the last call, int32 [n, 4]: layer, slot, index, page. For the run view
        the one entry of a sequence and layer is the first page of its run."""
        ...

    def unmapped_pages(self) -> np.ndarray:
        """Pages of the arena that no sequence maps, the zero page and its chunk aside, bool [P]."""
        ...

    def check(self) -> None:
        """Asserts every invariant (debug mode and tests)."""
        ...
