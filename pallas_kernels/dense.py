"""NumPy oracle of attention over pages: a dense gather, one query at a time. What the reference backends share."""

from __future__ import annotations

import jax
import numpy as np
from jax.core import Tracer

from engine.errors import ConfigError
from pallas_kernels.kv_cache import KVArena, KVView, PagedView

MASKED_LSE = -1e30  # lse of a query that sees nothing


def on_host(*arrays) -> list[np.ndarray]:
    """Concrete arrays as NumPy.

    Raises:
      ConfigError: inside jit, where the reference backend cannot run.
    """
    if any(isinstance(a, Tracer) for a in arrays):
        raise ConfigError("the reference backend runs on concrete arrays, outside jit; use backend 'xla' inside")
    return [np.asarray(a) for a in arrays]


def dense_kv(arena: KVArena, view: KVView, row: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """K and V of the first `length` tokens of a row, float64 [length, K, D]."""
    size = arena.spec.page_size
    count = -(-length // size)
    if isinstance(view, PagedView):
        table, layer, rows = on_host(view.table, view.layer, view.rows)
        ids = table[int(layer), rows[row], :count]
    else:
        ids = on_host(view.start)[0][row] + np.arange(count)

    def gather(pages: jax.Array) -> np.ndarray:
        (stored,) = on_host(pages)
        tokens = stored[ids].reshape(-1, *stored.shape[2:])[:length]
        return tokens.view(np.dtype(arena.spec.dtype)).astype(np.float64)

    return gather(arena.k), gather(arena.v)


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sm_scale: float, soft_cap: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """One query over the tokens it sees.

    Args:
      q: [H, D]
      k, v: [T, K, D], exactly the tokens seen, T >= 1.

    Returns:
      o float64 [H, D], lse float64 [H]
    """
    group = q.shape[0] // k.shape[1]
    k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)  # [T, H, D]
    s = np.einsum("hd,thd->ht", q.astype(np.float64), k) * float(sm_scale)
    if soft_cap is not None:
        s = soft_cap * np.tanh(s / soft_cap)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    total = p.sum(-1, keepdims=True)
    return np.einsum("ht,thd->hd", p / total, v), (top + np.log(total))[:, 0]
