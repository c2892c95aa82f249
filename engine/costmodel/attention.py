"""Attention of one layer as a value: a few coefficients, which the kernels of any stack can be written in.

Decode reads its KV, prefill computes pairs of a query and a key; both work in tiles, so a row costs some tokens (a
query some keys) more than it attends to. All of it is linear in what a step has: a step costs the same arithmetic
whatever its batch. `paper_kernels.py` has the kernels of the vTensor paper in these terms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from engine.config import DTYPES, ModelConfig
from engine.costmodel.device import DeviceProfile
from engine.costmodel.roofline import Shard
from engine.costmodel.tables import OpTables

Windows = tuple[tuple[int | None, int], ...]  # tokens that queries see back (None: all), in how many layers
EVERYTHING: Windows = ((None, 1),)


def layer_windows(model: ModelConfig) -> Windows:
    """The windows of a model's layers."""
    return tuple(Counter(model.windows).items()) or EVERYTHING


class DecodeAttention(Protocol):
    """Seconds of decode attention in the mean layer."""

    def seconds(self, num: int, kv: int, max_kv: int) -> float:
        """Of `num` rows that attend to `kv` tokens in all, the longest of them to `max_kv`."""
        ...

    def seconds_each(self, num: int, kv: np.ndarray, max_kv: np.ndarray) -> np.ndarray:
        """`seconds` of several steps, int64 [n] -> float64 [n], bit-equal."""
        ...


class PrefillAttention(Protocol):
    """Seconds of prefill attention in the mean layer."""

    def seconds(self, prefills: tuple[tuple[int, int], ...]) -> float:
        """Of the prompts (cached before, new) of a step, in one launch."""
        ...


@dataclass(frozen=True, slots=True)
class LinearDecode:
    """max(t0 + per_token (kv + edge num + alpha (num max_kv - kv)), t0 + serial_per_token max_kv).

    The second term is the chain of the longest row, which more bandwidth does not shorten: for kernels that do not
    split it. `alpha` makes a batch of unequal rows t(mean) + alpha (t(longest) - t(mean)).
    """

    t0: float
    per_token: float  # one token of one row
    edge: float = 0.0  # tokens
    skew_alpha: float = 0.0
    serial_per_token: float = 0.0

    def seconds(self, num: int, kv: int, max_kv: int) -> float:
        """See `DecodeAttention`."""
        spread = self.per_token * (kv + self.edge * num + self.skew_alpha * (num * max_kv - kv))
        chain = self.serial_per_token * max_kv
        return self.t0 + (spread if spread > chain else chain)

    def seconds_each(self, num: int, kv: np.ndarray, max_kv: np.ndarray) -> np.ndarray:
        """See `DecodeAttention`."""
        spread = self.per_token * (kv + self.edge * num + self.skew_alpha * (num * max_kv - kv))
        return self.t0 + (np.maximum(spread, self.serial_per_token * max_kv) if self.serial_per_token else spread)


@dataclass(frozen=True, slots=True)
class WindowedDecode:
    """The mean of layers that see different numbers of tokens back; a batch is cut as if its rows were equal."""

    inner: DecodeAttention
    windows: Windows

    def seconds(self, num: int, kv: int, max_kv: int) -> float:
        """See `DecodeAttention`."""
        return float(self.seconds_each(num, np.array([kv]), np.array([max_kv]))[0])

    def seconds_each(self, num: int, kv: np.ndarray, max_kv: np.ndarray) -> np.ndarray:
        """See `DecodeAttention`."""
        total = np.zeros(len(kv))
        for window, layers in self.windows:
            seen = (kv, max_kv) if window is None else (np.minimum(kv, num * window), np.minimum(max_kv, window))
            total += layers * self.inner.seconds_each(num, *seen)
        return total / sum(layers for _, layers in self.windows)


@dataclass(frozen=True, slots=True)
class TableDecode:
    """Measured times of equal rows, and the skew rule for unequal ones."""

    tables: OpTables
    skew_alpha: float = 0.0

    def seconds(self, num: int, kv: int, max_kv: int) -> float:
        """See `DecodeAttention`."""
        return float(self.seconds_each(num, np.array([kv]), np.array([max_kv]))[0])

    def seconds_each(self, num: int, kv: np.ndarray, max_kv: np.ndarray) -> np.ndarray:
        """See `DecodeAttention`."""
        mean = self.tables.grid_seconds("decode_attention", num, kv / num)
        longest = self.tables.grid_seconds("decode_attention", num, max_kv)
        return mean + self.skew_alpha * (longest - mean)


@dataclass(frozen=True, slots=True)
class PairwisePrefill:
    """t0 + the sum over prompts of max(seconds of their pairs, per_token (cached + new)).

    Pairs with a cached prefix, and pairs among new tokens that have one, may go at rates of their own.
    """

    t0: float
    per_pair: float  # of prompts without a cached prefix
    per_prefix_pair: float
    per_new_pair: float  # of prompts with one
    per_token: float = 0.0  # to read the KV once
    edge: float = 0.0  # keys per query
    windows: Windows = EVERYTHING

    def seconds(self, prefills: tuple[tuple[int, int], ...]) -> float:
        """See `PrefillAttention`."""
        total, num_layers = 0.0, 0
        for window, layers in self.windows:
            total += layers * sum([self._prompt(start, tokens, window) for start, tokens in prefills])
            num_layers += layers
        return self.t0 + total / num_layers

    def _prompt(self, start: int, tokens: int, window: int | None) -> float:
        """Seconds of one prompt in a layer with this window."""
        new = pairs(tokens, window)
        if not start:
            return max((new + self.edge * tokens) * self.per_pair, tokens * self.per_token)
        prefix = pairs(start + tokens, window) - pairs(start, window) - new
        computed = prefix * self.per_prefix_pair + (new + self.edge * tokens) * self.per_new_pair
        seen = start if window is None else min(start, window - 1)
        return max(computed, (seen + tokens) * self.per_token)


@dataclass(frozen=True, slots=True)
class TablePrefill:
    """Measured times of single prompts, added up."""

    tables: OpTables

    def seconds(self, prefills: tuple[tuple[int, int], ...]) -> float:
        """See `PrefillAttention`."""
        return sum(float(self.tables.grid_seconds("prefill_attention", n, np.array(start))) for start, n in prefills)


def pairs(tokens: int, window: int | None = None) -> int:
    """Pairs of a query and a key at or before it among `tokens`, at most `window` keys per query."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


def kv_token_bytes(model: ModelConfig, shard: Shard) -> int:
    """K and V of one token of one layer on each device."""
    return 2 * shard.num_kv_heads * model.head_dim * DTYPES[model.dtype]


def pair_flops(model: ModelConfig, shard: Shard) -> int:
    """FLOPs of a query and a key in one layer on each device, all heads: two products."""
    return 4 * shard.num_heads * model.head_dim


def stack_attention(model: ModelConfig, profile: DeviceProfile, shard: Shard) -> tuple[LinearDecode, PairwisePrefill]:
    """The attention of the profile's stack: decode bound by memory, prefill by products.

    Raises:
      ConfigError: the profile has no rate for the model's dtype.
    """
    c, t0 = profile.constants, profile.constants.t0_attn_us * 1e-6
    per_token = kv_token_bytes(model, shard) / (profile.hardware.memory_gbs * 1e9 * c.eff_attn_decode_bw)
    per_pair = pair_flops(model, shard) / (profile.peak_flops(model.dtype) * c.eff_attn_prefill)
    decode = LinearDecode(t0, per_token, c.edge_decode_tokens, c.skew_alpha)
    rates, windows = (per_pair, per_pair, per_pair), layer_windows(model)
    return decode, PairwisePrefill(t0, *rates, per_token, c.edge_prefill_tokens, windows)
