"""Orbax checkpoints: bit-exact round trips, restored where they will live, bounded memory, and damage in one line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.builder import build_engine
from engine.config import CacheConfig, EngineConfig
from engine.engine import Engine
from engine.errors import OutputError, WeightsError
from engine.models import orbax_weights
from engine.models.hf_config import read_config
from engine.models.weights import export_hf, init_params, load_params
from engine.request import SamplingParams
from experiments.convert_checkpoint import convert_hf, convert_orbax
from tests.engine.models.test_weights import MODELS, TINY, assert_equal

ROOT = Path(__file__).resolve().parents[3]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny model as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("hf") / "tiny"
    export_hf(init_params(TINY, seed=3), TINY, directory)
    return directory


@pytest.fixture
def checkpoint(source, tmp_path):
    """The same as an Orbax directory."""
    convert_hf(source, tmp_path / "orbax", None)
    return tmp_path / "orbax"


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_bit_exact(tmp_path, name):
    """Every file, and the arrays in between."""
    cfg = MODELS[name]
    params = init_params(cfg, seed=3)
    export_hf(params, cfg, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert convert_hf(tmp_path / "hf", tmp_path / "orbax", None) == read_config(tmp_path / "hf")
    restored = orbax_weights.read_model(tmp_path / "orbax")
    assert restored == read_config(tmp_path / "hf")
    assert_equal(orbax_weights.load_params(tmp_path / "orbax", restored), params)
    convert_orbax(tmp_path / "orbax", tmp_path / "back", None)
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


def test_dtype_is_the_callers(source, checkpoint, tmp_path):
    """Rounded as a Hugging Face checkpoint is, on restore and in the converter."""
    want = load_params(source, TINY, dtype="bfloat16")
    assert_equal(orbax_weights.load_params(checkpoint, TINY, dtype="bfloat16"), want)
    assert convert_hf(source, tmp_path / "half", "bfloat16").dtype == "bfloat16"
    assert_equal(orbax_weights.load_params(tmp_path / "half", orbax_weights.read_model(tmp_path / "half")), want)


def test_an_engine_serves_either(source, checkpoint):
    config = EngineConfig(cache=CacheConfig(num_pages=64), max_context=128, compilation_cache_dir=None)
    tokens = []
    for directory in (source, checkpoint):
        engine = build_engine(Engine, str(directory), config)
        tokens.append(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))[0].token_ids)
    assert tokens[0] == tokens[1] and len(tokens[0]) == 5


SHARDED = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
from engine.models import llama, orbax_weights, tensors, weights
for n in (4, 2):
    mesh = tensors.device_mesh(n)
    cfg = orbax_weights.read_model(Path(sys.argv[1]))
    got = orbax_weights.load_params(Path(sys.argv[1]), cfg, mesh)
    want = weights.load_params(sys.argv[2], cfg, mesh)
    for a, b, spec in zip(*map(jax.tree.leaves, (got, want, tensors.abstract(llama.definitions(cfg, n), mesh)))):
        assert a.sharding == b.sharding == spec.sharding and a.shape == b.shape == spec.shape
        assert (a == b).all()
    shard = got["layers"][0]["down"].addressable_shards[0].data
    assert shard.shape == (cfg.ffn_size // n, cfg.hidden_size)
print("done")
"""


def test_restored_arrays_carry_the_sharding_asked_for(tmp_path):
    """On 4 devices, the two kv heads repeated, and on 2: in a process of its own."""
    cfg = TINY.replace(qkv_bias=True, architecture="Qwen2ForCausalLM")
    export_hf(init_params(cfg), cfg, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "orbax", None)
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "orbax"), str(tmp_path / "hf")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout == "done\n", run.stderr[-2000:]


MEMORY = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from pathlib import Path
import orbax.checkpoint
from experiments.convert_checkpoint import convert_hf, convert_orbax
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
jax.device_put(1.0).block_until_ready()
for convert, source, out in ((convert_hf, *sys.argv[1:3]), (convert_orbax, *sys.argv[2:4])):
    before = peak()
    convert(Path(source), Path(out), None)
    print(peak() - before)
"""


def test_host_memory_stays_at_a_few_layers(tmp_path):
    """Peak growth of resident memory in both conversions, against the size of the model."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux: /proc/self/status")
    cfg = TINY.replace(num_layers=40, hidden_size=256, num_heads=8, ffn_size=1536, vocab_size=512)
    export_hf(init_params(cfg), cfg, tmp_path / "hf")
    paths = [str(tmp_path / name) for name in ("hf", "orbax", "back")]
    run = subprocess.run([sys.executable, "-c", MEMORY, *paths], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(int(line) < 0.5 * 4 * cfg.num_parameters for line in run.stdout.split())


def largest(checkpoint: Path) -> Path:
    return max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_missing_or_truncated_file_is_named(checkpoint):
    file = largest(checkpoint)
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(
        WeightsError, match=rf"{file.name}: has {len(data) - 100:,} bytes, was written with {len(data):,}"
    ):
        orbax_weights.read_model(checkpoint)
    file.unlink()
    with pytest.raises(WeightsError, match=rf"{file.name}: missing from the checkpoint"):
        orbax_weights.read_model(checkpoint)


def test_a_flipped_bit_is_found(checkpoint):
    """In any file of any size: Orbax itself restores most of them without a word."""
    cfg = orbax_weights.read_model(checkpoint)
    for file in sorted(p for p in (checkpoint / "params").rglob("*") if p.is_file() and p.stat().st_size):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert orbax_weights.read_model(checkpoint) == cfg
        for read in (orbax_weights.load_params, lambda directory, cfg: list(orbax_weights.leaves(directory, cfg))):
            with pytest.raises(
                WeightsError, match=rf"{re.escape(str(file))}: damaged: not the bytes that were written$"
            ):
                read(checkpoint, cfg)
        file.write_bytes(data)
    raw = json.loads((checkpoint / "model.json").read_text())
    (checkpoint / "model.json").write_text(json.dumps({k: raw[k] for k in ("model", "files")}))
    with pytest.raises(WeightsError, match=r"model\.json: no sha256 of the files: convert the checkpoint again"):
        orbax_weights.load_params(checkpoint, cfg)


def test_an_unfinished_or_foreign_checkpoint(checkpoint, tmp_path):
    """Without model.json, and one that Orbax wrote for somebody else."""
    import orbax.checkpoint as ocp

    (checkpoint / "model.json").unlink()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign", {"a": np.ones(3)})
    for directory in (checkpoint, tmp_path / "foreign"):
        with pytest.raises(WeightsError, match=r"an Orbax checkpoint without model\.json: unfinished, or another"):
            Engine.from_pretrained(str(directory))


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not the description of a checkpoint"),
        ("[]", "not the description of a checkpoint"),
        ('{"model": {"layers": 3}, "files": {}}', "unknown field layers"),
        ('{"model": {"name": "x"}, "files": {}}', "missing 8 required"),
    ],
)
def test_a_damaged_description(checkpoint, text, message):
    (checkpoint / "model.json").write_text(text)
    with pytest.raises(WeightsError, match=rf"model\.json: .*{message}") as error:
        orbax_weights.read_model(checkpoint)
    assert "\n" not in str(error.value)


def test_a_description_of_another_model(checkpoint):
    """Shapes and layers that the arrays do not have."""
    raw = json.loads((checkpoint / "model.json").read_text())
    for change, message in (({"ffn_size": 8}, "not compatible with the stored shape"), ({"num_layers": 9}, "layers")):
        (checkpoint / "model.json").write_text(json.dumps({**raw, "model": raw["model"] | change}))
        cfg = orbax_weights.read_model(checkpoint)
        with pytest.raises(WeightsError, match=f"cannot be restored: .*{message}") as error:
            orbax_weights.load_params(checkpoint, cfg)
        assert "\n" not in str(error.value)


def test_the_output_must_be_new(source, checkpoint):
    before = contents(source)
    with pytest.raises(OutputError, match="is there already: name another directory"):
        convert_orbax(checkpoint, source, None)
    assert contents(source) == before
