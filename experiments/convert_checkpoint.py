"""Converts a checkpoint: Hugging Face to Orbax, and back.

    python -m experiments.convert_checkpoint --hf=DIR --out=DIR
    python -m experiments.convert_checkpoint --orbax=DIR --out=DIR

Every bit stays as it is unless --dtype asks for another one; the tokenizer goes along. Host memory stays at one layer.
The output appears under its name when it is complete. Serve either with --model=DIR.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from absl import flags

from engine.config import ModelConfig
from engine.errors import ConfigError, WeightsError
from engine.files import whole_directory
from experiments import common_flags

HF = flags.DEFINE_string("hf", None, "Hugging Face directory to read.")
ORBAX = flags.DEFINE_string("orbax", None, "Orbax directory to read.")
flags.declare_key_flag("out")
flags.declare_key_flag("dtype")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def convert_hf(source: Path, out: Path, dtype: str | None) -> ModelConfig:
    """Hugging Face to Orbax. Raises ConfigError, WeightsError or OutputError."""
    from engine.models import orbax_weights, weights
    from engine.models.hf_config import read_config

    cfg = _with_dtype(read_config(source), dtype)
    with whole_directory(out) as partial:
        orbax_weights.save(weights.packed_tensors(source, cfg), cfg, partial)
        _copy_tokenizer(source, partial)
    return cfg


def convert_orbax(source: Path, out: Path, dtype: str | None) -> ModelConfig:
    """Orbax to Hugging Face. Raises ConfigError, WeightsError or OutputError."""
    from engine.models import orbax_weights
    from engine.models.weights import export_hf

    if not orbax_weights.is_orbax(source):
        raise WeightsError(f"{source}: not an Orbax checkpoint")
    cfg = _with_dtype(orbax_weights.read_model(source), dtype)
    with whole_directory(out) as partial:
        export_hf(orbax_weights.leaves(source, cfg), cfg, partial)
        _copy_tokenizer(source, partial)
    return cfg


def _with_dtype(cfg: ModelConfig, dtype: str | None) -> ModelConfig:
    return cfg.replace(dtype=dtype) if dtype else cfg


def _copy_tokenizer(source: Path, out: Path) -> None:
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def main() -> int:
    """The program."""
    hf, orbax, out = HF.value, ORBAX.value, common_flags.OUT.value
    if bool(hf) == bool(orbax):
        raise ConfigError("give what to read by exactly one of --hf and --orbax")
    if not out:
        raise ConfigError("--out is missing: the directory to write")
    convert = convert_hf if hf else convert_orbax
    cfg = convert(Path(hf or orbax or ""), Path(out), common_flags.DTYPE.value)
    print(f"{cfg.name}: {cfg.num_parameters:,} parameters in {cfg.dtype}, written to {out}")
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
