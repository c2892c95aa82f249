"""From what a step computes to the time it takes.

A decode step's time depends on three numbers of its batch: rows, tokens they attend to, the longest of them. Dense ops
are kept by number of tokens, so a step is a few additions, whatever the batch and the depth of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.config import DTYPES, ModelConfig
from engine.costmodel.attention import (
    DecodeAttention,
    PrefillAttention,
    TableDecode,
    TablePrefill,
    WindowedDecode,
    kv_token_bytes,
    layer_windows,
    stack_attention,
)
from engine.costmodel.device import DeviceProfile
from engine.costmodel.memory import MemoryBudget, weight_bytes
from engine.costmodel.paper_kernels import describe_kernels, find_kernels
from engine.costmodel.roofline import DenseOps
from engine.costmodel.stages import Stage
from engine.costmodel.tables import ATTENTION, OpTables
from engine.errors import ConfigError


class StepWork(NamedTuple):
    """What a step computes, as far as its time depends on it."""

    num_decode: int = 0  # decode rows
    decode_kv: int = 0  # tokens they attend to, summed over rows, input token included
    max_kv: int = 0  # of the longest of them
    prefills: tuple[tuple[int, int], ...] = ()  # (cached before, new tokens)
    num_sampled: int = 0  # rows through the LM head


class StepTime(NamedTuple):
    """Seconds of a step, in the order in which they pass."""

    host: float  # overhead per step
    embed: float  # before the first layer
    layer: float  # one layer with its all-reduces
    collective: float  # of `layer`: how long its all-reduces hold the link between devices
    tail: float  # after the last layer: norm, LM head, sampling
    num_layers: int

    @property
    def device(self) -> float:
        """What the device works, when nothing stretches it."""
        return self.embed + self.num_layers * self.layer + self.tail

    @property
    def total(self) -> float:
        """The whole step, when the host and the device take turns."""
        return self.host + self.device


class StepModel:
    """Times of steps of one model, or of one pipeline stage of it, on `tensor` devices, each of which does the same at
    the same time."""

    def __init__(
        self,
        model: ModelConfig,
        profile: DeviceProfile,
        *,
        tensor: int = 1,
        kernels: str | None = None,
        tables: Path | OpTables | None = None,
        stage: Stage | None = None,
    ):
        """
        Args:
          kernels: attention kernels of the vTensor paper (`paper_kernels.NAMES`); None: those of the profile's stack.
          tables: measured op times (`tables.py`) that win over the profile's own; None: those that it names.
          stage: None: all of the model is on the devices.

        Raises:
          ConfigError: the model does not divide over the devices, or the profile lacks a value that it needs.
        """
        self.stage = stage = stage or Stage(range(model.num_layers), first=True, last=True)
        self.model = model = stage.part_of(model)
        self.profile, self.tensor, self.kernels = profile, tensor, kernels
        source = tables if tables is not None else profile.tables
        self.tables = OpTables.read(source) if isinstance(source, Path) else source or OpTables()
        self._ops = DenseOps(model, profile, tensor, self.tables)
        self.shares_host_link = tensor > 1 and profile.shares_host_link
        self.host = profile.constants.t0_host_us * 1e-6
        self._mixed = 1.0 if kernels else profile.constants.mixed_decode  # the paper's launch decode by itself
        self._layers = model.num_layers
        self._decode, self._prefill = self._attention()
        self._dense: dict[int, tuple[float, float, float, float]] = {0: (0.0, 0.0, 0.0, 0.0)}  # by tokens
        self._heads: dict[int, float] = {}  # by rows

    def step(self, work: StepWork) -> StepTime:
        """The time of a step; an empty one takes the host's overhead."""
        num, tokens = work.num_decode, work.num_decode
        if work.prefills:
            tokens += sum(new for _, new in work.prefills)
        embed, layer, collective, norm = self._dense.get(tokens) or self._dense_seconds(tokens)
        if num:
            decode = self._decode.seconds(num, work.decode_kv, work.max_kv)
            layer += decode * self._mixed if work.prefills else decode
        if work.prefills:
            layer += self._prefill.seconds(work.prefills)
        return StepTime(self.host, embed, layer, collective, norm + self._head(work.num_sampled), self._layers)

    def decode_seconds(self, num: int, kv: int, max_kv: int, repeat: int) -> np.ndarray:
        """What the device works in each of `repeat` steps of the same `num` > 0 decode rows, all sampled, which attend
        to one token more at every step: float64 [repeat], bit-equal to `step(...).device` of each."""
        embed, layer, _, norm = self._dense.get(num) or self._dense_seconds(num)
        steps = np.arange(repeat)
        layers = layer + self._decode.seconds_each(num, kv + num * steps, max_kv + steps)
        return embed + self._layers * layers + (norm + self._head(num))

    def page_copy_seconds(self, num_bytes: int) -> float:
        """Seconds to gather or scatter pages of so many bytes, all devices together: read and written once."""
        rate = self.profile.hardware.memory_gbs * 1e9 * self.profile.constants.eff_elementwise_bw * self.tensor
        return 2 * num_bytes / rate + self.profile.constants.t0_elementwise_us * 1e-6

    def send_seconds(self, tokens: int) -> float:
        """Seconds until the activations [T, M] of `tokens` are on the devices of the next stage: over the interconnect
        by its specification, without one over the link to the host at what that reaches; every device sends its own
        copy. A copy's latency stands in for the launch of a send (ours)."""
        hardware = self.profile.hardware
        gbs = None if self.profile.shares_host_link else hardware.interconnect_gbs
        num_bytes = tokens * self.model.hidden_size * DTYPES[self.model.dtype]
        return num_bytes / ((gbs or hardware.link_gbs) * 1e9) + hardware.link_latency_us * 1e-6

    def _attention(self) -> tuple[DecodeAttention, PrefillAttention]:
        """The kernels by name, those of the stack, or measured times."""
        measured = [op for op in ATTENTION if op in self.tables]
        if self.kernels and measured:
            raise ConfigError(f"kernels={self.kernels} and measured times of {measured[0]} exclude each other")
        make = find_kernels(self.kernels) if self.kernels else stack_attention
        decode: DecodeAttention
        prefill: PrefillAttention
        decode, prefill = make(self.model, self.profile, self._ops.shard)
        if self.model.windows:
            decode = WindowedDecode(decode, layer_windows(self.model))
        if "decode_attention" in measured:
            decode = TableDecode(self.tables, self.profile.constants.skew_alpha)
        if "prefill_attention" in measured:
            prefill = TablePrefill(self.tables)
        return decode, prefill

    def _dense_seconds(self, tokens: int) -> tuple[float, float, float, float]:
        """Embedding, a layer without attention, its collective, the final norm; kept."""
        layer, collective = self._ops.layer(tokens)
        embed = self._ops.embed(tokens) if self.stage.first else 0.0
        times = embed, layer, collective, self._ops.op("final_norm", tokens) if self.stage.last else 0.0
        self._dense[tokens] = times
        return times

    def _head(self, rows: int) -> float:
        """LM head and sampling; kept."""
        if rows not in self._heads:
            self._heads[rows] = self._ops.head(rows) if self.stage.last else 0.0
        return self._heads[rows]

    def describe(self) -> str:
        """Where every number comes from: the profile's constants, the kernels' if they were named, measured tables."""
        parts = [self.profile.describe()]
        if self.kernels:
            parts.append(describe_kernels(self.kernels))
        if names := self.tables.names:
            parts.append(f"measured tables win over the constants for {', '.join(names)}")
        return "\n\n".join(parts)

    @property
    def weight_bytes(self) -> int:
        """Weights on each device: heads, ffn and vocabulary split, kv heads repeated where they must be."""
        return weight_bytes(self.model, self._ops.shard, self.stage)

    @property
    def kv_bytes_per_token(self) -> int:
        """KV of one token on each device, all layers."""
        return self._layers * kv_token_bytes(self.model, self._ops.shard)

    def num_pages(
        self, page_size: int = 16, fraction: float = 0.9, max_batched_tokens: int = 2048, max_num_seqs: int = 256
    ) -> tuple[int, str]:
        """Pages of one layer that fit on each device beside the weights, and how the number came about.

        Raises:
          ConfigError: not one page per layer fits; says by how much.
        """
        budget = self.memory_budget(fraction, max_batched_tokens, max_num_seqs)
        return budget.num_pages(self.kv_bytes_per_token * page_size, self._layers)

    def memory_budget(self, fraction: float, max_batched_tokens: int, max_num_seqs: int) -> MemoryBudget:
        """What each device's memory holds. Raises ConfigError for a fraction outside (0, 1]."""
        part = self.model, self.profile, self._ops.shard, self.stage
        return MemoryBudget.of(*part, fraction, max_batched_tokens, max_num_seqs)
