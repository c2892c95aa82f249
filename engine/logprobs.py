"""Log-probabilities of a produced token: a row as the device makes it, and the record that users get."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MAX_LOGPROBS = 20  # alternatives that the device computes, whatever is asked for; vLLM's default maximum
ROW_FIELDS = 2 + 2 * MAX_LOGPROBS  # int32: the token's log-probability (bits) and rank, ids, their log-probabilities


class TokenLogprobs(NamedTuple):
    """What the model thought of one produced token: log-softmax of the raw logits, before any cut or temperature."""

    token: int
    logprob: float
    rank: int  # 1 + the number of tokens that were more likely
    top_tokens: tuple[int, ...]  # the k most likely, best first; `token` is among them only if it ranks there
    top_logprobs: tuple[float, ...]


def read_row(token: int, row: np.ndarray, k: int) -> TokenLogprobs:
    """The record of `token` from its device row int32 [ROW_FIELDS], cut to k alternatives."""
    floats = row.view(np.float32)
    ids, values = row[2 : 2 + k], floats[2 + MAX_LOGPROBS : 2 + MAX_LOGPROBS + k]
    return TokenLogprobs(token, float(floats[0]), int(row[1]), tuple(ids.tolist()), tuple(values.tolist()))
