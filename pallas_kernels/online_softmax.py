"""Softmax attention accumulated over tiles of KV tokens, in float32: the arithmetic that the xla backends share.

State of a row of queries: the running maximum m of its scores, the sum l of exp(score - m), and the unnormalised output
o (Milakov & Gimelshein 2018; FlashAttention). Masked scores are -1e30, not -inf: a tile that is masked for a row that
has already seen a token multiplies its state by exp(0) = 1 and adds 0, so extra tiles change nothing, bit for bit; junk
gathered by a row that has seen none yet is multiplied by exp(-1e30 - m) = 0 at its first real tile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import KVArena

MASKED = -1e30  # score of a masked slot, and lse of a row that sees nothing


class State(NamedTuple):
    """Running softmax of rows of queries [..., M]."""

    m: jax.Array  # [..., M] maximum score so far
    l: jax.Array  # noqa: E741  [..., M] sum of exp(score - m)
    o: jax.Array  # [..., M, D] sum of exp(score - m) * v


def init_state(q: jax.Array) -> State:
    """The state of queries [..., M, D] that have seen nothing; `*_like` keeps it varying where q is, in shard_map."""
    return State(jnp.full_like(q[..., 0], MASKED), jnp.zeros_like(q[..., 0]), jnp.zeros_like(q))


def accumulate(
    state: State, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, soft_cap: float | None
) -> State:
    """The state after T more KV tokens.

    Args:
      state: of rows [..., M].
      q: [..., M, D] float32, already scaled.
      k, v: [..., T, D] float32, finite.
      seen: bool, broadcastable to [..., M, T]: which tokens a query sees.
      soft_cap: see `decode_attention`.
    """
    s = jnp.einsum("...md,...td->...mt", q, k)
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(seen, s, MASKED)
    m = jnp.maximum(state.m, s.max(-1))
    p = jnp.exp(s - m[..., None])
    a = jnp.exp(state.m - m)
    o = state.o * a[..., None] + jnp.einsum("...mt,...td->...md", p, v)
    return State(m, state.l * a + p.sum(-1), o)


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """(o [..., M, D] normalised, lse [..., M]); 0 and -1e30 for rows that saw nothing."""
    some = state.m > MASKED / 2
    o = jnp.where(some[..., None], state.o / jnp.where(some, state.l, 1.0)[..., None], 0.0)
    return o, jnp.where(some, state.m + jnp.log(jnp.where(some, state.l, 1.0)), MASKED)


def check_heads(q: jax.Array, arena: KVArena) -> None:
    """Raises ValueError unless q [..., H, D] fits the arena's K heads of D."""
    heads, dim = q.shape[-2:]
    if heads % arena.num_kv_heads or dim != arena.spec.head_dim:
        raise ValueError(
            f"q has {heads} heads of {dim}, the arena {arena.num_kv_heads} kv heads of {arena.spec.head_dim}; "
            "the query heads must be a multiple of the kv heads and the head dims equal"
        )
