"""Golden logits and tokens of tiny models, made by `transformers` (see `generate.py`), and the models themselves.

Weights are not stored: `weight` derives them from a tensor's name and a seed by an integer formula that NumPy computes
alike everywhere, so the generator and the tests build the same model independently.

    for variant in variants():
        write_checkpoint(variant, directory)     # config.json + safetensors in Hugging Face's layout
        g = golden(variant)                      # g.prompt, g.tokens [64], g.logits [64, V]
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.configs import CONFIGS, SAVED

HERE = Path(__file__).parent
NUM_TOKENS = 64


@dataclass(frozen=True)
class Golden:
    """What `transformers` (eager attention, float32, greedy) computed."""

    prompt: np.ndarray  # [P] int32
    tokens: np.ndarray  # [64] int32, the greedy continuation; end-of-sequence ids do not stop it
    logits: np.ndarray  # [64, V] float32, row i is what tokens[i] was chosen from


def variants() -> list[str]:
    """Names of all variants; the last is a directory that transformers itself saved."""
    return [*CONFIGS, SAVED]


def golden(variant: str) -> Golden:
    """The stored results of a variant."""
    with np.load(HERE / "results.npz") as file:
        return Golden(*(file[f"{variant}/{field}"] for field in ("prompt", "tokens", "logits")))


def prompt(config: dict[str, Any]) -> np.ndarray:
    """The prompt of a variant, `[20] int32`."""
    return (_hash("prompt", 20, 0) % np.uint32(config["vocab_size"])).astype(np.int32)


def weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The float32 values of a checkpoint tensor: uniform, exact multiples of a power of two before scaling."""
    values = (_hash(name, math.prod(shape), seed) >> np.uint32(8)).astype(np.float64) * 2.0**-23 - 1.0  # [-1, 1)
    if "norm" in name:
        values = 1.0 + 0.5 * values
    elif name.endswith("embed_tokens.weight"):
        values = 0.5 * values
    elif len(shape) == 2:
        values = values * (3.0 / shape[1]) ** 0.5 * (2.0 if "lm_head" in name or "q_proj" in name else 1.0)
    return values.astype(np.float32).reshape(shape)


def _hash(name: str, count: int, seed: int) -> np.ndarray:
    x = np.arange(count, dtype=np.uint32) + np.uint32(zlib.crc32(f"{seed}/{name}".encode()))
    for multiplier in (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F):
        x = (x ^ (x >> np.uint32(15))) * np.uint32(multiplier)
    return x ^ (x >> np.uint32(16))


def write_checkpoint(variant: str, directory: str | Path) -> None:
    """Writes the variant's model as a Hugging Face directory, from its formula (the saved one is copied)."""
    from engine.models import llama, safetensors
    from engine.models.hf_config import read_config

    directory = Path(directory)
    if variant == SAVED:
        shutil.copytree(HERE / SAVED, directory, dirs_exist_ok=True)
        return
    directory.mkdir(parents=True, exist_ok=True)
    seed, config = CONFIGS[variant]
    (directory / "config.json").write_text(json.dumps(config))
    specs = llama.definitions(read_config(directory))
    flat = [specs["embed"], *(s for layer in specs["layers"] for s in layer.values()), specs["norm"]]
    flat += [specs["head"]] if "head" in specs else []
    parts = [part for spec in flat for part in spec.parts]
    layout = {part.name: ("F32", part.shape) for part in parts}
    arrays = (weight(part.name, part.shape, seed) for part in parts)
    safetensors.write_file(directory / "model.safetensors", layout, arrays)
