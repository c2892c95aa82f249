"""`config.json` of a Hugging Face directory <-> ModelConfig.

Reads the older form (`rope_theta`, `rope_scaling`, `torch_dtype`) and the current one (`rope_parameters`, `dtype`,
`layer_types`); writes the current one. What the engine would compute differently from the checkpoint's authors is
refused, never approximated.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from engine.config import DTYPES, ModelConfig, RopeConfig
from engine.errors import ConfigError
from engine.files import write_whole

LLAMA, MISTRAL, QWEN2, QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
MODEL_TYPES = {LLAMA: "llama", MISTRAL: "mistral", QWEN2: "qwen2", QWEN3: "qwen3"}  # Yi checkpoints say Llama
SHAPE_FIELDS = {  # ModelConfig field -> config.json key, all required
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_context": "max_position_embeddings",
}


def read_config(directory: str | Path) -> ModelConfig:
    """The model in a Hugging Face directory, named after the directory.

    End-of-sequence ids come from `generation_config.json` where it has them, as `transformers` does.

    Raises:
      ConfigError: no such directory or file, bad JSON, or a model that is not supported; names the file and the key.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory; a model is a preset's name or a directory with config.json")
    raw = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    eos = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if eos is not None:
        raw["eos_token_id"] = eos
    return parse_config(raw, directory.resolve().name, str(directory / "config.json"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a JSON object is expected, not {type(values).__name__}")
    return values


def parse_config(raw: dict[str, Any], name: str, where: str) -> ModelConfig:
    """The values of a `config.json` as a ModelConfig called `name`; `where` begins every error."""
    try:
        arch = _architecture(raw)
        _refuse_unsupported(raw, arch)
        missing = [key for key in SHAPE_FIELDS.values() if raw.get(key) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} missing")
        odd = [key for key in SHAPE_FIELDS.values() if type(raw[key]) is not int]
        if odd:
            raise ConfigError(f"{odd[0]} must be an integer, got {raw[odd[0]]!r}")
        shape = {ours: raw[theirs] for ours, theirs in SHAPE_FIELDS.items()}
        heads, eos = shape["num_heads"], raw.get("eos_token_id")
        kv_default = heads if arch == LLAMA else {MISTRAL: 8, QWEN2: 32, QWEN3: 32}[arch]  # transformers' defaults
        head_default = 128 if arch == QWEN3 else shape["hidden_size"] // max(heads, 1)
        return ModelConfig(
            name=name,
            architecture=arch,
            **shape,
            num_kv_heads=_either(raw.get("num_key_value_heads", kv_default), heads),
            head_dim=_either(raw.get("head_dim"), head_default),
            dtype=_dtype(raw),
            rope=_rope(raw),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=arch == QWEN2,
            qk_norm=arch == QWEN3,
            windows=_windows(raw, arch, shape["num_layers"]),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            bos_token_id=raw.get("bos_token_id"),
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _either(value: Any, default: Any) -> Any:
    return default if value is None else value


def _architecture(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    known = ", ".join(MODEL_TYPES)
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(f"architectures must name one class, got {names!r}; known: {known}")
    if names[0] not in MODEL_TYPES:
        raise ConfigError(f"architecture {names[0]!r} is not supported; known: {known}")
    return names[0]


def _refuse_unsupported(raw: dict[str, Any], arch: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {raw['hidden_act']!r} is not supported; known: silu")
    if arch in (LLAMA, QWEN3) and raw.get("attention_bias"):
        raise ConfigError(f"attention_bias is not supported in {arch}; only {QWEN2} has biases (on q, k and v)")
    if arch == LLAMA and raw.get("mlp_bias"):
        raise ConfigError("mlp_bias is not supported")
    if raw.get("quantization_config"):
        raise ConfigError("quantization_config: quantized checkpoints are not supported; use float weights")


def _dtype(raw: dict[str, Any]) -> str:
    name = str(_either(raw.get("dtype"), _either(raw.get("torch_dtype"), "float32"))).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; known: {', '.join(DTYPES)}")
    return name


def _rope(raw: dict[str, Any]) -> RopeConfig:
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError("rope parameters per layer type are not supported; one set for all layers is")
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor {partial} is not supported; known: 1.0")
    theta = float(_either(rope.get("rope_theta"), _either(raw.get("rope_theta"), 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "linear":
        return RopeConfig(theta, kind, factor=_rope_value(rope, kind, "factor"))
    if kind == "llama3":
        original = {"original_max_position_embeddings": raw.get("original_max_position_embeddings"), **rope}
        return RopeConfig(
            theta,
            kind,
            factor=_rope_value(rope, kind, "factor"),
            low_freq_factor=_rope_value(rope, kind, "low_freq_factor"),
            high_freq_factor=_rope_value(rope, kind, "high_freq_factor"),
            original_max_position=int(_rope_value(original, kind, "original_max_position_embeddings")),
        )
    return RopeConfig(theta, str(kind))  # refuses kinds it does not know


def _rope_value(rope: dict[str, Any], kind: str, key: str) -> float:
    if rope.get(key) is None:
        raise ConfigError(f"rope type {kind} needs {key}")
    return float(rope[key])


def _windows(raw: dict[str, Any], arch: str, num_layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, () when no layer has one; absent keys have transformers' defaults."""
    window, types = raw.get("sliding_window", 4096), raw.get("layer_types")
    if arch == LLAMA or window is None or (arch != MISTRAL and not raw.get("use_sliding_window", False)):
        return ()
    if types is None:
        first = 0 if arch == MISTRAL else raw.get("max_window_layers", 28)
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    unknown = set(types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ConfigError(f"layer_types {sorted(unknown)} are not supported; known: sliding_attention, full_attention")
    if arch == MISTRAL and "full_attention" in types:
        raise ConfigError("layer_types with full_attention beside a sliding_window are not supported in Mistral")
    return tuple(window if t == "sliding_attention" else None for t in types) if "sliding_attention" in types else ()


def write_config(cfg: ModelConfig, directory: str | Path) -> None:
    """Writes `generation_config.json` and, last, `config.json` in the current form.

    Raises:
      ConfigError: as `hf_values`.
      OutputError: a file cannot be written.
    """
    raw = hf_values(cfg)
    tokens = {key: raw[key] for key in ("bos_token_id", "eos_token_id")}
    for name, values in (("generation_config.json", tokens), ("config.json", raw)):
        write_whole(Path(directory) / name, json.dumps(values, indent=2) + "\n")


def hf_values(cfg: ModelConfig) -> dict[str, Any]:
    """The `config.json` of a model, in the current form.

    Raises:
      ConfigError: the architecture's config.json cannot express the model; names the fields.
    """
    if cfg.architecture not in MODEL_TYPES:
        raise ConfigError(f"architecture {cfg.architecture!r} is not supported; known: {', '.join(MODEL_TYPES)}")
    eos = cfg.eos_token_ids
    raw = {
        "architectures": [cfg.architecture],
        "model_type": MODEL_TYPES[cfg.architecture],
        **{theirs: getattr(cfg, ours) for ours, theirs in SHAPE_FIELDS.items()},
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": cfg.norm_eps,
        "rope_parameters": _hf_rope(cfg.rope),
        "tie_word_embeddings": cfg.tie_embeddings,
        "dtype": cfg.dtype,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        **_hf_windows(cfg),
    }
    back = parse_config(raw, cfg.name, cfg.name)
    lost = [f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != getattr(back, f.name)]
    if lost:
        fields = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in lost)
        raise ConfigError(f"{cfg.name}: a {cfg.architecture} config.json cannot say {fields}")
    return raw


def _hf_rope(rope: RopeConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "default":
        values["factor"] = rope.factor
    if rope.scaling == "llama3":
        values["low_freq_factor"] = rope.low_freq_factor
        values["high_freq_factor"] = rope.high_freq_factor
        values["original_max_position_embeddings"] = rope.original_max_position
    return values


def _hf_windows(cfg: ModelConfig) -> dict[str, Any]:
    sizes = [w for w in cfg.windows if w is not None]
    window = sizes[0] if sizes else None
    if cfg.architecture == LLAMA:
        return {}
    if cfg.architecture == MISTRAL:
        return {"sliding_window": window}
    types = ["sliding_attention" if w else "full_attention" for w in cfg.windows or (None,) * cfg.num_layers]
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}
