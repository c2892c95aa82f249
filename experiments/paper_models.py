"""Models as a paper served them, where their published configuration is another: experiments.paper_models:NAME."""

from __future__ import annotations

from engine.presets import preset

# LayerKV's figure 1 serves contexts of 16,384 tokens; the model was trained for 4,096. Only the limit differs.
LLAMA2_7B_32K = preset("llama2-7b").replace(name="llama2-7b-32k", max_context=32_768)
