"""Named model shapes: the models of the two papers and their successors, three small ones for a CPU, and yours.

Shapes are those of the published `config.json` files; yi-9b-32k is the vTensor paper's name for Yi-9B served to 32K.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import extension
from engine.config import ModelConfig, RopeConfig
from engine.errors import ConfigError

_LLAMA3 = {
    "rope": RopeConfig(500_000.0, "llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
    "bos_token_id": 128000,
    "eos_token_ids": (128001, 128008, 128009),
}
_YI = {"bos_token_id": 1, "eos_token_ids": (2,)}
_QWEN = {
    "rope": RopeConfig(1_000_000.0),
    "norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_ids": (151645, 151643),
}
_SMALL = {"dtype": "float32"}  # and no end-of-sequence token: a request always runs to its max_tokens


def _model(name: str, shape: tuple[int, ...], context: int, **rest: Any) -> ModelConfig:
    """`shape` is (L, M, H, K, D, F, V)."""
    fields = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
    sizes = dict(zip(fields, shape, strict=True))
    return ModelConfig(name=name, max_context=context, **{"dtype": "bfloat16", **sizes, **rest})


_MODELS = (
    _model("llama2-7b", (32, 4096, 32, 32, 128, 11008, 32000), 4096, bos_token_id=1, eos_token_ids=(2,)),
    _model("llama3.1-8b", (32, 4096, 32, 8, 128, 14336, 128256), 131072, **_LLAMA3),
    _model("llama3.1-70b", (80, 8192, 64, 8, 128, 28672, 128256), 131072, **_LLAMA3),
    _model("yi-6b-200k", (32, 4096, 32, 4, 128, 11008, 64000), 200_000, rope=RopeConfig(5_000_000.0), **_YI),
    _model("yi-9b-32k", (48, 4096, 32, 4, 128, 11008, 64000), 32_768, norm_eps=1e-6, **_YI),
    _model("yi-34b-200k", (60, 7168, 56, 8, 128, 20480, 64000), 200_000, rope=RopeConfig(5_000_000.0), **_YI),
    _model(
        "qwen2.5-7b",
        (28, 3584, 28, 4, 128, 18944, 152064),
        32_768,
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        **_QWEN,
    ),
    _model(
        "qwen3-8b",
        (36, 4096, 32, 8, 128, 12288, 151936),
        40_960,
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        **_QWEN,
    ),
    # Ours. 256 wide is the least for which `deterministic` keeps logits bit-identical.
    _model("tiny-1m", (4, 256, 4, 2, 32, 128, 512), 4096, **_SMALL),
    _model("small-20m", (8, 384, 6, 2, 64, 1152, 8192), 4096, **_SMALL),
    _model("base-124m", (12, 768, 12, 4, 64, 2048, 32000), 4096, **_SMALL),
)

PRESETS: dict[str, ModelConfig] = {model.name: model for model in _MODELS}


def preset(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
      ConfigError: no such preset; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(f"no model preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def is_model_spec(text: str) -> bool:
    """Whether `text` names a shape, for random weights, rather than a checkpoint's directory."""
    return text in PRESETS or (extension.is_external(text) and not Path(text).exists())


def find_model(spec: str) -> ModelConfig:
    """The shape behind `--model_spec`: a preset, or a ModelConfig from outside the tree, or what a function without
    arguments from there returns.

    Raises:
      ConfigError: an unknown name (lists the known ones), code that fails, or one that is no model.
    """
    if spec in PRESETS:
        return PRESETS[spec]
    if not extension.is_external(spec):
        raise ConfigError(f"model_spec {spec!r} is unknown; known: {', '.join(PRESETS)}, or {extension.FORMS}")
    found = extension.load(spec, "model_spec")
    try:
        model = found() if callable(found) else found
    except Exception as e:
        why = " ".join(f"{type(e).__name__}: {e}".split())
        raise ConfigError(f"model_spec {spec!r} fails when it is called without arguments: {why}") from e
    if not isinstance(model, ModelConfig):
        raise ConfigError(
            f"model_spec {spec!r} is not a model: it needs a ModelConfig, or a function without arguments that returns "
            "one"
        )
    return model
