"""Pipeline stages on the virtual clock: how a step is cut into micro-batches, and when each passes each stage.

The exact recursion: a stage starts a micro-batch when the stage before has sent it and when it has done what came
before, so end[s][m] = max(end[s-1][m] + send[m], end[s][m-1]) + seconds[s][m]. The first stage starts it when the step
is submitted and the tokens that its rows read have left the last stage. So steps that are submitted ahead follow each
other through the stages without draining them. No JAX here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from engine.costmodel.step_model import StepWork
from engine.executor.sim_executor import work_of
from engine.scheduler.plan import Plan, Prefill

Run = Callable[[int, int, float], float]  # stage, micro-batch, start -> end


class MicroBatch(NamedTuple):
    """Rows of a step that pass the stages together."""

    work: StepWork
    reads: np.ndarray  # slots whose last token, sampled by an earlier step, is an input: int32 [n]
    samples: np.ndarray  # slots that it samples a token for: int32 [n]

    @property
    def num_tokens(self) -> int:
        """T: whose activations are sent from stage to stage."""
        return self.work.num_decode + sum(new for _, new in self.work.prefills)


def micro_batches(plan: Plan, most: int) -> list[MicroBatch]:
    """Cuts a step into min(`most`, rows) micro-batches, at least one. Decode rows are dealt by number, in their order;
    then prompts, longest first, each to the micro-batch with the fewest tokens (ours). No prompt is cut."""
    num_decode = len(plan.decode_slots)
    count = max(1, min(most, num_decode + len(plan.prefills)))
    size, more = divmod(num_decode, count)
    cuts = [i * size + min(i, more) for i in range(count + 1)]
    batches = []
    for start, end, prefills in zip(cuts[:-1], cuts[1:], _dealt(plan.prefills, np.diff(cuts).tolist()), strict=True):
        slots, from_device = plan.decode_slots[start:end], plan.decode_tokens[start:end] < 0
        samples = np.concatenate([slots, np.array([p.slot for p in prefills if p.samples], np.int32)])
        batches.append(MicroBatch(work_of(plan.decode_positions[start:end], prefills), slots[from_device], samples))
    return batches


def _dealt(prefills: Sequence[Prefill], tokens: list[int]) -> list[tuple[Prefill, ...]]:
    """Prompts for micro-batches that have so many `tokens` without them."""
    dealt: list[list[Prefill]] = [[] for _ in tokens]
    for prefill in sorted(prefills, key=lambda p: -len(p.tokens)):
        fewest = tokens.index(min(tokens))
        dealt[fewest].append(prefill)
        tokens[fewest] += len(prefill.tokens)
    return [tuple(part) for part in dealt]


class Timeline:
    """When each stage has done all that came to it so far, seconds on the engine's clock."""

    def __init__(self, free: Sequence[float]):
        self.free = list(free)  # [stages]

    def step(self, ready: Sequence[float], sends: Sequence[float], run: Run) -> list[float]:
        """Lets the micro-batches of one step pass. Returns when each leaves the last stage, in order.

        Args:
          ready: when the first stage may start each.
          sends: seconds that each takes from stage to stage; a stage computes meanwhile.
          run: when a stage ends a micro-batch that it starts then; called in the order in which a stage runs them.
        """
        done = []
        for batch, (arrives, send) in enumerate(zip(ready, sends, strict=True)):
            for stage, free in enumerate(self.free):
                self.free[stage] = run(stage, batch, max(arrives, free))
                arrives = self.free[stage] + send
            done.append(self.free[-1])
        return done


def lasting(seconds: Sequence[Sequence[float]]) -> Run:
    """Micro-batches that take `seconds` [stages][micro-batches], whatever else happens."""
    return lambda stage, batch, start: start + seconds[stage][batch]
