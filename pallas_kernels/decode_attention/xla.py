"""Decode attention in XLA: all rows advance together through tiles of KV tokens, up to the longest row."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import accumulate, finish, init_state

TILE = 64  # KV tokens a step; a token count, so page sizes share one arithmetic


def decode_attention(
    q: jax.Array,
    arena: KVArena,
    view: KVView,
    lens: jax.Array,
    *,
    sm_scale: float | jax.Array,
    window: jax.Array | int | None,
    soft_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See api.py; returns (o float32 [B, H, D], lse [B, H])."""
    rows, heads, dim = q.shape
    kv_heads = arena.num_kv_heads
    qs = (q.astype(jnp.float32) * sm_scale).reshape(rows, kv_heads, heads // kv_heads, dim)  # [B, K, G, D]
    first = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0)  # [B] first position seen

    def step(i, state):
        k, v = arena.read_tile(view, i, TILE)
        slot = i * TILE + jnp.arange(TILE)
        kept = (slot >= first[:, None]) & (slot < lens[:, None])  # [B, TILE]
        return accumulate(state, qs, k, v, kept[:, None, None], kept, soft_cap)

    begin = jnp.min(jnp.where(lens > 0, first, jnp.iinfo(jnp.int32).max)) // TILE
    end = (jnp.max(lens) + TILE - 1) // TILE
    o, lse = finish(jax.lax.fori_loop(begin, end, step, init_state(qs.shape[:3], dim)))
    return o.reshape(rows, heads, dim), lse.reshape(rows, heads)
