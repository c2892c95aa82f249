"""Dense ops of one decoder layer and of the tail as rooflines: max(FLOPs / rate, bytes / bandwidth) + launch time.

The ops are those of a fused inference stack (vLLM's): residual additions inside the norms, the KV write with attention.
Weights are read once per step, whatever the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import DTYPES, ModelConfig, cdiv
from engine.costmodel.device import DeviceProfile
from engine.costmodel.tables import OpTables
from engine.errors import ConfigError

ALL_REDUCES = 2  # of a layer: behind the attention, behind the ffn


@dataclass(frozen=True)
class Shard:
    """What one of `tensor` devices holds of a model."""

    num_heads: int  # H
    num_kv_heads: int  # K; heads repeat when there are fewer than devices
    ffn_size: int
    vocab_size: int

    @staticmethod
    def of(model: ModelConfig, tensor: int) -> Shard:
        """The share of each device.

        Raises:
          ConfigError: heads or ffn do not divide over the devices.
        """
        heads, kv = model.num_heads, model.num_kv_heads
        if tensor < 1:
            raise ConfigError(f"tensor must be >= 1, got {tensor}")
        if heads % tensor or (kv % tensor and tensor % kv):
            raise ConfigError(
                f"{model.name}: {heads} heads and {kv} kv heads do not divide over tensor={tensor} devices"
            )
        if model.ffn_size % tensor:
            raise ConfigError(f"{model.name}: ffn_size={model.ffn_size} is not a multiple of tensor={tensor}")
        return Shard(heads // tensor, max(1, kv // tensor), model.ffn_size // tensor, cdiv(model.vocab_size, tensor))


class DenseOps:
    """Seconds of every op but attention, by number of tokens T; measured tables win where they have the op.

    Ops: `embed`, per layer `input_norm` `qkv` [`qk_norm`] `rope` `o` `post_norm` `gate_up` `act` `down`, and
    two all-reduces when `tensor` > 1; `final_norm`, `lm_head`, `sample`.
    """

    def __init__(self, model: ModelConfig, profile: DeviceProfile, tensor: int, tables: OpTables):
        c, hbm = profile.constants, profile.hardware.memory_gbs * 1e9
        self.shard = Shard.of(model, tensor)
        self._tables, self._tensor = tables, tensor
        self._width = DTYPES[model.dtype]
        self._flops, self._gemm_bytes, self._gemm_t0 = (
            profile.peak_flops(model.dtype) * c.eff_gemm, hbm * c.eff_gemm_bw, c.t0_gemm_us * 1e-6
        )  # fmt: skip
        self._element_bytes, self._element_t0 = hbm * c.eff_elementwise_bw, c.t0_elementwise_us * 1e-6
        self._bus, self._allreduce_t0 = profile.allreduce(tensor) if tensor > 1 else (0.0, 0.0)
        self._model_width = m = model.hidden_size
        heads, kv = self.shard.num_heads * model.head_dim, self.shard.num_kv_heads * model.head_dim
        ffn, vocab = self.shard.ffn_size, self.shard.vocab_size
        self._products = {  # op: (n, k) of [T, k] @ [k, n]
            "qkv": (heads + 2 * kv, m), "o": (m, heads), "gate_up": (2 * ffn, m), "down": (m, ffn),
            "lm_head": (vocab, m),
        }  # fmt: skip
        self._elements = {  # op: elements read and written per token
            "embed": 2 * m, "input_norm": 4 * m, "qk_norm": 2 * (heads + kv), "rope": 2 * (heads + kv),
            "post_norm": 4 * m, "act": 3 * ffn, "final_norm": 4 * m, "sample": vocab * 4 // self._width,
        }  # fmt: skip
        self._layer_ops = ["input_norm", "qkv", "rope", "o", "post_norm", "gate_up", "act", "down"]
        if model.qk_norm:
            self._layer_ops.insert(2, "qk_norm")

    def op(self, name: str, tokens: int) -> float:
        """Seconds of one op over `tokens` rows."""
        if name in self._tables:
            return self._tables.seconds(name, tokens)
        if name in self._products:
            return self.product(tokens, *self._products[name])
        return tokens * self._elements[name] * self._width / self._element_bytes + self._element_t0

    def product(self, m: int, n: int, k: int) -> float:
        """Seconds of [m, k] @ [k, n]."""
        num_bytes = (m * k + k * n + m * n) * self._width
        return max(2 * m * n * k / self._flops, num_bytes / self._gemm_bytes) + self._gemm_t0

    def allreduce(self, tokens: int) -> tuple[float, float]:
        """Seconds of an all-reduce of [T, M], and how many of them it holds the link between devices."""
        if self._tensor == 1:
            return 0.0, 0.0
        held = self._on_bus(2 * tokens * self._model_width * self._width)
        return held + self._allreduce_t0, held

    def embed(self, tokens: int) -> float:
        """Seconds before the first layer: the vocabulary is split, so that partial embeddings are added up."""
        return self.op("embed", tokens) + self.allreduce(tokens)[0]

    def layer(self, tokens: int) -> tuple[float, float]:
        """Seconds of one layer without its attention, and how long its two all-reduces hold the link."""
        seconds, held = self.allreduce(tokens)
        return sum(self.op(name, tokens) for name in self._layer_ops) + ALL_REDUCES * seconds, ALL_REDUCES * held

    def head(self, rows: int) -> float:
        """Seconds of the LM head and greedy sampling over so many rows; logits are gathered from the devices."""
        if rows == 0:
            return 0.0
        gather = 0.0
        if self._tensor > 1:
            gather = self._on_bus(rows * self.shard.vocab_size * self._tensor * self._width) + self._allreduce_t0
        return self.op("lm_head", rows) + gather + self.op("sample", rows)

    def _on_bus(self, num_bytes: float) -> float:
        """Seconds that `num_bytes` take between devices, each of which keeps its own share."""
        return num_bytes * (self._tensor - 1) / self._tensor / self._bus
