"""Settings that policies are tried with: the same number of trials for each, drawn from its own knobs. Pure.

A knob is a list of choices, each a piece of the text that `bench_policies --engine` takes; the first is the default.
The first trial of every policy is its defaults; the others are drawn with a seed, and leave about half of the knobs as
they are. What only the workload can tell (an oracle of lengths, a trained predictor) is not among the choices, nor are
objectives: those are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import MAX_SLOTS

Knob = tuple[str, ...]
MAX_SEQS = "max_num_seqs=x"  # x2: twice the requests that the pool holds


@dataclass(frozen=True)
class Policy:
    """A policy as it is compared: what makes it what it is, and its knobs."""

    name: str
    engine: str
    knobs: tuple[Knob, ...]
    host: bool = False  # whether it needs a host tier, whatever its knobs are
    told: bool = False  # whether it is told the objectives of TTFT and TPOT


WATERMARK: Knob = ("", "watermark=0", "watermark=0.03", "watermark=0.1")
SEQS: Knob = ("", *(f"{MAX_SEQS}{share}" for share in (0.5, 0.75, 1, 1.5, 3)))
MANY_SEQS: Knob = ("", *(f"{MAX_SEQS}{share}" for share in (2, 4)))  # who parks layers runs more than the pool holds
WHOLE: Knob = ("", *(f"max_num_batched_tokens={n}" for n in (2048, 4096, 16384)))
CHUNK: Knob = ("", *(f"max_num_batched_tokens={n}" for n in (256, 512, 1024, 2048, 4096)))
BASES: Knob = ("policy=vllm_v0", "policy=vllm_v1", "policy=chunked")
PREEMPTION: Knob = ("", "preemption=swap")
# Of the SLO rule.
RULE: tuple[Knob, ...] = (
    ("", "layerkv_slo_rule=false"),
    ("", "layerkv_lost=block"),
    ("", "layerkv_weigh_ttft=false"),
    ("", "layerkv_lengths=mean", "layerkv_length_quantile=0.1", "layerkv_length_quantile=0.25",
     "layerkv_length_quantile=0.75"),
)  # fmt: skip
LAYERS: tuple[Knob, ...] = (
    ("", "layerkv_stream=hidden", "layerkv_stream=always", "layerkv_stream=never"),
    ("", "layerkv_retain=minimum", "layerkv_retain=select_n", "layerkv_retain=orbitflow"),
    ("", "layerkv_forecast=false", "layerkv_low_watermark=0,layerkv_high_watermark=0.01",
     "layerkv_low_watermark=0.02,layerkv_high_watermark=0.06",
     "layerkv_low_watermark=0.05,layerkv_high_watermark=0.15"),
    ("", "layerkv_horizon=16", "layerkv_horizon=256"),
    ("", "layerkv_append_pages=4"),
    ("", *(f"layerkv_chunked=true,max_num_batched_tokens={n}" for n in (512, 1024))),
)  # fmt: skip
OWN = (WATERMARK, MANY_SEQS, *RULE, *LAYERS)
V0, SWAP, V1, CHUNKED, SJF = "vllm_v0", "vllm_v0, swap", "vllm_v1", "chunked", "sjf"
PARK, LAYERKV, LAYERKV_SJF = "paged_park", "layerkv", "layerkv, sjf"

POLICIES = {
    policy.name: policy
    for policy in (
        Policy(V0, "policy=vllm_v0", (WATERMARK, SEQS, WHOLE)),
        Policy(SWAP, "policy=vllm_v0,preemption=swap", (WATERMARK, SEQS, WHOLE), host=True),
        Policy(V1, "policy=vllm_v1", (WATERMARK, SEQS, CHUNK, PREEMPTION)),
        Policy(CHUNKED, "policy=chunked", (WATERMARK, SEQS, CHUNK, PREEMPTION)),
        Policy(SJF, "order=sjf", (BASES, WATERMARK, SEQS, CHUNK, PREEMPTION)),
        Policy(PARK, "policy=paged_park", (WATERMARK, SEQS, WHOLE, *RULE), host=True, told=True),
        Policy(LAYERKV, "policy=layerkv", OWN, host=True, told=True),
        Policy(LAYERKV_SJF, "policy=layerkv,order=sjf", OWN, host=True, told=True),
    )
}
PAGED = (V0, SWAP, V1, CHUNKED, SJF)  # the baselines of the ratio; what parks whole requests is compared apart
OURS = (LAYERKV, LAYERKV_SJF)


def trials(policy: Policy, count: int, seed: int = 0) -> list[str]:
    """Settings over those of the policy, `count` different ones, the defaults first.

    Raises:
      ValueError: there are fewer.
    """
    size = int(np.prod([len(knob) for knob in policy.knobs]))
    if count > size:
        raise ValueError(f"{policy.name} has {size} different settings, {count} are wanted")
    rng = np.random.default_rng([seed, *policy.name.encode()])
    found = {joined([knob[0] for knob in policy.knobs]): None}
    while len(found) < count:
        found[joined([_drawn(knob, rng) for knob in policy.knobs])] = None
    return list(found)


def _drawn(knob: Knob, rng: np.random.Generator) -> str:
    """The default or, as often, any other choice."""
    return knob[0] if rng.random() < 0.5 else knob[rng.integers(1, len(knob))]


def joined(pieces: Sequence[str]) -> str:
    """Settings one after the other."""
    return ",".join(piece for piece in pieces if piece)


def settled(settings: str, holds: int) -> str:
    """Settings for a pool that holds so many requests."""
    pieces = []
    for piece in settings.split(","):
        if piece.startswith(MAX_SEQS):
            piece = f"max_num_seqs={min(max(round(float(piece[len(MAX_SEQS) :]) * holds), 1), MAX_SLOTS)}"
        pieces.append(piece)
    return ",".join(pieces)
