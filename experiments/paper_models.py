"""What LayerKV was evaluated on: its models where their published configuration is another
(experiments.paper_models:NAME), its machine, its objectives."""

from __future__ import annotations

from engine.presets import preset

# LayerKV's figure 1 serves contexts of 16,384 tokens; the model was trained for 4,096. Only the limit differs.
LLAMA2_7B_32K = preset("llama2-7b").replace(name="llama2-7b-32k", max_context=32_768)

# L20s with the kernels and the loop of the paper's day, which plans no step ahead; a host tier that is never full.
MACHINE = "device=l20,stack=vllm-0.5,async_depth=0,host_bytes=512GiB"
SLO_TTFT_MS, SLO_TPOT_MS = 3000, 200
SLO = f"ttft:{SLO_TTFT_MS},tpot:{SLO_TPOT_MS}"
SATURATED = 400, 1000.0  # requests, and requests/s, that measure capacity (ours)
