"""A preset as a Hugging Face directory on disk, written once and read by everybody who wants the same weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from engine.presets import preset


def exported(name: str, parent: Path, seed: int = 0) -> Path:
    """The directory `parent/<name>-seed<seed>` with the preset's seeded random weights; written if it is not there.

    It appears under its name only when it is complete, so an interrupted export is never read. Imports JAX.

    Raises:
      ConfigError: an unknown preset.
    """
    model = preset(name)
    directory = parent / f"{name}-seed{seed}"
    if directory.exists():
        return directory
    from engine.models.weights import export_hf, init_params

    partial = parent / f".{directory.name}.{os.getpid()}"
    try:
        export_hf(init_params(model, seed=seed), model, partial)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
