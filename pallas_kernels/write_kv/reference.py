"""KV write as a Python loop over tokens, on a copy: the oracle of the tests."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.dense import on_host
from pallas_kernels.kv_cache import ZERO_PAGE, KVArena


def write_kv(arena: KVArena, k_new, v_new, page, offset) -> KVArena:
    """See api.py; never in place."""
    page, offset = on_host(page, offset)

    def write(pages, new):
        pages, new = on_host(pages, arena.encode(new))
        pages = pages.copy()
        for t, (p, s) in enumerate(zip(page, offset, strict=True)):
            if ZERO_PAGE < p < arena.num_pages:
                pages[p, s] = new[t]
        return jnp.asarray(pages)

    return KVArena(write(arena.k, k_new), write(arena.v, v_new), arena.spec)
