"""Attention of one new token per sequence over its cached context."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Kernel
from pallas_kernels.kv_cache import KVArena, KVView
from pallas_kernels.online_softmax import check_heads

KERNEL = Kernel("decode_attention", ("xla", "reference"))


def decode_attention(
    q: jax.Array,
    arena: KVArena,
    view: KVView,
    lens: jax.Array,
    *,
    sm_scale: float | jax.Array,
    window: jax.Array | int | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention of row b's query, at position lens[b] - 1, over positions [0, lens[b]).

    Args:
      q: [B, H, D], any float dtype.
      arena: pages with K kv heads; query head h reads kv head h // (H / K).
      view: the pages of the B rows.
      lens: int32 [B], tokens in the cache, the current one included (already written). 0 marks a padding row.
      sm_scale: multiplies q.k.
      window: int32 scalar, may be traced: only the last `window` positions are seen. None: all.
      soft_cap: c replaces a score s by c * tanh(s / c), before masking (Gemma 2). None: off.
      return_lse: also return log(sum(exp(scores))).
      backend: a name is obeyed; None takes the platform's default.

    Returns:
      o [B, H, D] in q's dtype, computed in float32; padding rows are zero. With `return_lse` also lse, float32 [B, H],
      -1e30 for padding rows.

    Raises:
      ConfigError: an unknown backend.
      ValueError: shapes that do not fit each other.
    """
    check_heads(q, arena)
    if lens.shape != q.shape[:1]:
        raise ValueError(f"lens has shape {lens.shape} for {q.shape[0]} rows")
    run = KERNEL.resolve(backend)
    o, lse = run(q, arena, view, lens, sm_scale=sm_scale, window=window, soft_cap=soft_cap)
    o = jnp.asarray(o, q.dtype)
    return (o, jnp.asarray(lse, jnp.float32)) if return_lse else o
