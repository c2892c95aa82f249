"""A preset as a Hugging Face directory on disk, written once and read by everybody who wants the same weights."""

from __future__ import annotations

from pathlib import Path

from engine.files import whole_directory
from engine.presets import preset


def exported(name: str, parent: Path, seed: int = 0) -> Path:
    """The directory `parent/<name>-seed<seed>` with the preset's seeded random weights; written if it is not there.

    It appears under its name only when it is complete, so an interrupted export is never read. Imports JAX.

    Raises:
      ConfigError: an unknown preset.
      OutputError: a full disk, for one.
    """
    model = preset(name)
    directory = parent / f"{name}-seed{seed}"
    if directory.exists():
        return directory
    from engine.models.weights import export_hf, init_params

    with whole_directory(directory) as partial:
        export_hf(init_params(model, seed=seed), model, partial)
    return directory
