"""The KV arena and the views that kernels get of it. This file alone knows the stored shape.

An arena is one array of K pages and one of V pages, for all layers. A page holds `page_size` tokens of one layer. A
view says which pages a row of a kernel call (a decode row or a prefill query tile) reads, in the order of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from engine.config import DTYPES
from engine.errors import ConfigError

ZERO_PAGE = 0  # reserved: all zeros, never written; padding points to it


@dataclass(frozen=True)
class KVSpec:
    """Shape and dtype of the KV pages of a model, over all devices (a shard of an arena holds fewer heads)."""

    page_size: int  # S: tokens of one layer in a page, a power of two
    num_kv_heads: int  # K
    head_dim: int  # D
    dtype: str  # a key of DTYPES: what the values mean, not how they are stored

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConfigError(f"KV dtype {self.dtype!r} is not supported; known: {', '.join(DTYPES)}")
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise ConfigError(f"page_size must be a power of two, got {self.page_size}")

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, K and V together."""
        return 2 * self.page_size * self.num_kv_heads * self.head_dim * DTYPES[self.dtype]


def storage_dtype(spec: KVSpec, platform: str) -> jnp.dtype:
    """The dtype pages are stored in: 16-bit values as uint16 on CPU, where JAX 0.10.2 would convert a whole 16-bit
    arena to float32 and back at every write; otherwise the dtype itself."""
    return jnp.dtype("uint16" if platform == "cpu" and DTYPES[spec.dtype] == 2 else spec.dtype)


@struct.dataclass
class KVArena:
    """K and V pages of all layers. Donate it to every program that writes it, and never slice it out and back."""

    k: jax.Array  # [P, S, K, D] in storage dtype
    v: jax.Array  # [P, S, K, D] in storage dtype
    spec: KVSpec = struct.field(pytree_node=False)

    @property
    def num_pages(self) -> int:
        """P, the reserved zero page included."""
        return self.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """K of this shard."""
        return self.k.shape[2]

    def encode(self, x: jax.Array) -> jax.Array:
        """Values of any float dtype in storage dtype, same shape."""
        x = x.astype(self.spec.dtype)
        return x if x.dtype == self.k.dtype else jax.lax.bitcast_convert_type(x, self.k.dtype)

    def decode(self, x: jax.Array) -> jax.Array:
        """Stored values as float32, same shape."""
        if x.dtype != jnp.dtype(self.spec.dtype):
            x = jax.lax.bitcast_convert_type(x, self.spec.dtype)
        return x.astype(jnp.float32)

    def read(
        self, view: KVView, start: jax.Array | int, count: int, first: jax.Array, last: jax.Array, split: int = 1
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens [start, start + count) of every row of `view`.

        A token outside [first, last) of its row reads slot 0 of the zero page instead, so unwritten slots, which may
        hold NaN, never reach the arithmetic, and every page size and view runs the same code from here on.

        Args:
          view: the pages of R rows.
          start: int32 scalar, may be traced: a multiple of the page size, unless the tokens lie in one page.
          count: static.
          first, last: int32 [R], the tokens to read.
          split: static, divides K: J groups of K / J kv heads come one after the other, each with all tokens.

        Returns:
          K and V, float32 [R, J, count, K / J, D].
        """
        size = self.spec.page_size
        ids = view.page_ids(start // size, -(-count // size))  # [R, pages of these tokens]
        slot = start + jnp.arange(count, dtype=jnp.int32)
        wanted = (slot >= first[:, None]) & (slot < last[:, None])
        ids = jnp.repeat(ids, min(size, count), axis=1)[:, :count]
        token = jnp.where(wanted, ids * size + slot % size, ZERO_PAGE * size)  # in the arena seen as rows of tokens

        row = token[:, None] * split + jnp.arange(split, dtype=jnp.int32)[:, None]  # [R, J, count]

        def gather(pages: jax.Array) -> jax.Array:
            heads, dim = pages.shape[2] // split, pages.shape[3]
            rows = pages.reshape(-1, heads * dim)  # rows: 3-6x faster on CPU than 4-D slices
            rows = rows.at[row].get(mode="clip", wrap_negative_indices=False)
            return self.decode(rows).reshape(*row.shape, heads, dim)

        return gather(self.k), gather(self.v)


def init_arena(
    spec: KVSpec, num_pages: int, sharding: jax.sharding.Sharding | None = None, poison: bool = False
) -> KVArena:
    """A new arena of zeros.

    Args:
      num_pages: P, the reserved zero page included.
      sharding: of `k` and `v`, [P, S, K, D]; None: the default device.
      poison: fill every page except the zero page with NaN, so that a read of an unwritten slot shows.
    """
    if num_pages < 2:
        raise ConfigError(f"an arena needs at least 2 pages (page {ZERO_PAGE} is reserved), got {num_pages}")
    device: Any = next(iter(sharding.device_set)) if sharding else jax.devices()[0]
    stored = storage_dtype(spec, device.platform)
    nan = jnp.asarray(jnp.nan, spec.dtype)
    fill = (nan if nan.dtype == stored else nan.view(stored)) if poison else jnp.zeros((), stored)

    def pages() -> jax.Array:
        x = jnp.full((num_pages, spec.page_size, spec.num_kv_heads, spec.head_dim), fill, stored, device=sharding)
        return x.at[ZERO_PAGE].set(0) if poison else x

    return KVArena(pages(), pages(), spec)


@struct.dataclass
class PagedView:
    """Rows of a page table on the device. The table holds every layer; the view names one."""

    table: jax.Array  # int32 [L, slots, N]
    layer: jax.Array  # int32 scalar, may be traced
    rows: jax.Array  # int32 [R]: the slot of each row
    parked: jax.Array | None = None  # int32 [R, 3]: (a, b, start): pages [a, b) lie at `start` on, not in the table

    def page_ids(self, first: jax.Array | int, count: int) -> jax.Array:
        """Page ids of logical pages [first, first + count) of each row; the zero page beyond the table's N.

        Args:
          first: int32 scalar or [R], may be traced.
          count: static.

        Returns:
          int32 [R, count]
        """
        logical = _logical(first, count, self.rows.shape[0])
        at = self.table.at[self.layer, self.rows[:, None], logical]
        ids = at.get(mode="clip", wrap_negative_indices=False)
        ids = jnp.where((logical >= 0) & (logical < self.table.shape[2]), ids, ZERO_PAGE)
        if self.parked is None:
            return ids
        a, b, start = (self.parked[:, i : i + 1] for i in range(3))
        return jnp.where((logical >= a) & (logical < b), start + logical - a, ids)

    def take(self, first: jax.Array | int, count: int) -> PagedView:
        """The view of rows [first, first + count); first may be traced."""
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, first, count)  # noqa: E731
        return PagedView(self.table, self.layer, *jax.tree.map(part, (self.rows, self.parked)))


@struct.dataclass
class RunView:
    """Rows that are runs of consecutive pages of the arena."""

    start: jax.Array  # int32 [R]: first page of each row's run

    def page_ids(self, first: jax.Array | int, count: int) -> jax.Array:
        """As `PagedView.page_ids`; ids beyond the run name whatever follows it, clamped by the reader to the arena."""
        return self.start[:, None] + _logical(first, count, self.start.shape[0])

    def take(self, first: jax.Array | int, count: int) -> RunView:
        """The view of rows [first, first + count); first may be traced."""
        return RunView(jax.lax.dynamic_slice_in_dim(self.start, first, count))


KVView = PagedView | RunView


def _logical(first: jax.Array | int, count: int, rows: int) -> jax.Array:
    """Logical page numbers [R, count] from `first`, a scalar or [R]."""
    start = jnp.broadcast_to(jnp.asarray(first, jnp.int32), (rows,))
    return start[:, None] + jnp.arange(count, dtype=jnp.int32)
