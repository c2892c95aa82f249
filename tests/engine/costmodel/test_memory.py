"""What fits on a device: weights against published sizes, pages by hand and against a recorded run."""

import pytest

from engine.costmodel.device import load_device
from engine.costmodel.step_model import StepModel
from engine.errors import ConfigError
from engine.presets import PRESETS, preset
from tests.engine.costmodel.device_files import MODEL, profile


@pytest.mark.parametrize("model", [m for m in PRESETS.values() if m.dtype == "bfloat16"], ids=lambda m: m.name)
def test_weights_and_kv_on_one_device(model):
    """Every parameter has two bytes; a token's KV is that of the configuration in every layer."""
    found = StepModel(model, load_device("h100"))
    assert found.weight_bytes == 2 * model.num_parameters
    assert found.kv_bytes_per_token == model.num_layers * model.kv_bytes_per_token_per_layer


def test_weights_and_kv_on_several():
    """Llama-3.1-70B: 141.1 GB and 320 KiB a token over 4 devices; 16 devices would hold every kv head twice."""
    four = StepModel(preset("llama3.1-70b"), load_device("l20"), tensor=4)
    assert four.kv_bytes_per_token == 320 * 1024 // 4
    assert four.weight_bytes == pytest.approx(141.11e9 / 4, rel=0.001)  # norms are on each
    yi = StepModel(preset("yi-6b-200k"), load_device("h100"), tensor=8)
    assert yi.kv_bytes_per_token == 2 * 64 * 1024 // 8  # 4 kv heads


def test_pages_by_hand(tmp_path):
    """0.5 of 16 GiB less weights, 1 GiB, and activations of 100 tokens and 10 rows of logits; blocks of 3 layers."""
    model = StepModel(MODEL, profile(tmp_path))
    activations = 100 * (2 * 1024 + 16 * 128 + 3 * 2048) * 2 + 10 * 10_000 * 8
    left = 7 * 2**30 - 2 * MODEL.num_parameters - activations
    pages, words = model.num_pages(16, 0.5, max_batched_tokens=100, max_num_seqs=10)
    assert pages == left // (3 * 16 * 2048) * 3
    assert (
        words.startswith("round: 0.5 x 16.00 GiB - ") and "estimate" in words and f"{pages // 3:,} blocks of 3" in words
    )


def test_pages_of_the_recorded_run():
    """vLLM 0.19 on an RTX 4090 resolved 2,588 blocks of 16 tokens for Llama-3.1-8B (LLMServingSim 5daddb2)."""
    pages, _ = StepModel(preset("llama3.1-8b"), load_device("rtx4090")).num_pages(16, 0.9, 2048, 256)
    assert pages / 32 == pytest.approx(2588, rel=0.01)


def test_the_pool_of_the_layerkv_paper():
    """About 28 GB for Llama-2-7B on an L20, as its first figure implies."""
    model = StepModel(preset("llama2-7b"), load_device("l20"))
    pages, _ = model.num_pages()
    assert pages / 32 * 16 * model.kv_bytes_per_token == pytest.approx(28e9, rel=0.05)


def test_a_model_that_does_not_fit_says_by_how_much():
    """Llama-3.1-70B over two L20: 65.7 GiB of weights on each, 40.5 GiB to be had."""
    with pytest.raises(ConfigError) as error:
        StepModel(preset("llama3.1-70b"), load_device("l20"), tensor=2).num_pages()
    message = str(error.value)
    assert "does not fit: 26.81 GiB too little on each device" in message and "65.71 weights" in message
    assert "\n" not in message
    with pytest.raises(ConfigError, match=r"device_fraction must be in \(0, 1\], got 1.5"):
        StepModel(preset("llama2-7b"), load_device("l20")).num_pages(fraction=1.5)
