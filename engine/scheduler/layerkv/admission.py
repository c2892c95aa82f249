"""Whether the next prompt may stall requests that have begun. No JAX here.

LayerKV's rule knows TPOT alone: a prompt waits until nobody loses the objective by it (Eqs 1 and 2). Where a prefill
takes seconds that costs more than it saves, for the prompts behind it are late, too. Ours weighs both objectives. Who
has missed one already has nothing to lose. A prompt waits for others while it, and those behind it, are on time even if
another one like it comes first. When they would not be, it may cost as many others their TPOT as are late without it,
and one in any case.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.scheduler.layerkv.config import LayerKVConfig
from engine.scheduler.layerkv.slo import budget
from engine.scheduler.queue import RequestQueue

AHEAD = 32  # waiting prompts that are looked at


class AdmissionRule:
    """For the prompts of one plan, in the order in which they are asked about."""

    def __init__(
        self,
        config: LayerKVConfig,
        now: float,
        step: float,
        allowed: np.ndarray,
        late: np.ndarray,
        prefill_seconds: Callable[[int], float],
    ):
        """
        Args:
          now: seconds on the engine's clock.
          step: seconds that a decode step takes.
          allowed: Eq 1 of each request that has begun, float64 [n] seconds.
          late: bool [n], whose first token missed the objective.
          prefill_seconds: of so many tokens.
        """
        self.config, self._now, self._step, self._prefill_seconds = config, now, step, prefill_seconds
        self._allowed = allowed[~late]
        self._budget = budget(self._allowed, config.lost)
        self._spent = 0.0

    def allows(self, waiting: RequestQueue) -> bool:
        """Whether the head of the queue may be prefilled now."""
        spent = self._spent + self._prefill_seconds(waiting.head.num_tokens)
        return spent <= self._budget or self._worth(waiting, spent)

    def admitted(self, num_tokens: int) -> None:
        """A prompt of so many tokens was: those that are asked about next come on top."""
        self._spent += self._prefill_seconds(num_tokens)

    def _worth(self, waiting: RequestQueue, spent: float) -> bool:
        """Whether the objectives that others lose by it are worth it."""
        if not self.config.weigh_ttft or waiting.head.token_times:  # who has its first token has TPOT to think of
            return False
        patience = self._step + spent - self._spent
        spares = self._spares(waiting)
        saved = int(np.count_nonzero((spares >= 0) & (spares < patience)))
        if spares[0] >= patience and not saved:
            return False
        lost = int(np.count_nonzero((self._allowed >= self._spent) & (self._allowed < spent)))
        return lost <= max(saved, 1)

    def _spares(self, waiting: RequestQueue) -> np.ndarray:
        """Seconds by which the first token of each waiting prompt is on time when all go now, one after the other;
        -inf: it has its first token."""
        requests = waiting.first(AHEAD)
        ready = self._now + self._spent + np.cumsum([self._prefill_seconds(r.num_tokens) for r in requests])
        due = [-np.inf if r.token_times else r.arrival + self.config.ttft_slo for r in requests]
        return np.array(due) - ready
