"""Page copies as one XLA gather and one XLA scatter each for K and V.

Pages are gathered as 4-D slices, without a reshape that some device would have to lay out anew. On CPU this is as fast
as rows of S * K * D and as loops over pages.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import ZERO_PAGE, KVArena
from pallas_kernels.page_copies.api import KVBlock


def gather_pages(arena: KVArena, pages: jax.Array) -> KVBlock:
    """See api.py. A page that is none reads the zero page."""
    inside = jnp.where(pages < arena.num_pages, jnp.maximum(pages, ZERO_PAGE), ZERO_PAGE)
    return KVBlock(
        *(x.at[inside].get(mode="promise_in_bounds", wrap_negative_indices=False) for x in (arena.k, arena.v))
    )


def scatter_pages(arena: KVArena, pages: jax.Array, block: KVBlock) -> KVArena:
    """See api.py. A skipped page is moved past the last one, where the scatter drops it."""
    target = jnp.where(pages > ZERO_PAGE, pages, arena.num_pages)
    k, v = (x.at[target].set(new, mode="drop") for x, new in zip((arena.k, arena.v), block, strict=True))
    return KVArena(k, v, arena.spec)


def copy_pages(arena: KVArena, src: jax.Array, dst: jax.Array) -> KVArena:
    """See api.py. The scatter needs the whole gathered block, so one program does both and the arena is not copied."""
    return scatter_pages(arena, dst, gather_pages(arena, src))
