"""Decode attention in XLA: all rows advance together through tiles of KV tokens, up to the longest row.

The kv heads stay side by side in one matrix product per row: queries [H, K*D], zero outside their own kv head, against
tokens [T, K*D] as they lie in the arena. That is K times the arithmetic of K products of D, but needs no transposition,
and decode on CPU waits for memory: 1.3 to 3 times faster than heads as a batch dimension (K = 2 to 16).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import accumulate, finish, init_state


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
    tile = 64 if rows >= 8 else 128  # KV tokens a step: few rows need longer steps to hide the cost of a step
    qs = (q.astype(jnp.float32) * sm_scale).reshape(rows, kv_heads, -1, 1, dim)  # [B, K, G, 1, D]
    own = jnp.eye(kv_heads, dtype=bool)[:, None, :, None]  # [K, 1, K, 1]
    wide = jnp.where(own, qs, 0.0).reshape(rows, heads, kv_heads * dim)  # [B, H, K*D]
    first = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0)  # [B] first position seen

    def step(i, state):
        k, v = (x.reshape(rows, tile, kv_heads * dim) for x in arena.read(view, i, tile, first, lens))
        slot = i * tile + jnp.arange(tile)
        seen = (slot >= first[:, None]) & (slot < lens[:, None])  # [B, tile]
        return accumulate(state, wide, k, v, seen[:, None], soft_cap)

    begin = jnp.min(jnp.where(lens > 0, first, jnp.iinfo(jnp.int32).max)) // tile
    end = (jnp.max(lens) + tile - 1) // tile
    o, lse = finish(jax.lax.fori_loop(begin, end, step, init_state(wide)))
    o = jnp.einsum("bkgkd->bkgd", o.reshape(rows, kv_heads, -1, kv_heads, dim))  # each query's own kv head
    return o.reshape(rows, heads, dim), lse
