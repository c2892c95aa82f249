"""How long decoding sequences can wait, and how many prefills fit into that time: LayerKV, Eqs 1 and 2.

The equations of arXiv 2410.00428 are reconstructed: their symbols are known, the way they are put together is not.
Times are seconds. No JAX here.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.errors import ConfigError

LOST = ("block", "ignore")


def allowed_prefill(
    n_past: np.ndarray, n_future: np.ndarray, t_past: np.ndarray, decode_seconds: float, tpot_slo: float
) -> np.ndarray:
    """How long each decoding sequence can be stalled and still end with a mean TPOT of `tpot_slo`: float64 [n] seconds,
    negative where it cannot any more. Eq 1, reconstructed.

    `n_past` [n] tokens since its first, which took `t_past` [n] seconds; `n_future` [n] tokens are expected to follow,
    at `decode_seconds` each.
    """
    return tpot_slo * (n_past + n_future) - (t_past + n_future * decode_seconds)


def budget(allowed: np.ndarray, lost: str) -> float:
    """Seconds that prefills may take now: the least of `allowed` [n], infinity if nobody decodes. Eq 2, reconstructed.

    `lost`: what a sequence does whose objective cannot be met any more (allowed < 0). "block", as written: it lets no
    prefill start until it has ended. "ignore" (ours): it is a lost cause and does not count.

    Raises:
      ConfigError: another `lost`.
    """
    if lost not in LOST:
        raise ConfigError(f"lost must be one of {', '.join(LOST)}, got {lost!r}")
    if lost == "ignore":
        allowed = allowed[allowed >= 0]
    return float(np.minimum.reduce(allowed, initial=np.inf))


def num_admitted(prefill_seconds: Iterable[float], budget: float) -> int:
    """The largest n for which the first n of these prefills fit into `budget` seconds together. Nobody is skipped; what
    lies behind the first that does not fit is not looked at."""
    count, total = 0, 0.0
    for seconds in prefill_seconds:
        total += seconds
        if total > budget:
            break
        count += 1
    return count
