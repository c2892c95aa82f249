"""KV write as one XLA scatter for K and one for V."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import ZERO_PAGE, KVArena


def write_kv(arena: KVArena, k_new: jax.Array, v_new: jax.Array, page: jax.Array, offset: jax.Array) -> KVArena:
    """See api.py. A skipped token is moved past the last page, where the scatter drops it."""
    page = jnp.where(page > ZERO_PAGE, page, arena.num_pages)

    def scatter(pages: jax.Array, new: jax.Array) -> jax.Array:
        return pages.at[page, offset].set(arena.encode(new), mode="drop")

    return KVArena(scatter(arena.k, k_new), scatter(arena.v, v_new), arena.spec)
