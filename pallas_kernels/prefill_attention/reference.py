"""Prefill attention as a Python loop over tiles and queries, in float64: the oracle of the tests."""

from __future__ import annotations

import numpy as np

from pallas_kernels.dense import MASKED_LSE, attend, dense_kv, on_host
from pallas_kernels.kv_cache import KVArena, KVView


def prefill_attention(q, arena: KVArena, view: KVView, q_start, q_len, *, sm_scale, window, soft_cap):
    """See api.py; returns (o float64 [NT, TQ, H, D], lse float64 [NT, TQ, H]) as NumPy arrays."""
    q, q_start, q_len = on_host(q, q_start, q_len)
    o, lse = np.zeros(q.shape), np.full(q.shape[:3], MASKED_LSE)
    for t, (start, count) in enumerate(zip(q_start, q_len, strict=True)):
        k, v = dense_kv(arena, view, t, int(start + count))
        for j in range(count):
            end = int(start) + j + 1
            first = 0 if window is None else max(0, end - int(window))
            o[t, j], lse[t, j] = attend(q[t, j], k[first:end], v[first:end], sm_scale, soft_cap)
    return o, lse
