"""From a plan to what the device programs read: buckets, sub-batches and one packed int32 array each. No JAX here.

A step runs as one or more **sub-batches**, each a bucket of `rows` decode rows `[B]` and `tiles` prefill query tiles
`[NT, TQ]`. All sub-batches of a step go through a layer before any goes through the next, in order, so a prompt
longer than the largest bucket loops over it inside each layer. Bucket sizes are powers of two:

* decode-only steps bucket rows; prefill-only sub-batches bucket tiles; mixed ones tiles at the largest row bucket;
* `deterministic` has one bucket of tiles, in which every decode row is a tile with one valid query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.config import next_power_of_two
from engine.scheduler.plan import Plan

FROM_DEVICE = -1  # token value: take the last token sampled into the slot


class Bucket(NamedTuple):
    """Static shape of a sub-batch."""

    rows: int  # B: decode rows
    tiles: int  # NT: query tiles
    tile: int  # TQ: tokens in a query tile

    @property
    def tokens(self) -> int:
        """T: tokens through the linear layers."""
        return self.rows + self.tiles * self.tile

    @property
    def outputs(self) -> int:
        """Rows through the LM head: every decode row, and the last valid token of every tile."""
        return self.rows + self.tiles

    def sections(self) -> dict[str, int]:
        """Sections of the packed array, in order, and their lengths."""
        return {
            "row_slot": self.rows,
            "row_position": self.rows,  # of the input token; -1 = padding
            "row_token": self.rows,  # the input token; FROM_DEVICE = the last one sampled into the slot
            "tile_slot": self.tiles,
            "tile_start": self.tiles,  # position of the tile's first token
            "tile_length": self.tiles,  # valid tokens; 0 = padding
            "tile_tokens": self.tiles * self.tile,
            "out_slot": self.outputs,  # slot that keeps the sampled token; the last slot = nobody
            "out_forced": self.outputs,  # teacher forcing; -1 = the sampled token
        }

    def unpack(self, packed):
        """Sections of the packed array `[sum of sections]` by name, as slices."""
        out, at = {}, 0
        for name, length in self.sections().items():
            out[name] = packed[at : at + length]
            at += length
        return out


@dataclass(frozen=True)
class SubBatch:
    """One pass over the layers. `outputs[i]` is the plan's sampled row that LM-head row `rows[i]` answers."""

    bucket: Bucket
    packed: np.ndarray  # int32
    head_rows: np.ndarray  # int32 [n] rows of the LM head that are sampled
    plan_rows: np.ndarray  # int32 [n] the plan's sampled rows they answer


class Packer:
    """Cuts plans into sub-batches for one engine's limits."""

    def __init__(self, num_slots: int, tile: int, max_tiles: int, deterministic: bool):
        self.num_slots = num_slots
        self.tile, self.max_tiles, self.deterministic = tile, max_tiles, deterministic
        self.max_rows = next_power_of_two(num_slots)

    def buckets(self, mixed: bool) -> list[Bucket]:
        """Every bucket a plan can need: what warm-up compiles. `mixed`: steps may prefill and decode at once."""
        powers = lambda n: [1 << i for i in range(n.bit_length())]  # noqa: E731
        if self.deterministic:
            return [Bucket(0, self.max_tiles, self.tile)]
        rows = [Bucket(b, 0, self.tile) for b in powers(self.max_rows)]
        tiles = [Bucket(0, n, self.tile) for n in powers(self.max_tiles)]
        return rows + tiles + [Bucket(self.max_rows, n, self.tile) for n in powers(self.max_tiles) if mixed]

    def padding(self, bucket: Bucket) -> np.ndarray:
        """The packed array of a sub-batch in which every row and tile is padding: it writes nothing."""
        packed = np.zeros(sum(bucket.sections().values()), np.int32)
        part = bucket.unpack(packed)
        part["row_position"][:] = -1
        part["row_token"][:] = FROM_DEVICE
        part["out_slot"][:] = self.num_slots
        part["out_forced"][:] = -1
        return packed

    def cut(self, num_rows: int, num_tiles: int) -> list[tuple[Bucket, int, int]]:
        """(bucket, decode rows, query tiles) of each sub-batch of a step with so many of both, in order."""
        if self.deterministic and num_rows:
            return self.cut(0, num_rows + num_tiles)  # a row is a tile with one valid query, and they come first
        if num_rows and not num_tiles:
            return [(Bucket(next_power_of_two(num_rows), 0, self.tile), num_rows, 0)]
        parts = []
        for at in range(0, num_tiles, self.max_tiles):
            tiles = min(self.max_tiles, num_tiles - at)
            size = self.max_tiles if self.deterministic else next_power_of_two(tiles)
            rows = num_rows if at == 0 else 0
            parts.append((Bucket(self.max_rows if rows else 0, size, self.tile), rows, tiles))
        return parts

    def pack(self, plan: Plan) -> list[SubBatch]:
        """The plan's sub-batches, in the order in which each layer runs them."""
        decode = np.stack([plan.decode_slots, plan.decode_positions, plan.decode_tokens], 1)  # [B, 3]
        tiles = self._tiles(plan)
        if self.deterministic:
            ones = [(int(s), int(p), t, i) for i, (s, p, *t) in enumerate(decode)]
            tiles, decode = ones + tiles, decode[:0]
        batches, at = [], 0
        for bucket, rows, count in self.cut(len(decode), len(tiles)):
            batches.append(self._build(bucket, decode[:rows], tiles[at : at + count], plan))
            at += count
        return batches

    def tile_ends(self, start: int, num_tokens: int) -> list[int]:
        """Tokens that the last query of each tile attends to, for a prefill of `num_tokens` after `start` others."""
        return [start + min(i + self.tile, num_tokens) for i in range(0, num_tokens, self.tile)]

    def _tiles(self, plan: Plan) -> list[tuple[int, int, np.ndarray, int]]:
        """Query tiles of the prefills: (slot, start, tokens, sampled row of the plan or -1)."""
        tiles, row = [], len(plan.decode_slots)
        for prefill in plan.prefills:
            for i in range(0, len(prefill.tokens), self.tile):  # as in `tile_ends`
                tokens = prefill.tokens[i : i + self.tile]
                last = prefill.samples and i + self.tile >= len(prefill.tokens)
                tiles.append((prefill.slot, prefill.start + i, tokens, row if last else -1))
            row += prefill.samples
        return tiles

    def _build(self, bucket: Bucket, decode: np.ndarray, tiles: list, plan: Plan) -> SubBatch:
        packed = self.padding(bucket)
        part = bucket.unpack(packed)  # views
        n = len(decode)
        part["row_slot"][:n], part["row_position"][:n], part["row_token"][:n] = decode.T
        part["out_slot"][:n] = decode[:, 0]
        head_rows, plan_rows = list(range(n)), list(range(n))
        tokens = part["tile_tokens"].reshape(bucket.tiles, bucket.tile)
        for t, (slot, start, ids, row) in enumerate(tiles):
            part["tile_slot"][t], part["tile_start"][t], part["tile_length"][t] = slot, start, len(ids)
            tokens[t, : len(ids)] = ids
            if row >= 0:
                part["out_slot"][bucket.rows + t] = slot
                head_rows.append(bucket.rows + t)
                plan_rows.append(row)
        head, rows = np.asarray(head_rows, np.int32), np.asarray(plan_rows, np.int32)
        if plan.forced is not None:
            part["out_forced"][head] = plan.forced[rows]
        return SubBatch(bucket, packed, head, rows)
