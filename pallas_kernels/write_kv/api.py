"""Writes new tokens' K and V into their pages, in place when the arena is donated."""

from __future__ import annotations

import jax

from pallas_kernels.dispatch import Kernel
from pallas_kernels.kv_cache import KVArena

KERNEL = Kernel("write_kv", ("xla", "reference"))


def write_kv(
    arena: KVArena,
    k_new: jax.Array,
    v_new: jax.Array,
    page: jax.Array,
    offset: jax.Array,
    *,
    backend: str | None = None,
) -> KVArena:
    """Stores token t in slot offset[t] of page page[t]; everything else keeps its bits.

    Args:
      arena: donate it to the enclosing jit, and read it only after the write: then nothing is copied.
      k_new, v_new: [T, K, D], any float dtype; rounded to the arena's.
      page: int32 [T]; a token whose page is <= 0 or >= P is skipped: padding, and the zero page stays zero.
      offset: int32 [T], in [0, S). No two tokens that are kept may name the same slot.

    Returns:
      The arena with the tokens written.

    Raises:
      ConfigError: an unknown backend.
      ValueError: shapes that do not fit each other.
    """
    want = (page.shape[0], *arena.k.shape[2:])
    if k_new.shape != want or v_new.shape != want or offset.shape != page.shape:
        raise ValueError(f"k_new {k_new.shape}, v_new {v_new.shape}, offset {offset.shape}: tokens must be {want}")
    return KERNEL.resolve(backend)(arena, k_new, v_new, page, offset)
