"""The simulated executor over pipeline stages, each with a link of its own to the host. No JAX here.

Copies of a layer travel over its stage's link, with the first micro-batch of the step that passes there: pages that
leave are gathered before it, pages that come are there for those that follow. What the stages send each other takes
nothing from the links to the host (ours).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.clock import VirtualClock
from engine.config import EngineConfig
from engine.costmodel.step_model import StepModel
from engine.executor.link import Link
from engine.executor.pipeline import MicroBatch, Run, Timeline, lasting, micro_batches
from engine.executor.sim_executor import SimExecutor, Ticket
from engine.scheduler.plan import Plan


class PipelineExecutor(SimExecutor):
    """Implements `Executor` and `FastForward`."""

    def __init__(
        self,
        stages: Sequence[StepModel],
        config: EngineConfig,
        clock: VirtualClock,
        page_bytes: int,
        links: Sequence[tuple[Link, Link]],
    ):
        """
        Args:
          stages: the model's, in their order.
          page_bytes: of a page, all devices of a stage together; so are the links' bytes/s.
          links: of each stage, host to device and device to host.
        """
        super().__init__(stages[0], config, clock, page_bytes, *links[0])
        self.stages, self._pairs = stages, links
        self._links = tuple(link for pair in links for link in pair)
        self._timeline = Timeline([clock.now()] * len(stages))
        self._sampled_at = np.full(config.scheduler.max_num_seqs, clock.now())  # by slot: when its last token was there
        self._passed: list[tuple[list[float], list[float]]] = []  # of each step that `repeats` looked at: free, done

    def submit(self, plan: Plan) -> Ticket:
        """Schedules the plan behind what was submitted before."""
        now, batches = self.clock.now(), micro_batches(plan, len(self.stages))
        start = max(now, self._free)  # of its span; its first micro-batch may have started before
        if plan.repeat > 1:
            ends = [done[-1] for _, done in self._passed[: plan.repeat]]
            free, done = self._passed[plan.repeat - 1]
            self._timeline = Timeline(free)
        else:
            done = self._timeline.step(self._ready(batches), self._sends(batches), self._run(plan, batches))
            ends = done[-1:]
        for batch, end in zip(batches, done, strict=True):
            self._sampled_at[batch.samples] = end
        self._free = ends[-1]
        return Ticket(plan, start, ends)

    def repeats(self, plan: Plan, limit: int, until: float) -> int:
        """See `FastForward`: the recursion step by step, on a copy of the timeline."""
        now, batches = self.clock.now(), micro_batches(plan, len(self.stages))
        works = [batch.work for batch in batches]
        # The least between the ends of two steps: the last stage has to do all of each, and contexts grow.
        least = sum(self.stages[-1].step(work).device for work in works)
        count = int(min(limit, (until - now) / least + self.depth + 2))
        seconds = np.array(
            [[cost.decode_seconds(w.num_decode, w.decode_kv, w.max_kv, count) for w in works] for cost in self.stages]
        )  # [stages, micro-batches, steps]
        timeline, sends, ready = Timeline(self._timeline.free), self._sends(batches), self._ready(batches)
        planned = [now, max(now, self._free)][: self.depth + 1]  # a step, when the one depth + 1 before it has ended
        self._passed = []
        for i, each in enumerate(np.moveaxis(seconds, 2, 0).tolist()):
            if i and planned[i] >= until:
                break
            done = timeline.step(ready, sends, lasting(each))
            planned.append(done[-1])
            self._passed.append((timeline.free.copy(), done))
            ready = [max(planned[i + 1] + self.cost.host, end) for end in done]
        return len(self._passed)

    def _ready(self, batches: Sequence[MicroBatch]) -> list[float]:
        """When the first stage may start each micro-batch of a step that is planned now."""
        submitted = self.clock.now() + self.cost.host
        return [max(submitted, self._sampled_at[b.reads].max(initial=0.0).item()) for b in batches]

    def _sends(self, batches: Sequence[MicroBatch]) -> list[float]:
        """Seconds of each micro-batch between two stages."""
        return [self.cost.send_seconds(tokens) if (tokens := b.num_tokens) else 0.0 for b in batches]

    def _run(self, plan: Plan, batches: Sequence[MicroBatch]) -> Run:
        """How the stages run a step's micro-batches."""
        if not (plan.moves or plan.streams or self._copying):
            return lasting([[cost.step(b.work).device for b in batches] for cost in self.stages])
        layers = [cost.stage.layers for cost in self.stages]
        moves = [[move for move in plan.all_moves if move.layer in own] for own in layers]

        def run(stage: int, batch: int, start: float) -> float:
            carried = () if batch else moves[stage]
            cost, links = self.stages[stage], self._pairs[stage]
            return self._run_with_copies(cost, batches[batch].work, carried, start, links, layers[stage].start)

        return run

    @property
    def _copying(self) -> bool:
        """See `SimExecutor`."""
        return any(link.next_report is not None for link in self._links)
