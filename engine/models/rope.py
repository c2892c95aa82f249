"""Rotary position embeddings in the half-rotation convention of Hugging Face checkpoints.

Source: RoFormer (arXiv 2104.09864); `linear` scaling is position interpolation (arXiv 2306.15595), `llama3` the
frequency-dependent interpolation of the Llama 3.1 release.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from engine.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token of each rotated pair: `[D/2] float32`, in float32 arithmetic as the reference has it."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = np.float32(1) / np.float32(rope.theta) ** exponents
    if rope.scaling == "linear":
        return freqs / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(freqs, rope)
    return freqs


def _llama3(freqs: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Keeps the fast frequencies, divides the slow ones by `factor`, and blends in between."""
    turns = rope.original_max_position * freqs / np.float32(2 * np.pi)  # rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return ((1 - blend) * freqs / rope.factor + blend * freqs).astype(np.float32)


def rope_tables(cfg: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation of each token.

    Args:
      positions: `[T] int32`, position of each token in its sequence.

    Returns:
      (cos, sin), each `[T, D/2] float32`.
    """
    freqs = jnp.asarray(inverse_frequencies(cfg.rope, cfg.head_dim))
    angles = positions.astype(jnp.float32)[:, None] * freqs  # [T, D/2]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates pairs (i, i + D/2) of the last axis. `x [T, ..., D]` -> the same shape and dtype; float32 inside."""
    cos, sin = (t.reshape(t.shape[0], *[1] * (x.ndim - 2), t.shape[1]) for t in rope)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
