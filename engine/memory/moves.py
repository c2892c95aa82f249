"""Moves between the device tier and the host tier, as values. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Owner = str  # whoever pages belong to: the id of a request


@dataclass(frozen=True, slots=True)
class Move:
    """Pages of one layer that go to the host in one block, or come back from it."""

    out: bool  # True: device to host
    block: int  # id of the host block
    layer: int
    pages: np.ndarray  # int32 [n] on the device: page i of the block comes from it, or goes there; -1 = not wanted
    owners: tuple[Owner, ...] = ()  # of pages that come back
    transient: bool = False  # pages count from the first transient page: streamed in, or regathered from there


@dataclass(frozen=True, slots=True)
class Copy:
    """A move that has ended. Times are seconds on the engine's clock."""

    out: bool
    block: int
    layer: int
    ok: bool
    num_bytes: int
    start: float
    end: float
    owners: tuple[Owner, ...] = ()  # the move's
    transient: bool = False  # the move's


@dataclass(frozen=True, slots=True)
class Stream:
    """How a step reads parked pages of one layer: fetched into transient pages ahead of the layer, used, dropped."""

    layer: int
    rows: np.ndarray  # int32 [n, 4]: slot, a, b, transient start: pages [a, b) of the slot lie there, one after another
    fetches: tuple[Move, ...]  # transient
    regather: Move | None = None  # out: once fetched, the same pages leave again in one block, for later steps to fetch

    @property
    def moves(self) -> tuple[Move, ...]:
        """The fetches, then the regather if there is one."""
        return self.fetches if self.regather is None else (*self.fetches, self.regather)
