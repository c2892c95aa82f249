"""The host tier's books: immutable blocks of one layer, whose pages they hold, and when a block may go. No JAX here.

A block is what one (step, layer) copied out. It lists the page ranges of the sequences in it and is freed when its last
page has no owner and no copy reads or writes it any more; it never changes meanwhile, so a copy needs no lock. A
regathered block takes over pages of others when it has landed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.errors import OutOfPages
from engine.memory.moves import Copy, Owner


class Extent(NamedTuple):
    """Pages [start, end) of an owner in one layer lie in a block from page `offset` on."""

    block: int
    offset: int
    start: int
    end: int


@dataclass(slots=True)
class HostBlock:
    """Pages of one layer that left the device together."""

    layer: int
    num_pages: int
    copies: int = 1  # in flight, in either direction: the one that fills it is the first
    landed: bool = False
    owners: dict[Owner, int] = field(default_factory=dict)  # live pages by owner


class HostTier:
    """Books of the host tier, `capacity` pages over all layers."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.used = self.peak = 0  # pages, until their block is freed
        self.asked = 0  # the most pages that somebody wanted in it at once: with more room nothing would have changed
        self.promised = 0  # pages that the coming step writes for blocks still to be made
        self.blocks: dict[int, HostBlock] = {}
        self._extents: dict[Owner, dict[int, list[Extent]]] = {}  # by layer
        self._regathers: dict[int, dict[Owner, Extent]] = {}  # by block in flight: what will be in it
        self._copies = 0  # in flight
        self._next = 0
        self._freed: list[int] = []

    @property
    def busy(self) -> bool:
        """True while a copy is in flight."""
        return self._copies > 0

    def fits(self, num_pages: int) -> bool:
        """Whether so many pages can be stored now."""
        wanted = self.used + self.promised + num_pages
        self.asked = max(self.asked, wanted)
        return wanted <= self.capacity

    def store(self, layer: int, parts: Sequence[tuple[Owner, int, int]]) -> int:
        """Makes a block of pages [start, end) of each (owner, start, end), in this order; its copy is in flight.

        Returns its id.

        Raises:
          OutOfPages: they do not fit; nothing was stored.
        """
        block_id, extents = self._make_block(layer, parts)
        for (owner, _, _), extent in zip(parts, extents, strict=True):
            self._extents.setdefault(owner, {}).setdefault(layer, []).append(extent)
        return block_id

    def regather(self, layer: int, parts: Sequence[tuple[Owner, int, int]]) -> int:
        """Makes a block of what lies in several: pages [start, end) of each owner, from its first page here on, in this
        order; its copy is in flight. When it lands it replaces them; if it fails nothing is lost. Returns its id.

        Raises:
          OutOfPages: both do not fit; nothing was stored.
        """
        block_id, extents = self._make_block(layer, parts)
        self._regathers[block_id] = {owner: e for (owner, _, _), e in zip(parts, extents, strict=True)}
        return block_id

    def regathering(self, layer: int) -> bool:
        """Whether a regathered block of this layer is in flight."""
        return any(self.blocks[i].layer == layer for i in self._regathers)

    def _make_block(self, layer: int, parts: Sequence[tuple[Owner, int, int]]) -> tuple[int, list[Extent]]:
        total = sum(end - start for _, start, end in parts)
        if not self.fits(total):
            raise OutOfPages(
                f"{total} pages for a host tier that has {self.capacity - self.used - self.promised} of {self.capacity}"
            )
        block_id, offset, extents = self._next, 0, []
        self._next += 1
        block = self.blocks[block_id] = HostBlock(layer, total)
        for owner, start, end in parts:
            extents.append(Extent(block_id, offset, start, end))
            block.owners[owner] = block.owners.get(owner, 0) + end - start
            offset += end - start
        self._copies += 1
        self.used += total
        self.peak = max(self.peak, self.used)
        return block_id, extents

    def holds(self, owner: Owner) -> bool:
        """Whether the owner has pages here."""
        return owner in self._extents

    def extents(self, owner: Owner, layer: int) -> list[Extent]:
        """Where the owner's pages of a layer are, in the order they came."""
        return self._extents.get(owner, {}).get(layer, [])

    def landed(self, owner: Owner) -> bool:
        """Whether all of the owner's pages can be fetched."""
        return all(self.blocks[e.block].landed for layer in self._extents[owner].values() for e in layer)

    def begin_fetch(self, block_id: int) -> None:
        """A copy back to the device reads the block from now on, until `copied`."""
        block = self.blocks[block_id]
        if not block.landed:
            raise RuntimeError(f"host block {block_id} is fetched before its copy has landed")
        block.copies += 1
        self._copies += 1

    def drop(self, owner: Owner, layer: int | None = None) -> None:
        """The owner's pages die, of one layer or all. Nothing happens when it has none."""
        layers = self._extents.get(owner, {})
        dead = [e for i in (list(layers) if layer is None else [layer]) for e in layers.pop(i, ())]
        if not layers:
            self._extents.pop(owner, None)
        for block_id, extents in self._regathers.items():
            if owner in extents and layer in (None, self.blocks[block_id].layer):
                dead.append(extents.pop(owner))
        self._disown(owner, dead)

    def _disown(self, owner: Owner, dead: Sequence[Extent]) -> None:
        for e in dead:
            owners = self.blocks[e.block].owners
            owners[owner] -= e.end - e.start
            if not owners[owner]:
                del owners[owner]
            self._free_if_dead(e.block)

    def copied(self, copy: Copy) -> list[Owner]:
        """A copy ended. Returns the owners whose KV is lost with it when it failed; their pages here are dropped."""
        block_id, block = copy.block, self.blocks[copy.block]
        block.copies -= 1
        self._copies -= 1
        block.landed |= copy.ok
        lost: list[Owner] = []
        if block_id in self._regathers:
            self._end_regather(block_id, copy.ok)
        elif not copy.ok:
            lost = list(block.owners if copy.out else copy.owners)
        for owner in lost:
            self.drop(owner)
        self._free_if_dead(block_id)
        return lost

    def _end_regather(self, block_id: int, ok: bool) -> None:
        """A regathered block has landed and replaces what it was made of; or it failed, and that stays."""
        block, regathered = self.blocks[block_id], self._regathers.pop(block_id)
        if not ok:
            block.owners.clear()
            return
        for owner, new in regathered.items():
            old = self._extents[owner][block.layer]
            self._extents[owner][block.layer] = [new, *(e for e in old if e.start >= new.end)]
            self._disown(owner, [e for e in old if e.start < new.end])

    def _free_if_dead(self, block_id: int) -> None:
        block = self.blocks.get(block_id)
        if block and not block.owners and not block.copies:
            del self.blocks[block_id]
            self.used -= block.num_pages
            self._freed.append(block_id)

    def take_freed(self) -> tuple[int, ...]:
        """Blocks freed since the last call: whoever holds their bytes lets them go."""
        freed, self._freed = tuple(self._freed), []
        return freed

    def check(self) -> None:
        """Asserts every invariant (debug mode and tests)."""
        assert self.used == sum(b.num_pages for b in self.blocks.values()) <= self.capacity, "host pages leaked"
        owned: dict[tuple[int, Owner], int] = {}
        for owner, layers in self._extents.items():
            for layer, extents in layers.items():
                for e in extents:
                    assert self.blocks[e.block].layer == layer, "an extent lies in another layer's block"
                    assert 0 <= e.offset <= self.blocks[e.block].num_pages - (e.end - e.start), "an extent is outside"
                    owned[e.block, owner] = owned.get((e.block, owner), 0) + e.end - e.start
        for block_id, extents_of in self._regathers.items():
            for owner, new in extents_of.items():
                ends = [e.end for e in self._extents[owner][self.blocks[block_id].layer]]
                assert new.end in ends, "what is being regathered is gone"
                owned[block_id, owner] = new.end - new.start
        listed = {(i, owner): n for i, b in self.blocks.items() for owner, n in b.owners.items()}
        assert owned == listed, "blocks and owners disagree"
        assert self._copies == sum(b.copies for b in self.blocks.values()), "copies in flight are miscounted"
        assert all(b.owners or b.copies for b in self.blocks.values()), "a dead block was kept"
