"""Loading and exporting: round trips, sharding, bounded memory, and bad checkpoints (must show 5)."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine.errors import ConfigError, WeightsError
from engine.models import llama, safetensors
from engine.models.hf_config import read_config
from engine.models.weights import INDEX, WEIGHTS, export_hf, init_params, load_params
from engine.presets import preset

TINY = preset("tiny-1m").replace(num_layers=2)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype, a, b))


MODELS = {
    "llama": TINY,
    "bfloat16": TINY.replace(dtype="bfloat16"),
    "float16": TINY.replace(dtype="float16"),
    "tied": TINY.replace(tie_embeddings=True),
    "qwen2": TINY.replace(architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": TINY.replace(architecture="Qwen3ForCausalLM", qk_norm=True, dtype="bfloat16"),
    "mqa": TINY.replace(num_kv_heads=1),
}


@pytest.mark.parametrize("name", MODELS)
def test_init_export_load_is_bit_equal(tmp_path, name):
    cfg = MODELS[name]
    params = init_params(cfg, seed=3)
    export_hf(params, cfg, tmp_path, shard_bytes=10**6 if name != "tied" else 10**9)
    assert (tmp_path / INDEX).exists() == (name != "tied")
    assert_equal(load_params(tmp_path, read_config(tmp_path)), params)


def test_dtype_is_the_callers(tmp_path):
    export_hf(init_params(TINY), TINY, tmp_path)
    params = load_params(tmp_path, TINY, dtype="bfloat16")
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), init_params(TINY))
    assert_equal(params, want)
    with pytest.raises(WeightsError, match="dtype 'float8' is not supported; known: float32, bfloat16, float16"):
        load_params(tmp_path, TINY, dtype="float8")


def test_float16_checkpoints(tmp_path):
    export_hf(init_params(TINY), TINY, tmp_path)
    tensors = {n: t.read().astype(np.float16) for n, t in safetensors.read_header(tmp_path / WEIGHTS).items()}
    safetensors.write_file(tmp_path / WEIGHTS, {n: ("F16", t.shape) for n, t in tensors.items()}, tensors.values())
    want = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), init_params(TINY))
    assert_equal(load_params(tmp_path, TINY), want)


def test_export_shards_by_size_and_replaces_older_weights(tmp_path):
    params = init_params(TINY)
    export_hf(params, TINY, tmp_path, shard_bytes=700_000)
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    for shard in shards:
        tensors = safetensors.read_header(shard).values()
        assert sum(t.end - t.begin for t in tensors) <= 700_000 or len(tensors) == 1
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * TINY.num_parameters
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    export_hf(params, TINY, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {WEIGHTS, "config.json", "generation_config.json"}


def test_export_of_what_a_config_cannot_say_touches_nothing(tmp_path):
    with pytest.raises(ConfigError, match="qk_norm"):
        export_hf({}, TINY.replace(qk_norm=True), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_host_memory_is_bounded(tmp_path):
    """Peak resident memory of a load, in a process of its own: the weights, and a few times the largest tensor."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux: /proc/self/status")
    cfg = preset("small-20m").replace(vocab_size=4096, num_layers=12)
    export_hf(init_params(cfg), cfg, tmp_path)
    script = f"""
import jax; jax.config.update("jax_platforms", "cpu")
from engine.models.hf_config import read_config
from engine.models.weights import load_params
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
jax.device_put(1.0).block_until_ready()
cfg, before = read_config({str(tmp_path)!r}), peak()
params = load_params({str(tmp_path)!r}, cfg)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    weights, largest = 4 * cfg.num_parameters, 4 * cfg.vocab_size * cfg.hidden_size
    assert weights * 0.9 < grown < weights + 4 * largest < 1.4 * weights


@pytest.fixture
def checkpoint(tmp_path):
    export_hf(init_params(TINY), TINY, tmp_path, shard_bytes=10**6)
    return tmp_path


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def rename(directory, old, new):
    """Renames a tensor in its shard and in the index."""
    where = json.loads((directory / INDEX).read_text())["weight_map"][old]
    edit_index(directory, lambda weights: weights.update({new: weights.pop(old)}))
    tensors = {new if n == old else n: t.read() for n, t in safetensors.read_header(directory / where).items()}
    safetensors.write_file(directory / where, {n: ("F32", t.shape) for n, t in tensors.items()}, tensors.values())


def test_missing_directory(tmp_path):
    with pytest.raises(WeightsError, match="nowhere: no such directory"):
        load_params(tmp_path / "nowhere", TINY)


def test_no_weights_and_only_pickled_ones(tmp_path):
    with pytest.raises(WeightsError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        load_params(tmp_path, TINY)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: pickled weights are never loaded"):
        load_params(tmp_path, TINY)


def test_missing_shard(checkpoint):
    (checkpoint / "model-00002-of-00004.safetensors").unlink(missing_ok=False)
    with pytest.raises(WeightsError, match=r"model-00002-of-0000.\.safetensors: cannot be read"):
        load_params(checkpoint, TINY)


def test_truncated_shard(checkpoint):
    shard = sorted(checkpoint.glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=rf"{shard.name}: tensor model\.\S+: .* is the file truncated"):
        load_params(checkpoint, TINY)


def test_corrupt_index(checkpoint):
    (checkpoint / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(WeightsError, match=r"index\.json: not a safetensors index"):
        load_params(checkpoint, TINY)


def test_index_may_not_leave_the_directory(checkpoint):
    edit_index(checkpoint, lambda weights: weights.update({"lm_head.weight": "../elsewhere.safetensors"}))
    with pytest.raises(WeightsError, match=r"'\.\./elsewhere\.safetensors' is not the name of a file beside it"):
        load_params(checkpoint, TINY)


def test_index_that_disagrees_with_its_shards(checkpoint):
    edit_index(checkpoint, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"]}))
    with pytest.raises(WeightsError, match=r"tensor lm_head\.weight missing, though"):
        load_params(checkpoint, TINY)


def test_missing_tensor(checkpoint):
    rename(checkpoint, "model.layers.1.mlp.up_proj.weight", "model.layers.1.rotary_emb.inv_freq")  # ignored
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight missing from the checkpoint"):
        load_params(checkpoint, TINY)


def test_extra_tensors(checkpoint):
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.\S+ and 4 more in the checkpoint, but Llama"):
        load_params(checkpoint, TINY.replace(num_layers=1))


def test_a_copy_of_the_tied_embedding_is_ignored(checkpoint):
    params = load_params(checkpoint, TINY.replace(tie_embeddings=True))
    assert set(params) == {"embed", "layers", "norm"}


def test_wrong_shape(checkpoint):
    with pytest.raises(WeightsError, match=r"o_proj\.weight has shape \[256, 128\], config\.json says \[256, 256\]"):
        load_params(checkpoint, TINY.replace(num_heads=8))


def test_wrong_dtype(checkpoint):
    shard = sorted(checkpoint.glob("model-*"))[0]
    shard.write_bytes(shard.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(WeightsError, match=rf"{shard.name}: tensor \S+: dtype 'I32' is not supported"):
        load_params(checkpoint, TINY)


def test_transformers_reads_an_export_and_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for name in ("llama", "tied", "qwen2", "qwen3"):
        cfg = MODELS[name].replace(dtype="float32")
        params = init_params(cfg, seed=5)
        export_hf(params, cfg, tmp_path / name, shard_bytes=10**6)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, attn_implementation="eager")
        tokens = np.arange(7, 47) * 11 % cfg.vocab_size
        with torch.inference_mode():
            want = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        got = np.asarray(llama.forward(params, cfg, jnp.asarray(tokens)))
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
