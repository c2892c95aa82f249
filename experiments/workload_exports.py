"""Workloads in the dataset formats of other systems' benchmarks. Outputs are always `output_len` tokens: run them with
the other side's ignore-eos flag.

vllm: `vllm bench serve --dataset-name custom --skip-chat-template --disable-shuffle` (CustomDataset of
vllm/benchmarks/datasets, releases whose rows take `output_tokens`; older ones need --custom-output-len). One object per
line, `prompt` as text and `output_tokens`. It has no arrival times: vLLM draws them from --request-rate.

sglang: `python -m sglang.bench_serving --dataset-name autobench` (sglang/benchmark/datasets/autobench.py, 2026; earlier
releases have no dataset of token ids). One object per line, `prompt` as token ids, `prompt_len`, `output_len`, and
`timestamp` in ms.

mooncake: the FAST'25 trace format, `timestamp` (ms, integer), `input_length`, `output_length`, `hash_ids`: one id per
512 tokens, the last block possibly shorter, chained: equal ids mean equal tokens up to the block's end. Ids count up
from 0. vLLM replays it with `--dataset-name timed_trace --self-timed --timed-trace-chunk-hash-size 512
--timed-trace-sec-multiplier 0.001`, SGLang with `--dataset-name mooncake`; both make up tokens of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from engine.tokenizer import Tokenizer
from experiments.workloads import WorkloadRequest

MOONCAKE_BLOCK = 512  # tokens


def vllm(requests: Sequence[WorkloadRequest], vocab_size: int, tokenizer: Tokenizer) -> tuple[str, int]:
    """The file's text, and how many prompts do not keep their length when their text is encoded again."""
    texts = [tokenizer.decode(r.prompt_tokens(vocab_size).tolist()) for r in requests]
    changed = sum(len(tokenizer.encode(t)) != r.prompt_len for r, t in zip(requests, texts, strict=True))
    rows = ({"prompt": t, "output_tokens": r.output_len} for r, t in zip(requests, texts, strict=True))
    return _lines(rows), changed


def sglang(requests: Sequence[WorkloadRequest], vocab_size: int) -> str:
    """The file's text."""
    return _lines(
        {
            "prompt": r.prompt_tokens(vocab_size).tolist(),
            "prompt_len": r.prompt_len,
            "output_len": r.output_len,
            "timestamp": r.arrival_s * 1e3,
        }
        for r in requests
    )


def mooncake(requests: Sequence[WorkloadRequest], vocab_size: int) -> str:
    """The file's text."""
    ids: dict[bytes, int] = {}
    return _lines(
        {
            "timestamp": round(r.arrival_s * 1e3),
            "input_length": r.prompt_len,
            "output_length": r.output_len,
            "hash_ids": [ids.setdefault(h, len(ids)) for h in _block_hashes(r.prompt_tokens(vocab_size))],
        }
        for r in requests
    )


def _block_hashes(tokens: np.ndarray) -> list[bytes]:
    """A hash per block of MOONCAKE_BLOCK tokens, each over everything up to the block's end."""
    state, hashes = hashlib.sha256(), []
    for start in range(0, len(tokens), MOONCAKE_BLOCK):
        state.update(tokens[start : start + MOONCAKE_BLOCK].tobytes())
        hashes.append(state.digest())
    return hashes


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
