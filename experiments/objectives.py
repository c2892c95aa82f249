"""Objectives of each request, at several scales, and the share of requests that keep to them. NumPy only.

Four limits (`objectives.json`, written down before anything was run): time to first token, mean time per output token,
the 99th percentile of a request's own gaps between tokens, and its largest gap. A scale multiplies all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.errors import ConfigError
from engine.metrics import RequestMetrics

FILE = Path(__file__).with_suffix(".json")
LIMITS = ("ttft_ms", "tpot_ms", "itl_p99_ms", "max_gap_ms")
PAPER, ALL = "TTFT + TPOT", "all four"
# Which limits count, by name: each alone, those of LayerKV's paper, all.
SETS = {
    "TTFT": LIMITS[:1], "TPOT": LIMITS[1:2], "P99 ITL": LIMITS[2:3], "max gap": LIMITS[3:],
    PAPER: LIMITS[:2], ALL: LIMITS,
}  # fmt: skip
SLACK = 1e-9  # of a limit: times are sums and differences
Shares = dict[str, dict[str, float]]  # by scale (as %g writes it) and set: share of the requests sent


@dataclass(frozen=True)
class Objectives:
    """Limits at scale 1, the scales, and the shares of requests that are asked for.

    Raises:
      ConfigError: a limit or a scale that is not > 0, a level outside (0, 1].
    """

    limits: tuple[float, ...]  # milliseconds, as LIMITS
    scales: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self):
        if len(self.limits) != len(LIMITS) or not all(x > 0 for x in (*self.limits, *self.scales)):
            raise ConfigError(f"objectives: {', '.join(LIMITS)} and scales must be > 0, got {self.limits, self.scales}")
        if not all(0 < level <= 1 for level in self.levels):
            raise ConfigError(f"objectives: levels must be in (0, 1], got {self.levels}")

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token at scale 1."""
        return self.limits[LIMITS.index("ttft_ms")] / 1e3

    @property
    def tpot_s(self) -> float:
        """Seconds per output token at scale 1."""
        return self.limits[LIMITS.index("tpot_ms")] / 1e3

    def shares(self, completed: Sequence[RequestMetrics], sent: int) -> Shares:
        """By scale and set, the share of `sent` requests that completed within the limits of the set."""
        needs = np.array([_figures(m) for m in completed]).reshape(-1, len(LIMITS)) / self.limits  # scale needed [n, 4]
        columns = {name: [LIMITS.index(limit) for limit in limits] for name, limits in SETS.items()}
        return {
            f"{scale:g}": {
                name: float((needs[:, some].max(1) <= scale * (1 + SLACK)).sum() / sent)
                for name, some in columns.items()
            }
            for scale in self.scales
        }


def _figures(m: RequestMetrics) -> tuple[float, ...]:
    """A request's figures in milliseconds, as LIMITS. An answer of one token has no gaps, and TPOT 0 as in vLLM's
    bench."""
    assert m.ttft_s is not None
    p99 = float(np.percentile(m.itl_s, 99)) if m.itl_s else 0.0
    return m.ttft_s * 1e3, (m.tpot_s or 0.0) * 1e3, p99 * 1e3, (m.max_gap_s or 0.0) * 1e3


@lru_cache(1)
def objectives() -> Objectives:
    """Those of `objectives.json`."""
    raw = json.loads(FILE.read_bytes())
    return Objectives(tuple(raw[name]["value"] for name in LIMITS), tuple(raw["scales"]), tuple(raw["levels"]))
