"""Our logits against those of transformers, through config.json and safetensors (must show 2)."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from engine.config import RopeConfig
from engine.models import llama
from engine.models.hf_config import read_config
from engine.models.weights import load_params
from tests.golden import Golden, golden, variants, write_checkpoint

forward = jax.jit(llama.forward, static_argnums=1)


@functools.cache
def logits_of(directory: str, **changes) -> tuple[np.ndarray, Golden]:
    """Teacher-forced logits `[64, V]` of the variant in `directory`, with fields of its config changed."""
    cfg = read_config(directory)
    params = load_params(directory, cfg, dtype=changes.get("dtype"))
    want = golden(cfg.name)
    sequence = np.concatenate([want.prompt, want.tokens[:-1]])
    logits = forward(params, dataclasses.replace(cfg, **changes), sequence)
    return np.asarray(logits)[len(want.prompt) - 1 :], want


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden")
    for variant in variants():
        write_checkpoint(variant, root / variant)
    return root


def error(logits: np.ndarray, want: Golden) -> float:
    return float(np.abs(logits - want.logits).max() / np.abs(want.logits).max())


@pytest.mark.parametrize("variant", variants())
def test_logits_and_greedy_tokens(checkpoints, variant):
    logits, want = logits_of(str(checkpoints / variant))
    assert logits.dtype == want.logits.dtype == np.float32
    assert logits.shape == want.logits.shape
    assert error(logits, want) <= 2e-5
    np.testing.assert_array_equal(logits.argmax(-1), want.tokens)


@pytest.mark.parametrize("variant", ["llama2-mha", "llama-mqa", "mistral-window", "qwen3-qk-norm"])
def test_float16_follows_float32(checkpoints, variant):
    """Weights and activations in float16: within 2^-7 of the largest logit (measured over all variants: 2^-9 to 2^-7.7;
    bfloat16 2^-6.1 to 2^-4.6), and other tokens only where the two best logits are closer than twice that."""
    logits, want = logits_of(str(checkpoints / variant), dtype="float16")
    assert 1e-4 < error(logits, want) <= 2**-7
    best = np.sort(want.logits, -1)
    close = best[:, -1] - best[:, -2] < 2 * 2**-7 * np.abs(want.logits).max()
    assert not ((logits.argmax(-1) != want.tokens) & ~close).any()


@pytest.mark.parametrize("variant", variants())
def test_goldens_cannot_pass_by_luck(variant):
    want = golden(variant)
    second, best = np.sort(want.logits, axis=-1)[:, -2:].T
    assert want.logits.std() >= 1
    assert (best - second).min() >= 1e-3
    assert len(want.tokens) == 64
    np.testing.assert_array_equal(want.logits.argmax(-1), want.tokens)


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("mistral-window", {"windows": ()}),
        ("mistral-window", {"windows": (25,) * 3}),
        ("qwen2-window-upper-layers", {"windows": (16,) * 4}),
        ("llama-linear-rope", {"rope": RopeConfig()}),
        ("llama3.1-gqa", {"rope": RopeConfig(theta=500_000.0)}),
        ("qwen3-qk-norm", {"qk_norm": False}),
        ("qwen2-bias", {"qkv_bias": False}),
        ("llama2-mha", {"norm_eps": 1e-2}),
    ],
)
def test_goldens_see_every_feature(checkpoints, variant, changes):
    logits, want = logits_of(str(checkpoints / variant), **changes)
    assert error(logits, want) > 1e-3


def test_both_config_forms_are_one_model(checkpoints):
    old, new = (read_config(checkpoints / f"llama3.1-gqa{form}") for form in ("-old-form", ""))
    assert old.replace(name=new.name) == new
    assert new.eos_token_ids == (2, 3)
