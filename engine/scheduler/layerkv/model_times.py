"""Step times by the cost model of the virtual clock, in place of those fitted to what was seen (`times=model`). No JAX
here.
"""

from __future__ import annotations

from engine.costmodel.step_model import StepModel, StepWork


class ModelTimes:
    """Has the predictions of `StepTimes`; learns nothing."""

    def __init__(self, cost: StepModel):
        self._cost = cost

    def observe(self, features: object, seconds: object) -> None:
        """It knows."""

    def prefill(self, tokens: int, start: int = 0) -> float:
        """Seconds of a step that prefills `tokens` tokens behind `start` cached ones."""
        return self._cost.step(StepWork(0, 0, 0, ((start, tokens),), 1)).total

    def decode(self, rows: int, kv_tokens: int) -> float:
        """Seconds of a step that decodes `rows` sequences of equal length with `kv_tokens` tokens between them."""
        if not rows:
            return 0.0
        return self._cost.step(StepWork(rows, kv_tokens, -(-kv_tokens // rows), (), rows)).total
