"""Golden logits of `transformers` through the whole serving path: files, pages, steps, batching."""

import numpy as np
import pytest

from engine import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
from tests.golden import golden, variants, write_checkpoint


@pytest.mark.parametrize("variant", variants())
def test_served_logits_and_tokens_equal_the_golden_ones(variant, tmp_path):
    """Two copies of the prompt in one batch, prefill by query tiles, then 64 greedy tokens from NaN-poisoned pages."""
    write_checkpoint(variant, tmp_path)
    config = EngineConfig(
        cache=CacheConfig(page_size=16, num_pages=256),
        scheduler=SchedulerConfig(max_num_seqs=2),
        query_tile=8,
        max_tiles=4,
        capture_logits=True,
        poison=True,
        debug_checks=True,
        compilation_cache_dir=None,
    )
    engine = Engine.from_pretrained(str(tmp_path), config)
    expected = golden(variant)
    outputs = engine.generate([expected.prompt] * 2, SamplingParams(max_tokens=64, ignore_eos=True))
    for out in outputs:
        assert np.abs(out.logits - expected.logits).max() <= 2e-5 * np.abs(expected.logits).max()
        assert out.token_ids == expected.tokens.tolist()
