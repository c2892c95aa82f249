"""What a policy that keeps to objectives foresees: step times, the link, output lengths, and how long running requests
can wait (LayerKV, Eqs 1 and 2). All of it is learned from what the engine tells. No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.errors import ConfigError
from engine.memory.moves import Copy
from engine.request import Request
from engine.scheduler.layerkv.admission import AdmissionRule
from engine.scheduler.layerkv.config import LayerKVConfig
from engine.scheduler.layerkv.lengths import LENGTHS
from engine.scheduler.layerkv.model_times import ModelTimes
from engine.scheduler.layerkv.slo import allowed_prefill
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

    def rule(
        self, now: float, slots: np.ndarray, others: Sequence[Request] = (), num_resting: int = 0
    ) -> AdmissionRule:
        """Whether prompts may stall the sequences `slots`, of which `num_resting` have layers on the host, and the
        preempted `others` now. Not all of them decode in each step, so that a token takes longer (ours; Eq 1 as written
        believes that they do)."""
        allowed, late, step = np.empty(0), np.empty(0, bool), 0.0
        if self.config.slo_rule and (num := len(slots) + len(others)):
            step = self.decode_seconds(slots)
            turns = num / max(1, len(slots) - num_resting)
            allowed, late = self.allowed(now, slots, turns), self._late(now, slots)
            if others:
                allowed = np.concatenate([allowed, self._allowed_of(now, others, num, turns)])
                late = np.concatenate([late, [self._was_late(r) for r in others]])
        return AdmissionRule(self.config, now, step, allowed, late, self.times.prefill)

    def _late(self, now: float, slots: np.ndarray) -> np.ndarray:
        """Whose first token missed the objective, bool [n]."""
        first = self.state.first_token[slots]
        return np.where(np.isnan(first), now, first) - self.state.arrival[slots] > self._ttft_slo

    def _was_late(self, request: Request) -> bool:
        return bool(request.token_times) and request.token_times[0] - request.arrival > self._ttft_slo

    def allowed(self, now: float, slots: np.ndarray, turns: float = 1.0) -> np.ndarray:
        """Eq 1 for each sequence, seconds float64 [n]. One whose first token is on its way has just begun. `turns`:
        decode steps that it waits for a token."""
        state = self.state
        past = np.nan_to_num(now - state.first_token[slots])
        since_first = state.length[slots] - state.prompt_length[slots] - 1
        seconds = turns * self.decode_seconds(slots)
        return allowed_prefill(since_first, self.remaining(slots), past, seconds, self.config.tpot_slo)

    def _allowed_of(self, now: float, requests: Sequence[Request], num_rows: int, turns: float) -> np.ndarray:
        """Eq 1 for requests without a slot, [n], of `num_rows` that have begun; see `allowed`."""
        produced = np.array([len(r.output) for r in requests])
        left = np.array([r.max_output for r in requests]) - produced
        past = now - np.array([r.token_times[0] if r.token_times else now for r in requests])
        future = self.lengths.remaining(produced, left, np.array([r.number for r in requests]))
        seconds = turns * (self._recent_seconds or self.times.decode(num_rows, 0))
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
    def _ttft_slo(self) -> float:
        return self.config.ttft_slo if self.config.weigh_ttft else np.inf

    @property
    def _recent_seconds(self) -> float:
        return sum(self._recent) / len(self._recent) if self._recent else 0.0
