"""How many pages will be free in the steps to come, and what to do about it: LayerKV's forecast and threshold.

That arXiv 2410.00428 has them is known, its equation is not: this one is ours. No JAX here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.errors import ConfigError


def forecast(
    free: int, held: np.ndarray, room: np.ndarray, n_future: np.ndarray, num_layers: int, page_size: int, horizon: int
) -> np.ndarray:
    """F(t + 1) .. F(t + H): pages free after each of the next `horizon` = H decode steps of n sequences, int64 [H];
    negative where they do not suffice. Nobody is admitted and nothing moves meanwhile.

    `held` int [n]: pages on the device. `room` int [n] >= 0: tokens that still fit in the pages of a sequence; it maps
    a page in every layer with its token room + 1, and then every `page_size` tokens (the page that is written to lies
    on the device, whether its layer is parked or not). `n_future` [n] >= 1: tokens it is expected to produce; with the
    last of them it gives back what it has then.

    F(t+h) = free + sum of held over n_future <= h - L * sum of new pages over n_future > h, exact for whole pages if
    n_future is. A page that a sequence maps in its very last step is not seen: it comes back in the same step.
    """
    ends = np.ceil(np.clip(n_future, 1, horizon + 1)).astype(np.int64)  # H + 1: not within these steps
    starts = room[:, None] + np.arange(1, horizon + 1, page_size)  # steps in which a sequence begins a page [n, J]
    begun = starts < ends[:, None]
    back = held + num_layers * begun.sum(1)
    change = np.bincount(ends, back, horizon + 2) - num_layers * np.bincount(starts[begun], minlength=horizon + 2)
    return free + np.cumsum(change[1 : horizon + 1]).astype(np.int64)


@dataclass(frozen=True)
class Watermarks:
    """Two marks, so that what one step parks the next does not bring home (hysteresis).

    Raises:
      ConfigError: not 0 <= low <= high.
    """

    low: int  # pages: park layers while the forecast falls below
    high: int  # pages: bring layers home while it stays above

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ConfigError(f"watermarks must be 0 <= low <= high, got low={self.low} and high={self.high}")

    def lacking(self, forecast: np.ndarray) -> int:
        """Pages to free so that no step of `forecast` [H] has fewer than `low`."""
        return max(0, self.low - int(np.minimum.reduce(forecast)))

    def spare(self, forecast: np.ndarray) -> int:
        """Pages that may be taken so that every step of `forecast` [H] has more than `high` left."""
        return max(0, int(np.minimum.reduce(forecast)) - self.high - 1)
