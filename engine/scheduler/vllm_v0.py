"""`vllm_v0`: the scheduler of vLLM up to 0.5, the baseline both papers measured against.

First come, first served. Waiting prompts are prefilled whole, as soon as the prompt alone fits above the watermark, and
before any decode; a step prefills or decodes, never both. When decoding sequences need more pages than are free, the
one admitted last is preempted: recomputed later from the head of the queue, or swapped to the host. While sequences are
swapped no prompt is admitted; they come back, oldest first, in a step that preempted nobody.
"""

from __future__ import annotations

import numpy as np

from engine.config import SchedulerConfig
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.policy import register_policy
from engine.scheduler.state import SchedulerState

NOBODY = np.empty(0, np.int32)


@register_policy("vllm_v0")
class VllmV0:
    """Whole-prompt prefill first, prompt-only admission, preemption by recompute or swap."""

    mixes = False

    def __init__(self, config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int):
        self.state = state
        self.max_batched_tokens = max_batched_tokens
        self.swap = config.preemption == "swap"
        self.watermark_pages = int(config.watermark * state.store.num_pages)

    def plan(self, now: float) -> Plan:
        """Prefills if anything waiting can be admitted, else decodes all running sequences."""
        prefills = [] if self.state.swapped else self._admit()
        if prefills:
            return self.state.make_plan(NOBODY, prefills)
        decode, num_preempted = self._make_room()
        if not num_preempted:
            decode = np.concatenate([decode, self._swap_in()])
        return self.state.make_plan(decode, [])

    def _admit(self) -> list[Prefill]:
        state, budget, prefills = self.state, self.max_batched_tokens, []
        while state.waiting:
            head = state.waiting[0]
            # Alone in an empty engine a request is admitted without watermark and budget: it must be able to finish.
            alone = not len(state.running)
            if head.num_tokens > budget and not alone:
                break
            if not state.store.fits(head.num_tokens, 0 if alone else self.watermark_pages):
                break
            prefills.append(state.prefill(state.admit(head)))
            budget -= head.num_tokens
        return prefills

    def _swap_in(self) -> np.ndarray:
        """Brings swapped sequences back, oldest first, while they fit. Returns their slots."""
        state, slots = self.state, []
        while state.swapped:
            head = state.swapped[0]
            reserve = 0 if not len(state.running) else self.watermark_pages
            if not state.store.can_swap_in(head.id, head.num_tokens, reserve):
                break
            slots.append(state.swap_in(head))
        return np.asarray(slots, np.int32)

    def _make_room(self) -> tuple[np.ndarray, int]:
        """Maps pages for one more token of every decoding sequence, preempting from the youngest while they do not
        fit. Returns who decodes, and how many were preempted."""
        state, num_preempted = self.state, 0
        while True:
            decode = state.decodable()
            lengths = state.length[decode]
            if state.store.can_grow(decode, lengths):
                state.store.grow(decode, lengths)
                return decode, num_preempted
            state.preempt(int(decode[-1]), swap=self.swap)
            num_preempted += 1
