"""The decoder's functions one by one; their sum is tested against transformers in tests/golden."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.config import RopeConfig
from engine.models import llama, rope
from engine.models.weights import init_params
from engine.presets import preset

TINY = preset("tiny-1m").replace(num_layers=2)
forward = jax.jit(llama.forward, static_argnums=1)


def test_rope_is_a_rotation_of_pairs():
    cfg = TINY.replace(rope=RopeConfig(theta=100.0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, cfg.head_dim)).astype(np.float32)
    positions = np.array([0, 1, 7, 30, 4000], np.int32)
    got = rope.apply_rope(x, rope.rope_tables(cfg, positions))
    half = cfg.head_dim // 2
    freqs = 100.0 ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None] * freqs)[:, None]
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], -1), atol=2e-3)  # float32 angles at 4000
    np.testing.assert_allclose(got[:4], np.concatenate([turned.real, turned.imag], -1)[:4], atol=1e-5)


def test_rope_scalings():
    plain = rope.inverse_frequencies(RopeConfig(5e5), 128)
    linear = rope.inverse_frequencies(RopeConfig(5e5, "linear", 4.0), 128)
    np.testing.assert_array_equal(linear, plain / np.float32(4))
    scaled = rope.inverse_frequencies(RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192), 128)
    wavelengths = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8, rtol=1e-6)
    between = (wavelengths > 8192 / 4) & (wavelengths < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert plain.dtype == linear.dtype == scaled.dtype == np.float32


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_dense_attention_is_the_definition(window):
    rng = np.random.default_rng(1)
    t, h, k, d = 9, 6, 2, 8
    q, key, value = (rng.normal(size=(t, n, d)).astype(np.float32) for n in (h, k, k))
    got = llama.dense_attention(q, key, value, window)
    for i in range(t):
        first = max(0, i - window + 1) if window else 0
        for head in range(h):
            scores = key[first : i + 1, head // 3].astype(np.float64) @ q[i, head] / d**0.5
            weights = np.exp(scores - scores.max())
            want = weights @ value[first : i + 1, head // 3] / weights.sum()
            np.testing.assert_allclose(got[i, head], want, atol=1e-6)


def test_a_token_sees_only_what_precedes_it():
    params = init_params(TINY)
    tokens = np.arange(24) * 7 % TINY.vocab_size
    changed = tokens.copy()
    changed[10] += 1
    a, b = (np.asarray(forward(params, TINY, t)) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:10], b[:10])
    assert np.abs(a[10:] - b[10:]).max(-1).min() > 1e-3


def test_attend_gets_rotated_heads_in_checkpoint_order():
    params, seen = init_params(TINY), []
    x = llama.embed(params, jnp.arange(6))
    rope_now = llama.rope_tables(TINY, jnp.arange(6) + 3)

    def attend(*qkv):
        seen.extend(qkv)
        return qkv[0]

    w = params["layers"][0]
    assert llama.layer(w, TINY, x, rope_now, attend).shape == x.shape
    q, k, v = seen
    assert (q.shape, k.shape, v.shape) == ((6, 4, 32), (6, 2, 32), (6, 2, 32))
    normed = llama.rms_norm(x, w["norm1"], TINY.norm_eps)
    for head in range(4):
        want = rope.apply_rope(normed @ w["qkv"][:, head // 2, head % 2], rope_now)
        np.testing.assert_allclose(q[:, head], want, atol=1e-5)
    np.testing.assert_allclose(k[:, 1], rope.apply_rope(normed @ w["qkv"][:, 1, 2], rope_now), atol=1e-5)
    np.testing.assert_allclose(v[:, 1], normed @ w["qkv"][:, 1, 3], atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.1), ("float16", 0.01)])
def test_16_bits_follow_float32(dtype, tolerance):
    cfg = preset("small-20m").replace(num_layers=2, vocab_size=512)
    exact = init_params(cfg)
    rounded = jax.tree.map(lambda x: x.astype(dtype), exact)
    tokens = jnp.arange(32)
    want, got = forward(exact, cfg, tokens), forward(rounded, cfg.replace(dtype=dtype), tokens)
    assert got.dtype == jnp.float32
    assert 0 < float(jnp.abs(got - want).max()) < tolerance * float(jnp.abs(want).max())
    x = llama.embed(rounded, tokens)
    out = llama.layer(rounded["layers"][0], cfg, x, llama.rope_tables(cfg, tokens), lambda q, k, v: q)
    assert x.dtype == out.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_a_layer_copies_no_weights(tokens):
    """The optimised program holds activations only: a transposed or converted weight would be a temporary."""
    cfg = preset("base-124m").replace(num_layers=1, vocab_size=512, tie_embeddings=True)
    params = init_params(cfg)
    x, positions = jnp.zeros((tokens, cfg.hidden_size)), jnp.arange(tokens)

    def layer(w, x, positions):
        return llama.layer(w, cfg, x, llama.rope_tables(cfg, positions), lambda q, k, v: q)

    program = jax.jit(layer).lower(params["layers"][0], x, positions).compile()
    activations = 4 * tokens * (2 * cfg.ffn_size + 4 * cfg.hidden_size)
    smallest_weight = 4 * cfg.num_heads * cfg.head_dim * cfg.hidden_size
    assert program.memory_analysis().temp_size_in_bytes <= activations + smallest_weight // 8
    text = program.as_text()
    assert text.count(" dot(") == 4


def test_two_devices_hold_shards_and_agree_with_one(tmp_path):
    script = f"""
import jax; jax.config.update("jax_platforms", "cpu"); jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from engine.models import llama
from engine.models.hf_config import read_config
from engine.models.weights import export_hf, init_params, load_params
from engine.presets import preset
cfg, mesh = preset("tiny-1m"), jax.sharding.Mesh(np.array(jax.devices()), ("tensor",))
one, two = init_params(cfg), init_params(cfg, mesh)
assert two["layers"][0]["qkv"].addressable_shards[0].data.shape == (256, 1, 4, 32)
jax.tree.map(np.testing.assert_array_equal, one, two)
export_hf(two, cfg, {str(tmp_path)!r})
loaded = load_params({str(tmp_path)!r}, read_config({str(tmp_path)!r}), mesh)
jax.tree.map(np.testing.assert_array_equal, one, loaded)
assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, two, loaded))
forward = jax.jit(llama.forward, static_argnums=1)
a, b = (np.asarray(forward(p, cfg, np.arange(16))) for p in (one, loaded))
assert np.abs(a - b).max() <= 2e-5 * np.abs(a).max()
print("agreed")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "agreed\n", done.stderr


def test_configs_and_tokenizers_import_no_jax():
    script = "import engine.presets, engine.tokenizer, engine.models.hf_config, sys; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
