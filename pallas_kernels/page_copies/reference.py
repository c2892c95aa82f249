"""Page copies as Python loops over pages, never in place: the oracle of the tests."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dense import on_host
from pallas_kernels.kv_cache import ZERO_PAGE, KVArena
from pallas_kernels.page_copies.api import KVBlock


def gather_pages(arena: KVArena, pages) -> KVBlock:
    """See api.py."""
    k, v, pages = on_host(arena.k, arena.v, pages)
    blocks = [np.zeros((len(pages), *x.shape[1:]), x.dtype) for x in (k, v)]
    for i, page in enumerate(pages):
        if ZERO_PAGE < page < arena.num_pages:
            for block, x in zip(blocks, (k, v), strict=True):
                block[i] = x[page]
    return KVBlock(*map(jnp.asarray, blocks))


def scatter_pages(arena: KVArena, pages, block: KVBlock) -> KVArena:
    """See api.py."""
    (pages,) = on_host(pages)
    written = [x.copy() for x in on_host(arena.k, arena.v)]
    for x, new in zip(written, on_host(*block), strict=True):
        for i, page in enumerate(pages):
            if ZERO_PAGE < page < arena.num_pages:
                x[page] = new[i]
    k, v = map(jnp.asarray, written)
    return KVArena(k, v, arena.spec)


def copy_pages(arena: KVArena, src, dst) -> KVArena:
    """See api.py."""
    return scatter_pages(arena, dst, gather_pages(arena, src))
