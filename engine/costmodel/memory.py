"""What a device's memory holds: weights, activations, and the pages that are left for KV."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import DTYPES, ModelConfig
from engine.costmodel.device import DeviceProfile
from engine.costmodel.roofline import Shard
from engine.costmodel.stages import Stage
from engine.errors import ConfigError


def weight_bytes(model: ModelConfig, shard: Shard, stage: Stage) -> int:
    """Bytes of the weights on each device of a stage; `model` is the stage's part."""
    m, d = model.hidden_size, model.head_dim
    rows = (shard.num_heads + 2 * shard.num_kv_heads) * d  # of q, k and v
    layer = m * rows + shard.num_heads * d * m + 3 * m * shard.ffn_size + 2 * m
    layer += rows * model.qkv_bias + 2 * d * model.qk_norm
    tables = stage.first + stage.last  # of the vocabulary: the embedding, the LM head
    if model.tie_embeddings and stage.first:
        tables = 1
    weights = model.num_layers * layer + tables * shard.vocab_size * m + stage.last * m
    return weights * DTYPES[model.dtype]


def activation_bytes(model: ModelConfig, shard: Shard, stage: Stage, max_batched_tokens: int, max_num_seqs: int) -> int:
    """Estimated peak of activations on each device: one layer over all tokens, and in the last stage float32 logits
    with one copy."""
    heads = (shard.num_heads + 2 * shard.num_kv_heads) * model.head_dim
    layer = max_batched_tokens * (2 * model.hidden_size + heads + 3 * shard.ffn_size) * DTYPES[model.dtype]
    return layer + stage.last * max_num_seqs * model.vocab_size * 2 * 4


@dataclass(frozen=True)
class MemoryBudget:
    """A device's memory, bytes: vLLM's rule (a share of the device less weights and the profiled peak), with estimates
    where vLLM measures."""

    device: str
    total: int
    fraction: float
    weights: int
    activations: int
    reserved: int  # driver context, runtime, captured graphs

    @staticmethod
    def of(
        model: ModelConfig,
        profile: DeviceProfile,
        shard: Shard,
        stage: Stage,
        fraction: float,
        max_batched_tokens: int,
        max_num_seqs: int,
    ) -> MemoryBudget:
        """The budget of a stage's part of a model on each of its devices.

        Raises:
          ConfigError: a fraction outside (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ConfigError(f"device_fraction must be in (0, 1], got {fraction}")
        gib = profile.hardware.memory_gib, profile.hardware.reserved_gib
        total, reserved = (int(size * 2**30) for size in gib)
        activations = activation_bytes(model, shard, stage, max_batched_tokens, max_num_seqs)
        weights = weight_bytes(model, shard, stage)
        return MemoryBudget(profile.name, total, fraction, weights, activations, reserved)

    @property
    def kv(self) -> int:
        """Bytes left for KV; negative when the rest does not fit."""
        return int(self.total * self.fraction) - self.weights - self.activations - self.reserved

    def words(self) -> str:
        """How `kv` comes about."""
        names = ("weights", "activations (estimate)", "context and graphs")
        sizes = (self.weights, self.activations, self.reserved)
        rest = "".join(f" - {size / 2**30:.2f} {name}" for name, size in zip(names, sizes, strict=True))
        return (
            f"{self.device}: {self.fraction:g} x {self.total / 2**30:.2f} GiB{rest} = {self.kv / 2**30:.2f} GiB for KV"
        )

    def num_pages(self, block_bytes: int, num_layers: int) -> tuple[int, str]:
        """Pages that `kv` bytes hold, a whole number of blocks (one page of every layer), and how they come about.

        Raises:
          ConfigError: not one block fits; says by how much.
        """
        if self.kv < block_bytes:
            short = (block_bytes - self.kv) / 2**30
            raise ConfigError(
                f"the model does not fit: {short:.2f} GiB too little on each device ({self.words()}): lower "
                "max_context or max_num_batched_tokens, or share it over more devices"
            )
        blocks = self.kv // block_bytes
        words = f"{blocks:,} blocks of {num_layers} pages, {block_bytes / 2**20:.2f} MiB each"
        return blocks * num_layers, f"{self.words()}, {words}"
