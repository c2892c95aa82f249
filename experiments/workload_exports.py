"""Workloads in the dataset formats of other systems' benchmarks. Outputs are always `output_len` tokens: run them with
the other side's ignore-eos flag.

No format holds a closed loop, sampling or priorities, and each has limits of its own. So an export is another workload,
with a hash of its own: that of the requests that come back when it is read. `left_out` says what they lack. Requests
stay named by session and turn, which are only names in the open loop: the hash of a format that keeps tokens and times
is that of the same workload with `loop=open`.

vllm: `vllm bench serve --dataset-name custom --skip-chat-template --disable-shuffle` (CustomDataset of
vllm/benchmarks/datasets, releases whose rows take `output_tokens`; older ones need --custom-output-len). One object per
line, `prompt` as text and `output_tokens`. It has no arrival times: vLLM draws them from --request-rate,
so that all are 0 here; tokens are those that the tokenizer makes of the text.

sglang: `python -m sglang.bench_serving --dataset-name autobench` (sglang/benchmark/datasets/autobench.py, 2026; earlier
releases have no dataset of token ids). One object per line, `prompt` as token ids, `prompt_len`, `output_len`, and
`timestamp` in ms.

mooncake: the FAST'25 trace format, `timestamp` (ms, integer), `input_length`, `output_length`, `hash_ids`: one id per
512 tokens, the last block possibly shorter, chained: equal ids mean equal tokens up to the block's end. Ids count up
from 0. vLLM replays it with `--dataset-name timed_trace --self-timed --timed-trace-chunk-hash-size 512
--timed-trace-sec-multiplier 0.001`, SGLang with `--dataset-name mooncake`; both make up tokens of their own.
What comes back is what `--workload=mooncake:FILE` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.tokenizer import Tokenizer
from experiments.workloads import WorkloadRequest
from experiments.workloads.content import Blocks, TokenIds
from experiments.workloads.frozen import workload_hash

MOONCAKE_BLOCK = 512  # tokens
PROPERTIES: dict[str, Callable[[WorkloadRequest], Any]] = {
    "closed loop and think time": lambda r: r.think_s,
    "arrival time": lambda r: r.arrival_s,
    "prompt length": lambda r: r.prompt_len,
    "sampling": lambda r: r.sampling,
    "priority": lambda r: r.priority,
}


@dataclass(frozen=True)
class Export:
    """A file's text, the requests that come back from it in the same order, and the vocabulary of their tokens."""

    text: str
    requests: list[WorkloadRequest]
    vocab_size: int

    @property
    def workload_hash(self) -> str:
        """The content hash of what was exported."""
        return workload_hash(self.requests, self.vocab_size)


def left_out(requests: Sequence[WorkloadRequest], export: Export, vocab_size: int) -> dict[str, int]:
    """Properties that do not come back as they were, and of how many requests."""
    pairs = list(zip(requests, export.requests, strict=True))
    lost = {name: sum(of(a) != of(b) for a, b in pairs) for name, of in PROPERTIES.items()}
    lost["token ids"] = sum(
        not np.array_equal(a.prompt_tokens(vocab_size), b.prompt_tokens(export.vocab_size)) for a, b in pairs
    )
    return {name: count for name, count in lost.items() if count}


def vllm(requests: Sequence[WorkloadRequest], vocab_size: int, tokenizer: Tokenizer) -> Export:
    """Text, without arrival times."""
    texts = [tokenizer.decode(r.prompt_tokens(vocab_size).tolist()) for r in requests]
    encoded = [tuple(tokenizer.encode(text)) for text in texts]
    rows = ({"prompt": text, "output_tokens": r.output_len} for r, text in zip(requests, texts, strict=True))
    kept = [
        replace(_open_loop(r), arrival_s=0.0, prompt_len=len(ids), content=TokenIds(ids), vocab_size=None)
        for r, ids in zip(requests, encoded, strict=True)
    ]
    return Export(_lines(rows), kept, max(vocab_size, *(1 + max(ids, default=0) for ids in encoded)))


def sglang(requests: Sequence[WorkloadRequest], vocab_size: int) -> Export:
    """Token ids and times."""
    rows = (
        {
            "prompt": r.prompt_tokens(vocab_size).tolist(),
            "prompt_len": r.prompt_len,
            "output_len": r.output_len,
            "timestamp": r.arrival_s * 1e3,
        }
        for r in requests
    )
    return Export(_lines(rows), [_open_loop(r) for r in requests], vocab_size)


def mooncake(requests: Sequence[WorkloadRequest], vocab_size: int) -> Export:
    """Lengths, times in ms, and which prompts share blocks."""
    numbers: dict[bytes, int] = {}
    rows, kept = [], []
    for i, r in enumerate(requests):
        ids = [numbers.setdefault(h, len(numbers)) for h in _block_hashes(r.prompt_tokens(vocab_size))]
        time = round(r.arrival_s * 1e3)
        row = {"timestamp": time, "input_length": r.prompt_len, "output_length": r.output_len, "hash_ids": ids}
        rows.append(row)
        since_first = time * 1e-3 - rows[0]["timestamp"] * 1e-3
        blocks = Blocks(tuple(ids), MOONCAKE_BLOCK)
        kept.append(WorkloadRequest(str(i), since_first, r.prompt_len, r.output_len, content=blocks))
    return Export(_lines(rows), kept, vocab_size)


def _open_loop(r: WorkloadRequest) -> WorkloadRequest:
    """A request as any format has it: due at its time, greedy, like every other."""
    return replace(r, think_s=None, sampling=(), priority=0)


def _block_hashes(tokens: np.ndarray) -> list[bytes]:
    """A hash per block of MOONCAKE_BLOCK tokens, each over everything up to the block's end."""
    state, hashes = hashlib.sha256(), []
    for start in range(0, len(tokens), MOONCAKE_BLOCK):
        state.update(tokens[start : start + MOONCAKE_BLOCK].tobytes())
        hashes.append(state.digest())
    return hashes


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
