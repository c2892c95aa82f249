"""Decode attention as a Python loop over sequences, in float64: the oracle of the tests."""

from __future__ import annotations

import numpy as np

from pallas_kernels.dense import MASKED_LSE, attend, dense_kv, on_host
from pallas_kernels.kv_cache import KVArena, KVView


def decode_attention(q, arena: KVArena, view: KVView, lens, *, sm_scale, window, soft_cap):
    """See api.py; returns (o float64 [B, H, D], lse float64 [B, H]) as NumPy arrays."""
    q, lens = on_host(q, lens)
    o, lse = np.zeros(q.shape), np.full(q.shape[:2], MASKED_LSE)
    for b, n in enumerate(lens):
        if n == 0:
            continue
        first = 0 if window is None else max(0, int(n) - int(window))
        k, v = dense_kv(arena, view, b, int(n))
        o[b], lse[b] = attend(q[b], k[first:], v[first:], sm_scale, soft_cap)
    return o, lse
