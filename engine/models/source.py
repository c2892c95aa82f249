"""Which model a name stands for. Imports no JAX for a preset."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.extension import FORMS
from engine.presets import PRESETS, find_model, is_model_spec
from engine.tokenizer import Tokenizer, load_tokenizer


def resolve(path_or_preset: str, config: EngineConfig) -> tuple[ModelConfig, Path | None, Tokenizer | None]:
    """Model configuration, checkpoint directory (None: random weights) and tokenizer.

    Raises:
      ConfigError: neither a directory nor a preset.
      WeightsError: a directory whose configuration cannot be read.
    """
    path = Path(path_or_preset)
    if is_model_spec(path_or_preset):
        model, source, tokenizer = find_model(path_or_preset), None, None
    elif path.exists():
        from engine.models import hf_config, orbax_weights

        read = orbax_weights.read_model if orbax_weights.is_orbax(path) else hf_config.read_config
        model, source, tokenizer = read(path), path, load_tokenizer(path)
    else:
        raise ConfigError(
            f"model {path_or_preset!r} is neither a directory nor a preset; presets: {', '.join(sorted(PRESETS))}, "
            f"or {FORMS}"
        )
    return (model.replace(dtype=config.dtype) if config.dtype else model), source, tokenizer
