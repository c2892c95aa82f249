"""How the sampling parameters of one row are laid out: by slot on the host, and as they travel to the device.

A structured array of `ROW` is kept by slot and taken by row: one copy per step, which goes to the device as one int32
array `[R, FIELDS]` (floats as bits). A row of zeros is greedy and plain, so padding needs no care. No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.request import Request

MAX_STOP_IDS = 16  # tokens that `min_tokens` can forbid per request; each is a scatter index in every sampled row

ROW = np.dtype(
    [
        ("temperature", "f4"),  # 0 = greedy
        ("top_k", "i4"),  # 0 = all
        ("top_p", "f4"),
        ("min_p", "f4"),
        ("seed", "i4"),
        ("index", "i4"),  # which token of the request: random keys and `min_tokens` go by it
        ("min_tokens", "i4"),  # while index is below it, `stop_ids` cannot be drawn; 0 when there are none
        ("stop_ids", "i4", (MAX_STOP_IDS,)),
        ("logprobs", "i4"),  # 0 = none, else alternatives wanted + 1
    ]
)
FIELDS = ROW.itemsize // 4


def sampling_row(request: Request) -> np.void:
    """The request's `ROW`; its index is filled in at each step."""
    p, row = request.params, np.zeros(1, ROW)[0]
    row["temperature"], row["top_k"], row["top_p"], row["min_p"] = p.temperature, p.top_k, p.top_p, p.min_p
    row["seed"] = request.seed
    if p.min_tokens and request.stop_ids:
        row["min_tokens"] = p.min_tokens
        row["stop_ids"] = np.resize(sorted(request.stop_ids), MAX_STOP_IDS)  # repeated: naming one twice is harmless
    if p.logprobs is not None:
        row["logprobs"] = p.logprobs + 1
    return row


def is_plain(request: Request) -> bool:
    """True when argmax will do for every token of the request."""
    p = request.params
    return p.temperature == 0 and p.logprobs is None and not p.min_tokens and not p.forced_tokens


def need_sampler(rows: np.ndarray) -> bool:
    """True when argmax alone would not do for some of `rows` [n]."""
    return bool((rows["temperature"] > 0).any() or (rows["index"] < rows["min_tokens"]).any() or need_logprobs(rows))


def need_logprobs(rows: np.ndarray) -> bool:
    """True when some of `rows` [n] want log-probabilities."""
    return bool(rows["logprobs"].any())
