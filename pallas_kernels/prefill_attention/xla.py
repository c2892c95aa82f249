"""Prefill attention in XLA: tile by tile, each over the KV tokens up to its own causal end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import accumulate, finish, init_state

TILE = 64  # KV tokens a step; a token count, so page sizes share one arithmetic


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
    qs = (q.astype(jnp.float32) * sm_scale).reshape(tiles, width, kv_heads, group, dim)
    qs = qs.transpose(0, 2, 1, 3, 4).reshape(tiles, kv_heads, width * group, dim)  # [NT, K, TQ*G, D]
    index = jnp.repeat(jnp.arange(width), group)  # [TQ*G] which query of the tile
    position = jnp.where(index < q_len[:, None], q_start[:, None] + index, -1)  # [NT, TQ*G], -1: sees nothing
    reach = jnp.iinfo(jnp.int32).max // 2 if window is None else window
    last = jnp.where(q_len > 0, q_start + q_len, 0)  # [NT]
    first = jnp.maximum(q_start + 1 - reach, 0)

    def step(i, state):
        k, v = arena.read_tile(view, i, TILE)
        slot = i * TILE + jnp.arange(TILE)
        kept = (slot >= first[:, None]) & (slot < last[:, None])
        seen = (slot <= position[..., None]) & (slot > position[..., None] - reach)  # [NT, TQ*G, TILE]
        return accumulate(state, qs, k, v, seen[:, None], kept, soft_cap)

    begin = jnp.min(jnp.where(q_len > 0, first, jnp.iinfo(jnp.int32).max)) // TILE
    end = (jnp.max(last) + TILE - 1) // TILE
    o, lse = finish(jax.lax.fori_loop(begin, end, step, init_state(qs.shape[:3], dim)))
    o = o.reshape(tiles, kv_heads, width, group, dim).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(tiles, kv_heads, width, group).transpose(0, 2, 1, 3)
    return o.reshape(tiles, width, heads, dim), lse.reshape(tiles, width, heads)
