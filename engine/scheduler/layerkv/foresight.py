"""What a policy that keeps to objectives foresees: step times, the link, output lengths, and how long running requests
can wait (LayerKV, Eqs 1 and 2). All of it is learned from what the engine tells. No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import ConfigError
from engine.memory.moves import Copy
from engine.request import Request
from engine.scheduler.layerkv.config import LayerKVConfig
from engine.scheduler.layerkv.lengths import LENGTHS
from engine.scheduler.layerkv.model_times import ModelTimes
from engine.scheduler.layerkv.slo import allowed_prefill, budget
from engine.scheduler.layerkv.step_times import LinkRate, StepTimes, features
from engine.scheduler.policy import Observed
from engine.scheduler.state import SchedulerState

RECENT = 16  # decode steps whose mean says what one takes now


class Foresight:
    """Under both executors the same: it knows what was observed."""

    def __init__(self, config: LayerKVConfig, state: SchedulerState):
        self.config, self.state = config, state
        self.times: StepTimes | ModelTimes = StepTimes()
        if config.times == "model":
            if state.cost is None:
                raise ConfigError(
                    "layerkv_times=model asks a cost model: set executor=sim and pipeline=1, or times=online"
                )
            self.times = ModelTimes(state.cost)
        self.link = LinkRate()
        given = {"quantile": (config.length_quantile,), "bucket": (config.length_accuracy,)}
        self.lengths = LENGTHS[config.lengths](*given.get(config.lengths, ()))
        self._recent: list[float] = []  # seconds of the last decode steps

    def observe(self, seen: Observed) -> None:
        """Learns what steps take. Those that move KV, whose time may be the link's, only count as what steps take
        now."""
        seconds = np.diff(np.array([seen.start, *seen.ends]))
        if not seen.plan.num_sampled or not (seconds > 0).all():
            return
        if not seen.plan.prefills:
            self._recent = [*self._recent, *seconds[-RECENT:].tolist()][-RECENT:]
        if not seen.plan.all_moves:
            self.times.observe(features(seen.plan)[seen.first : seen.first + len(seconds)], seconds)

    def copied(self, copies: Sequence[Copy]) -> None:
        """Learns what the link does."""
        for copy in copies:
            if copy.ok and copy.end > copy.start:
                self.link.observe(copy.num_bytes, copy.end - copy.start)

    def ended(self, request: Request) -> None:
        """Learns how long outputs are."""
        self.lengths.learn(len(request.output))

    def slack(self, now: float, slots: np.ndarray, others: Sequence[Request] = ()) -> float:
        """Seconds for which the sequences `slots`, and the preempted `others`, can be stalled (Eqs 1 and 2); infinity
        when there are none."""
        if not len(slots) and not others:
            return np.inf
        allowed = self.allowed(now, slots)
        if others:
            allowed = np.concatenate([allowed, self._allowed_of(now, others, len(slots) + len(others))])
        return budget(allowed, self.config.lost)

    def allowed(self, now: float, slots: np.ndarray) -> np.ndarray:
        """Eq 1 for each sequence, seconds float64 [n]. One whose first token is on its way has just begun."""
        state = self.state
        past = np.nan_to_num(now - state.first_token[slots])
        since_first = state.length[slots] - state.prompt_length[slots] - 1
        seconds = self.decode_seconds(slots)
        return allowed_prefill(since_first, self.remaining(slots), past, seconds, self.config.tpot_slo)

    def _allowed_of(self, now: float, requests: Sequence[Request], num_rows: int) -> np.ndarray:
        """Eq 1 for requests without a slot, [n]."""
        produced = np.array([len(r.output) for r in requests])
        left = np.array([r.max_output for r in requests]) - produced
        past = now - np.array([r.token_times[0] if r.token_times else now for r in requests])
        future = self.lengths.remaining(produced, left, np.array([r.number for r in requests]))
        seconds = self._recent_seconds or self.times.decode(num_rows, 0)
        return allowed_prefill(np.maximum(produced - 1, 0), future, past, seconds, self.config.tpot_slo)

    def remaining(self, slots: np.ndarray) -> np.ndarray:
        """Tokens that sequences will still produce, as foreseen: float64 [n]."""
        state = self.state
        produced = state.length[slots] - state.prompt_length[slots]
        return self.lengths.remaining(produced, state.limit[slots] - state.length[slots], state.number[slots])

    def decode_seconds(self, slots: np.ndarray) -> float:
        """What a decode step takes now: the mean of the last ones."""
        return self._recent_seconds or self.times.decode(len(slots), int(self.state.length[slots].sum()))

    @property
    def _recent_seconds(self) -> float:
        return sum(self._recent) / len(self._recent) if self._recent else 0.0
