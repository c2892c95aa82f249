"""config.json in both forms; the golden variants test the numbers, this the fields and the refusals (must show 5)."""

import json

import pytest

from engine.config import RopeConfig
from engine.errors import ConfigError
from engine.models.hf_config import hf_values, parse_config, read_config, write_config
from engine.presets import preset

LLAMA = hf_values(preset("base-124m"))
QWEN2 = hf_values(preset("qwen2.5-7b"))
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"]}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def parse(raw, **changes):
    """Parses `raw` with keys changed; `...` removes one."""
    return parse_config({k: v for k, v in {**raw, **changes}.items() if v is not ...}, "m", "config.json")


def test_old_and_current_rope_forms():
    new = parse(LLAMA, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **SCALING})
    old = parse(LLAMA, rope_parameters=..., rope_theta=5e5, rope_scaling={"rope_type": "llama3", **SCALING})
    assert old == new
    assert new.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
    linear = parse(LLAMA, rope_parameters=..., rope_scaling={"type": "linear", "factor": 2.0})
    assert linear.rope == RopeConfig(10_000.0, "linear", 2.0)
    assert parse(LLAMA, rope_parameters=...).rope == RopeConfig()


def test_absent_keys_have_the_defaults_of_transformers():
    assert parse(LLAMA, num_key_value_heads=...).num_kv_heads == 12
    assert parse(LLAMA, head_dim=...).head_dim == 64
    assert parse(LLAMA, head_dim=None).head_dim == 64
    assert parse(LLAMA, rms_norm_eps=...).norm_eps == 1e-6
    assert parse(LLAMA, tie_word_embeddings=...).tie_embeddings is False
    assert parse(LLAMA, eos_token_id=...).eos_token_ids == ()
    assert parse(MISTRAL, sliding_window=...).windows == (4096,) * 12
    assert parse(MISTRAL, sliding_window=None).windows == ()
    qwen3 = {**hf_values(preset("qwen3-8b")), "head_dim": ..., "num_key_value_heads": ...}
    assert (parse(qwen3).head_dim, parse(qwen3).num_kv_heads) == (128, 32)


@pytest.mark.parametrize(
    ("names", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": ..., "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float32"}, "float32"),
        ({"dtype": ...}, "float32"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_dtype(names, dtype):
    assert parse(LLAMA, **names).dtype == dtype


def test_windows_of_qwen2():
    on = {"use_sliding_window": True, "sliding_window": 64, "layer_types": ...}
    assert parse(QWEN2, sliding_window=64).windows == ()  # use_sliding_window is off
    assert parse(QWEN2, **on, max_window_layers=26).windows == (None,) * 26 + (64, 64)
    assert parse(QWEN2, **on).windows == ()  # max_window_layers is 28 by default
    types = ["sliding_attention", "full_attention"] * 14
    assert parse(QWEN2, **{**on, "layer_types": types}).windows == (64, None) * 14


REFUSED = {
    "architecture 'GemmaForCausalLM' is not supported; known: LlamaForCausalLM": {
        "architectures": ["GemmaForCausalLM"]
    },
    "architectures must name one class": {"architectures": ...},
    "hidden_size, vocab_size missing": {"hidden_size": ..., "vocab_size": None},
    "num_hidden_layers must be an integer, got 1.5": {"num_hidden_layers": 1.5},
    "hidden_act 'gelu' is not supported": {"hidden_act": "gelu"},
    "attention_bias is not supported in LlamaForCausalLM": {"attention_bias": True},
    "mlp_bias is not supported": {"mlp_bias": True},
    "quantized checkpoints are not supported": {"quantization_config": {"quant_method": "awq"}},
    "dtype 'float8_e4m3fn' is not supported; known: float32, bfloat16, float16": {"dtype": "float8_e4m3fn"},
    "rope scaling 'yarn' is not supported; known": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
    "rope type llama3 needs low_freq_factor": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    "rope type linear needs factor": {"rope_parameters": {"rope_type": "linear"}},
    "rope parameters per layer type are not supported": {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
    "partial_rotary_factor 0.5 is not supported": {"partial_rotary_factor": 0.5},
    "could not convert string to float": {"rms_norm_eps": "small"},
    "outside the vocabulary": {"eos_token_id": 10**6},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_we_would_compute_wrong_is_refused_in_one_line(message):
    with pytest.raises(ConfigError) as caught:
        parse(LLAMA, **REFUSED[message])
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


def test_unsupported_windows_are_refused():
    with pytest.raises(ConfigError, match="full_attention beside a sliding_window"):
        parse(MISTRAL, sliding_window=64, layer_types=["full_attention"] * 12)
    with pytest.raises(ConfigError, match="chunked_attention"):
        parse(QWEN2, use_sliding_window=True, sliding_window=64, layer_types=["chunked_attention"] * 28)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere: no such directory"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        read_config(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "a JSON object is expected, not list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"config\.json: {message}"):
            read_config(tmp_path)


def test_end_of_sequence_ids_come_from_the_generation_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 2}))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert read_config(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    "cfg",
    [
        preset("llama3.1-8b"),
        preset("qwen3-8b").replace(windows=(None, 128) * 18),
        preset("base-124m").replace(architecture="MistralForCausalLM", windows=(64,) * 12),
        preset("base-124m").replace(rope=RopeConfig(1e4, "linear", 3.0), eos_token_ids=(5,), bos_token_id=4),
        preset("qwen2.5-7b").replace(tie_embeddings=True),
    ],
    ids=lambda cfg: cfg.name,
)
def test_write_then_read(tmp_path, cfg):
    write_config(cfg, tmp_path)
    assert read_config(tmp_path) == cfg.replace(name=tmp_path.name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qkv_bias": True}, "qkv_bias=True"),
        ({"qk_norm": True}, "qk_norm=True"),
        ({"windows": (64,) * 12}, "windows="),
        ({"architecture": "MistralForCausalLM", "windows": (None, 64) * 6}, "windows="),
        ({"architecture": "Other"}, "architecture 'Other'"),
    ],
)
def test_models_that_a_config_cannot_say_are_refused(tmp_path, changes, named):
    with pytest.raises(ConfigError, match=named):
        write_config(preset("base-124m").replace(**changes), tmp_path)
    assert not list(tmp_path.iterdir())
