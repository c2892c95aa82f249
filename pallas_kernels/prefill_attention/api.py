"""Causal attention of tiles of new tokens over their sequences' cached context: ragged, chunked prefill."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Kernel
from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import check_heads

KERNEL = Kernel("prefill_attention", ("xla", "reference"))


def prefill_attention(
    q: jax.Array,
    arena: KVArena,
    view: KVView,
    q_start: jax.Array,
    q_len: jax.Array,
    *,
    sm_scale: float | jax.Array,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Query j of tile t sits at position q_start[t] + j and sees every position <= its own of the tile's sequence.

    Args:
      q: [NT, TQ, H, D], any float dtype.
      arena: pages with K kv heads, the tiles' own tokens already written; query head h reads kv head h // (H / K).
      view: the pages of the NT tiles' sequences. Several tiles may belong to one sequence.
      q_start: int32 [NT], position of the tile's first query.
      q_len: int32 [NT], valid queries of the tile, from the first on; 0 marks a padding tile.
      sm_scale, window, soft_cap, return_lse, backend: as for `decode_attention`; a query at position p sees
        (p - window, p].

    Returns:
      o [NT, TQ, H, D] in q's dtype, computed in float32; rows beyond q_len are zero. With `return_lse` also lse,
      float32 [NT, TQ, H], -1e30 in those rows. At fixed [NT, TQ] a query's result is the same, bit for bit, whatever
      the other queries and tiles hold, however the prompt was cut, and for every view and page size (xla backend).

    Raises:
      ConfigError: an unknown backend.
      ValueError: shapes that do not fit each other.
    """
    check_heads(q, arena)
    if q_start.shape != q.shape[:1] or q_len.shape != q.shape[:1]:
        raise ValueError(f"q_start {q_start.shape} and q_len {q_len.shape} must be [{q.shape[0]}], one per tile")
    run = KERNEL.resolve(backend)
    o, lse = run(q, arena, view, q_start, q_len, sm_scale=sm_scale, window=window, soft_cap=soft_cap)
    o = jnp.asarray(o, q.dtype)
    return (o, jnp.asarray(lse, jnp.float32)) if return_lse else o
