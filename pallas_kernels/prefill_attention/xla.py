"""Prefill attention in XLA: one query tile after the other, each over the KV tokens up to its own causal end."""

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
    query = jnp.repeat(jnp.arange(width), group)  # [TQ*G] which query of the tile
    reach = jnp.iinfo(jnp.int32).max // 2 if window is None else window

    def one_tile(t):
        qs = (q[t].astype(jnp.float32) * sm_scale).reshape(width, kv_heads, group, dim)
        qs = qs.transpose(1, 0, 2, 3).reshape(kv_heads, width * group, dim)  # [K, TQ*G, D]
        position = jnp.where(query < q_len[t], q_start[t] + query, -1)[:, None]  # [TQ*G, 1], -1 sees nothing
        first = jnp.maximum(q_start[t] + 1 - reach, 0)
        last = jnp.where(q_len[t] > 0, q_start[t] + q_len[t], 0)
        pages = view.row(t)

        def step(i, state):
            k, v = (x[0].swapaxes(0, 1) for x in arena.read(pages, i, TILE, first[None], last[None]))  # [K, TILE, D]
            slot = i * TILE + jnp.arange(TILE)
            seen = (slot <= position) & (slot > position - reach)  # [TQ*G, TILE]
            return accumulate(state, qs, k, v, seen, soft_cap)

        o, lse = finish(jax.lax.fori_loop(first // TILE, (last + TILE - 1) // TILE, step, init_state(qs)))
        o = o.reshape(kv_heads, width, group, dim).transpose(1, 0, 2, 3)
        lse = lse.reshape(kv_heads, width, group).transpose(1, 0, 2)
        return o.reshape(width, heads, dim), lse.reshape(width, heads)

    return jax.lax.map(one_tile, jnp.arange(tiles))
