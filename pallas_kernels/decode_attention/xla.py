"""Decode attention in XLA: all rows advance together through tiles of KV tokens, up to the longest row, the last tile
cut to the quarters that the longest row reaches into.

Kv heads go through the matrix products in groups about 128 wide: queries [C*G, C*D], zero outside their own kv head,
against tokens [T, C*D] gathered straight from the arena. That is C times the arithmetic of C products of D, but no
transposition and no narrow product, and decode on CPU waits for memory (measured with K = 4, D = 64: C = 2 takes 0.9 of
the time of C = 4, which takes half of that of C = 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import accumulate, finish, init_state

WIDTH = 128  # of a product, at least one head


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
    group = math.gcd(kv_heads, max(1, WIDTH // dim))  # C: kv heads in one product
    split = kv_heads // group  # J
    tile = 128 if rows >= 8 else 256  # KV tokens a step: few rows need longer steps to hide the cost of a step
    qs = (q.astype(jnp.float32) * sm_scale).reshape(rows, split, group, -1, 1, dim)  # [B, J, C, G, 1, D]
    own = jnp.eye(group, dtype=bool)[:, None, :, None]  # [C, 1, C, 1]
    wide = jnp.where(own, qs, 0.0).reshape(rows * split, heads // split, group * dim)  # [B*J, C*G, C*D]
    first = jnp.zeros_like(lens) if window is None else jnp.maximum(lens - window, 0)  # [B] first position seen

    def advance(start, count, state):
        k, v = (x.reshape(rows * split, count, group * dim) for x in arena.read(view, start, count, first, lens, split))
        slot = start + jnp.arange(count)
        seen = (slot >= first[:, None]) & (slot < lens[:, None])  # [B, count]
        return accumulate(state, wide, k, v, jnp.repeat(seen, split, axis=0)[:, None], soft_cap)

    begin = jnp.min(jnp.where(lens > 0, first, jnp.iinfo(jnp.int32).max)) // tile
    whole, quarter = jnp.max(lens) // tile, tile // 4
    state = jax.lax.fori_loop(begin, whole, lambda i, s: advance(i * tile, tile, s), init_state(wide))
    rests: list[Callable[..., Any]] = [lambda s: s, *(partial(advance, whole * tile, n * quarter) for n in range(1, 5))]
    o, lse = finish(jax.lax.switch((jnp.max(lens) % tile + quarter - 1) // quarter, rests, state))
    o = jnp.einsum("bjcgcd->bjcgd", o.reshape(rows, split, group, -1, group, dim))  # each query's own kv head
    return o.reshape(rows, heads, dim), lse.reshape(rows, heads)
