"""Random weights as a Hugging Face directory on disk, written once and read by everybody who wants the same."""

from __future__ import annotations

from pathlib import Path

from engine.errors import ConfigError
from engine.files import whole_directory
from engine.models.hf_config import read_config
from engine.presets import find_model


def exported(name: str, parent: Path, seed: int = 0) -> Path:
    """The directory `parent/<model>-seed<seed>` with seeded random weights for a preset or another `--model_spec`;
    written if it is not there.

    It appears under its name only when it is complete, so an interrupted export is never read. Imports JAX.

    Raises:
      ConfigError: an unknown model, or the directory holds another one of that name.
      OutputError: a full disk, for one.
    """
    model = find_model(name)
    directory = parent / f"{model.name}-seed{seed}"
    if directory.exists():
        if read_config(directory).replace(name=model.name) != model:
            raise ConfigError(f"{directory} holds another model: remove it, or give this one another name")
        return directory
    from engine.models.weights import export_hf, init_params

    with whole_directory(directory) as partial:
        export_hf(init_params(model, seed=seed), model, partial)
    return directory
