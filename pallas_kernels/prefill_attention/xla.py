"""Prefill attention in XLA: two query tiles at a time, over the KV tokens up to the later one's causal end.

Two, because a step of one tile is short against the cost of a step on CPU (15% on 512 to 2048 tokens); no more, because
neighbours belong to one prompt only so far, and the earlier tile waits for the later.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import accumulate, finish, init_state

TILE = 128  # KV tokens a step


def prefill_attention(
    q: jax.Array,
    arena: KVArena,
    view: KVView,
    q_start: jax.Array,
    q_len: jax.Array,
    *,
    sm_scale: float | jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; returns (o float32 [NT, TQ, H, D], lse [NT, TQ, H])."""
    tiles, width, heads, dim = q.shape
    kv_heads = arena.num_kv_heads
    group = heads // kv_heads
    pair = 1 if tiles % 2 else 2  # W
    query = jnp.repeat(jnp.arange(width), group)  # [TQ*G] which query of the tile
    reach = jnp.iinfo(jnp.int32).max // 2 if window is None else window

    def one_pair(t):
        tile_q, start, count = (jax.lax.dynamic_slice_in_dim(x, t, pair) for x in (q, q_start, q_len))
        qs = (tile_q.astype(jnp.float32) * sm_scale).reshape(pair, width, kv_heads, group, dim)
        qs = qs.swapaxes(1, 2).reshape(pair, kv_heads, width * group, dim)  # [W, K, TQ*G, D]
        valid = query < count[:, None]
        position = jnp.where(valid, start[:, None] + query, -1)[:, None, :, None]  # [W, 1, TQ*G, 1], -1 sees nothing
        first = jnp.maximum(start + 1 - reach, 0)  # [W]
        last = jnp.where(count > 0, start + count, 0)  # [W]
        pages = view.take(t, pair)

        def step(i, state):
            # The barrier keeps XLA from fusing the transposition into the gather, which makes it element by element.
            k, v = jax.lax.optimization_barrier(arena.read(pages, i * TILE, TILE, first, last))
            k, v = k[:, 0].swapaxes(1, 2), v[:, 0].swapaxes(1, 2)  # [W, K, TILE, D]
            slot = i * TILE + jnp.arange(TILE)
            seen = (slot <= position) & (slot > position - reach)  # [W, 1, TQ*G, TILE]
            return accumulate(state, qs, k, v, seen, soft_cap)

        begin = jnp.min(jnp.where(count > 0, first, jnp.iinfo(jnp.int32).max)) // TILE
        end = (jnp.max(last) + TILE - 1) // TILE
        o, lse = finish(jax.lax.fori_loop(begin, end, step, init_state(qs)))
        o = o.reshape(pair, kv_heads, width, group, dim).swapaxes(1, 2)
        lse = lse.reshape(pair, kv_heads, width, group).swapaxes(1, 2)
        return o.reshape(pair, width, heads, dim), lse.reshape(pair, width, heads)

    o, lse = jax.lax.map(one_pair, jnp.arange(0, tiles, pair))
    return o.reshape(q.shape), lse.reshape(q.shape[:3])
