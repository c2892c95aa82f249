"""Presets against the published numbers of the models."""

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.models.hf_config import hf_values, parse_config
from engine.presets import PRESETS, preset

FACTS = Path(__file__).parents[2] / ".." / "shared" / "profiles" / "model_specs.json"
NAMES = {
    "Llama-2-7B": "llama2-7b",
    "Llama-3.1-8B": "llama3.1-8b",
    "Llama-3.1-70B": "llama3.1-70b",
    "Yi-6B-200K": "yi-6b-200k",
    "Yi-9B(-200K)": "yi-9b-32k",
    "Yi-34B-200K": "yi-34b-200k",
    "Qwen2.5-7B": "qwen2.5-7b",
    "Qwen3-8B": "qwen3-8b",
}
PARAMETERS = {"llama2-7b": 6_738_415_616, "llama3.1-70b": 70_553_706_496, "qwen2.5-7b": 7_615_616_512}


@pytest.mark.skipif(not FACTS.exists(), reason="needs ../shared/profiles/model_specs.json")
@pytest.mark.parametrize("name", NAMES)
def test_presets_match_the_collected_facts(name):
    facts, cfg = json.loads(FACTS.read_text())[name], preset(NAMES[name])
    assert cfg.num_parameters == facts["params"]
    assert cfg.kv_bytes_per_token_per_layer == facts["kv_bytes_per_token_per_layer"]
    assert (cfg.num_layers, cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim, cfg.ffn_size) == tuple(
        facts[key] for key in ("layers", "hidden", "q_heads", "kv_heads", "head_dim", "ffn")
    )
    assert cfg.max_context == facts["ctx"] or cfg.name == "yi-9b-32k"  # the paper serves it beyond its 4096


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert preset(name).num_parameters == PARAMETERS[name]
    assert preset(name).dtype == "bfloat16"


@pytest.mark.parametrize(("name", "millions"), [("tiny-1m", 1), ("small-20m", 20), ("base-124m", 124.7)])
def test_small_presets_weigh_what_their_names_say(name, millions):
    assert preset(name).num_parameters == pytest.approx(millions * 1e6, rel=0.06)
    assert preset(name).dtype == "float32"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_a_hugging_face_config(name):
    assert parse_config(hf_values(preset(name)), name, name) == preset(name)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ConfigError, match=r"'llama9'; known: llama2-7b, .*base-124m"):
        preset("llama9")
