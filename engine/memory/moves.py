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
    transient: bool = False  # pages count from the first transient page: streamed in, or sent from there


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
    """How a step has pages of one layer in transient pages: those parked before are fetched ahead of the layer, those
    that the step writes for the host are written there; all are used, and dropped."""

    layer: int
    rows: np.ndarray  # int32 [n, 4]: slot, a, b, transient start: pages [a, b) of the slot lie there, one after another
    fetches: tuple[Move, ...]  # transient
    sends: tuple[
        Move, ...
    ] = ()  # transient, out, behind the layer: what it wrote there, or all regathered in one block

    @property
    def moves(self) -> tuple[Move, ...]:
        """The fetches, then the sends."""
        return (*self.fetches, *self.sends)
