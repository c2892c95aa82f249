"""Moves whole pages: out of the arena into a contiguous block, back, and from page to page.

A block is what a transfer to the host carries: one `jax.device_put(block, sharding)` moves it. Bits are moved as they
are stored, so NaN payloads survive. Callers round the number of pages up to a bucket and pad with -1, so that there
are few programs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from pallas_kernels.dispatch import Kernel
from pallas_kernels.kv_cache import KVArena

BACKENDS = ("xla", "reference")
GATHER = Kernel("gather_pages", BACKENDS, "page_copies")
SCATTER = Kernel("scatter_pages", BACKENDS, "page_copies")
COPY = Kernel("copy_pages", BACKENDS, "page_copies")


class KVBlock(NamedTuple):
    """Pages outside the arena, K and V apart: an array of both would be split by a copy before each scatter (measured
    on CPU: 3.3 instead of 15 GB/s)."""

    k: jax.Array  # [n, S, K, D] in storage dtype, token-major whatever the arena stores
    v: jax.Array


def gather_pages(arena: KVArena, pages: jax.Array, *, backend: str | None = None) -> KVBlock:
    """Copies pages out, in the order named.

    On CPU most of the time goes not to the copy but to the page faults of a fresh block (2.6 against 14 GB/s). A block
    that is not needed any more gives its memory to the next of its size as an argument that is donated and not read:
    `jax.jit(lambda arena, pages, old: gather_pages(arena, pages), donate_argnums=2, keep_unused=True)`.

    Args:
      pages: int32 [n]; may repeat; a page <= 0 or >= P reads as zeros (padding).

    Returns:
      A block of n pages.

    Raises:
      ConfigError: an unknown backend.
      ValueError: pages is not a vector.
    """
    _check_vectors(pages)
    return GATHER.resolve(backend)(arena, pages)


def scatter_pages(arena: KVArena, pages: jax.Array, block: KVBlock, *, backend: str | None = None) -> KVArena:
    """Copies a block's page i to page pages[i] of the arena; all other pages keep their bits.

    Args:
      arena: donate it to the enclosing jit: then nothing else is copied.
      pages: int32 [n]; an entry <= 0 or >= P is skipped (padding); no two that are kept may name the same page.
      block: of n pages, with the arena's shapes and storage dtype.

    Returns:
      The arena with the pages written.

    Raises:
      ConfigError: an unknown backend.
      ValueError: shapes or dtypes that do not fit each other.
    """
    _check_vectors(pages)
    want = (pages.shape[0], *arena.k.shape[1:])
    if {block.k.shape, block.v.shape} != {want} or {block.k.dtype, block.v.dtype} != {arena.k.dtype}:
        got = ", ".join(f"{x.dtype} {x.shape}" for x in block)
        raise ValueError(f"a block of {got} does not fit: both must be {arena.k.dtype} {want}")
    return SCATTER.resolve(backend)(arena, pages, block)


def copy_pages(arena: KVArena, src: jax.Array, dst: jax.Array, *, backend: str | None = None) -> KVArena:
    """Copies page src[i] to page dst[i], all reads before all writes, so src and dst may overlap in any way.

    Args:
      arena: donate it to the enclosing jit: then no more than n pages are held beside it.
      src: int32 [n]; may repeat; a page <= 0 or >= P reads as zeros.
      dst: int32 [n]; an entry <= 0 or >= P is skipped (padding); no two that are kept may name the same page.

    Returns:
      The arena with the pages written.

    Raises:
      ConfigError: an unknown backend.
      ValueError: src and dst are not vectors of one length.
    """
    _check_vectors(src, dst)
    return COPY.resolve(backend)(arena, src, dst)


def _check_vectors(*pages: jax.Array) -> None:
    shapes = [p.shape for p in pages]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(f"page ids of shape {', '.join(map(str, shapes))}: vectors of one length are wanted")
