"""Parameters from a seed or a Hugging Face directory, and back into one."""

from __future__ import annotations

from typing import Any

from jax.sharding import Mesh

from engine.config import ModelConfig
from engine.models import llama, tensors


def init_params(cfg: ModelConfig, mesh: Mesh | None = None, seed: int = 0) -> dict[str, Any]:
    """Seeded random parameters in `cfg.dtype`, scaled so that activations and logits have a variance near 1.

    Args:
      mesh: has an axis `tensor`; None: the first device alone.
    """
    return tensors.init(llama.definitions(cfg), mesh or tensors.single_device_mesh(), seed)
