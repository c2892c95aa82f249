"""The golden variants: `config.json` of each, as its checkpoints in the wild have it, at toy size."""

from __future__ import annotations

from typing import Any


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    """A toy model; a key set to `...` is left out of the file."""
    base = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CURRENT = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "dtype": "float32"}

SAVED = "saved-by-transformers"  # a sharded directory written by the real libraries, committed
SAVED_CONFIG = (1, _config("Llama", hidden_size=32, intermediate_size=64, **_CURRENT))

# name -> (seed of the weights, config.json)
CONFIGS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama2-mha": (
        1,
        _config("Llama", num_key_value_heads=..., num_hidden_layers=3, rope_scaling=None, torch_dtype="float32"),
    ),
    "llama3.1-gqa-old-form": (
        2,
        _config("Llama", rope_theta=500000.0, rope_scaling=_LLAMA3, torch_dtype="float32", eos_token_id=[2, 3]),
    ),
    "llama3.1-gqa": (
        2,
        _config("Llama", rope_parameters={**_LLAMA3, "rope_theta": 500000.0}, dtype="float32", eos_token_id=[2, 3]),
    ),
    "llama3.2-tied": (3, _config("Llama", tie_word_embeddings=True, head_dim=16, **_CURRENT)),
    "llama-linear-rope": (
        4,
        _config("Llama", rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}, torch_dtype="float32"),
    ),
    "llama-mqa": (5, _config("Llama", num_key_value_heads=1, **_CURRENT)),
    "yi": (
        6,
        _config("Llama", rope_theta=5000000.0, hidden_size=128, num_attention_heads=8, vocab_size=320, dtype=...),
    ),
    "mistral-window": (
        7,
        _config("Mistral", sliding_window=24, rope_theta=10000.0, torch_dtype="float32", num_hidden_layers=3),
    ),
    "qwen2-bias": (
        8,
        _config(
            "Qwen2",
            rope_theta=1000000.0,
            rms_norm_eps=1e-6,
            use_sliding_window=False,
            sliding_window=16,
            max_window_layers=1,
            torch_dtype="float32",
        ),
    ),
    "qwen2-window-upper-layers": (
        11,
        _config(
            "Qwen2",
            num_hidden_layers=4,
            use_sliding_window=True,
            sliding_window=16,
            max_window_layers=2,
            **_CURRENT,
        ),
    ),
    "qwen3-qk-norm": (
        10,
        _config(
            "Qwen3",
            head_dim=32,
            rms_norm_eps=1e-6,
            attention_bias=False,
            use_sliding_window=False,
            layer_types=["full_attention"] * 2,
            **_CURRENT,
        ),
    ),
}
