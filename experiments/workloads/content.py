"""What a prompt consists of: token ids that follow from a few numbers, the same on every machine and version.

Token i of the stream with key k, for a vocabulary of V, is ((mix(k + (i + 1) * GOLDEN) >> 32) * V) >> 32: splitmix64
(Steele, Lea and Flood, OOPSLA 2014) read by position, so that any prefix of a stream is the prefix of a longer one.
Requests that share a stream, or leading blocks, share real prefixes. Imports no JAX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import WorkloadError

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_keys(seed: int, names: np.ndarray | None = None) -> np.ndarray:
    """Keys of the streams `names` of a seed, uint64, in the shape of `names`; of the seed's own stream [1] without."""
    own = _mix(np.array([seed], np.uint64) + GOLDEN)
    return own if names is None else _mix(own ^ _mix(names.astype(np.uint64) + GOLDEN))


def stream_tokens(keys: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """Tokens at `positions` of streams `keys` (arrays that broadcast), int32 in [0, vocab_size)."""
    bits = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return (((bits >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)).astype(np.int32)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64; wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Blocks:
    """A prompt of numbered blocks, all of `size` tokens but the last: equal ids hold equal tokens."""

    ids: tuple[int, ...]
    size: int

    def tokens(self, seed: int, prompt_len: int, vocab_size: int) -> np.ndarray:
        """The first `prompt_len` tokens, int32 [prompt_len]."""
        keys = stream_keys(seed, np.array(self.ids, np.uint64))
        return stream_tokens(keys[:, None], np.arange(self.size)[None], vocab_size).reshape(-1)[:prompt_len]

    def scaled(self, prompt_len: int, factor: float) -> tuple[Blocks, int]:
        """Every block made longer or shorter by `factor`, so that what was shared stays shared; and the new length."""
        size = max(1, round(self.size * factor))
        rest = prompt_len - (len(self.ids) - 1) * self.size
        last = min(size, max(1, round(rest * factor)))
        return Blocks(self.ids, size), (len(self.ids) - 1) * size + last


@dataclass(frozen=True)
class TokenIds:
    """Explicit token ids; a prompt is as many of them, from the front, as it is long."""

    ids: tuple[int, ...]

    def tokens(self, seed: int, prompt_len: int, vocab_size: int) -> np.ndarray:
        """The first `prompt_len` tokens, int32 [prompt_len].

        Raises:
          WorkloadError: fewer than that are known, or one lies outside the vocabulary.
        """
        if prompt_len > len(self.ids):
            raise WorkloadError(f"a prompt of {len(self.ids)} given tokens cannot become {prompt_len} long")
        tokens = np.array(self.ids[:prompt_len], np.int64)
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if len(outside):
            raise WorkloadError(f"token id {outside[0]} of a prompt is outside the vocabulary of {vocab_size}")
        return tokens.astype(np.int32)
