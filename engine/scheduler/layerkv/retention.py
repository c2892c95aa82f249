"""Which layers of a sequence stay on the device: how many (LayerKV, Eqs 3 and 4), which, and in what order they go.

LayerKV (arXiv 2410.00428) was not available as a text: its equations are reconstructed from notes and an example. No
JAX here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from engine.errors import ConfigError
from engine.scheduler.layerkv.hashing import uniform


def num_retained(prefill_seconds: float, copy_seconds_per_layer: float, num_layers: int) -> int:
    """The smallest x in [0, L] with (L - x) * copy_seconds_per_layer <= prefill_seconds: so many layers stay, and the
    others have left by the time the prefill ends.

    LayerKV Eqs 3 and 4, reconstructed. Times are seconds of the same tokens: one prompt's, or the sums of a batch.

    Raises:
      ValueError: a negative time.
    """
    if not (prefill_seconds >= 0 and copy_seconds_per_layer >= 0):
        raise ValueError(
            f"times must be >= 0, got prefill {prefill_seconds} s, copy {copy_seconds_per_layer} s a layer"
        )
    if num_layers * copy_seconds_per_layer <= prefill_seconds:
        return 0
    parked = int(prefill_seconds // copy_seconds_per_layer)
    if (parked + 1) * copy_seconds_per_layer <= prefill_seconds:  # the product may round down, the quotient is exact
        parked += 1
    return num_layers - parked


def num_retained_by_interval(decode_seconds: float, copy_seconds_per_layer: float, num_layers: int) -> int:
    """How many layers stay when one in every k is parked, k >= 1 the smallest for which a layer is fetched while k
    layers decode: x = L - floor(L / k). Select-N (arXiv 2502.08182) chooses its interval so, by measured latencies; the
    arithmetic is ours. `decode_seconds`: of a step, all layers. With the pattern `interval` and all parked rows
    streamed.

    Raises:
      ValueError: a negative time.
    """
    if not (decode_seconds >= 0 and copy_seconds_per_layer >= 0):
        raise ValueError(f"times must be >= 0, got decode {decode_seconds} s, copy {copy_seconds_per_layer} s a layer")
    if copy_seconds_per_layer * num_layers <= decode_seconds:
        return 0
    interval = copy_seconds_per_layer * num_layers / decode_seconds if decode_seconds else np.inf
    return num_layers - int(num_layers // np.ceil(interval))


def num_retained_by_deadline(tpot_slo: float, copy_seconds_per_layer: float, num_layers: int) -> int:
    """The fewest layers that stay so that the others are fetched within the objective for a token, seconds: what
    OrbitFlow (deadline-aware placement of KV) solves for all requests at each step, here for one when it is admitted
    (ours). With all parked rows streamed.

    Raises:
      ValueError: a negative time.
    """
    return num_retained(tpot_slo, copy_seconds_per_layer, num_layers)


@cache
def parked_layers(num_layers: int, num_retained: int, pattern: str) -> np.ndarray:
    """Which of L layers are parked when `num_retained` = x stay: bool [L], True = parked, read-only. `pattern`: one of
    `PATTERNS`. L - x are parked, by `interval` L - x or more.

    Raises:
      ConfigError: no such pattern.
      ValueError: x outside [0, L].
    """
    if not 0 <= num_retained <= num_layers:
        raise ValueError(f"num_retained must be from 0 to {num_layers}, the layers, got {num_retained}")
    parked = np.zeros(num_layers, bool)
    if num_retained < num_layers:
        parked[find_pattern(pattern)(num_layers, num_layers - num_retained)] = True
    parked.flags.writeable = False
    return parked


def find_pattern(name: str) -> Pattern:
    """The pattern of that name.

    Raises:
      ConfigError: there is none (lists the known ones).
    """
    if name not in PATTERNS:
        raise ConfigError(f"pattern {name!r} is unknown; known: {', '.join(PATTERNS)}")
    return PATTERNS[name]


def _interleave(num_layers: int, num_parked: int) -> np.ndarray:
    """{floor(j L / n), j < n}: spread evenly, the first layer among them. LayerKV's example has layers 0, 2, 4, 6 of 8
    on the host; the formula for other numbers is ours."""
    return np.arange(num_parked) * num_layers // num_parked


def _prefix(num_layers: int, num_parked: int) -> np.ndarray:
    """The first layers stay, the last are parked (ours, to compare with)."""
    return np.arange(num_layers - num_parked, num_layers)


def _suffix(num_layers: int, num_parked: int) -> np.ndarray:
    """The last layers stay, the first are parked (ours, to compare with)."""
    return np.arange(num_parked)


def _random(num_layers: int, num_parked: int) -> np.ndarray:
    """Any layers, the same every time for these two numbers (ours, to compare with)."""
    keys = uniform(num_layers, num_layers - num_parked, np.arange(num_layers))
    return np.argsort(keys, kind="stable")[:num_parked]


def _interval(num_layers: int, num_parked: int) -> np.ndarray:
    """One layer in every k (Select-N, arXiv 2502.08182), the largest k that parks n or more: floor(L / k) layers.

    Select-N picks k by latency, offline and then per iteration; that the number of layers to park picks it is ours. So
    is which one of each k: the last, so that the others run while it is fetched. Layers left over at the end stay.
    There are few intervals: to park more than half is to park all (k = 1).
    """
    interval = num_layers // num_parked
    return np.arange(interval - 1, num_layers, interval)


Pattern = Callable[[int, int], np.ndarray]  # (L, how many are parked, >= 1) -> indices of the parked layers
PATTERNS: dict[str, Pattern] = {
    "interleave": _interleave,
    "prefix": _prefix,
    "suffix": _suffix,
    "random": _random,
    "interval": _interval,
}
