"""`vllm_v0`: the scheduler of vLLM up to 0.5, the baseline both papers measured against.

Waiting prompts are prefilled whole, as soon as the prompt alone fits above the watermark, and before any decode; a step
prefills or decodes, never both. When decoding sequences need more pages than are free, the one admitted last is
preempted: recomputed later from the head of the queue, or swapped to the host. While sequences are swapped no prompt is
admitted; they come back, oldest first, in a step that preempted nobody. (The order is first come, first served unless
`SchedulerConfig.order` says otherwise.)
"""

from __future__ import annotations

import numpy as np

from engine.config import MAX_SLOTS
from engine.scheduler.base import BasePolicy, Tokens
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.policy import register_policy
from engine.scheduler.state import NOBODY

ONES = np.ones(MAX_SLOTS, np.int32)


@register_policy("vllm_v0")
class VllmV0(BasePolicy):
    """Whole-prompt prefill first, prompt-only admission, preemption by recompute or swap."""

    mixes = False

    def plan(self, now: float) -> Plan:
        """Prefills if anything waiting can be admitted, else decodes all running sequences."""
        prefills = self._admit() if self.state.waiting and not self.state.swapped else []
        if prefills:
            return self.state.make_plan(NOBODY, prefills)
        (decode, _), num_preempted = self.make_room(self._next_tokens)
        while self.state.swapped and not num_preempted and (slot := self.swap_in()) is not None:
            decode = np.append(decode, np.int32(slot))
        return self.state.make_plan(decode, [])

    def _admit(self) -> list[Prefill]:
        state, budget, prefills = self.state, self.max_batched_tokens, []
        while state.waiting:
            head = state.waiting.head
            if head.num_tokens > budget and len(state.running):  # alone it may exceed the budget
                break
            if not state.store.fits(head.num_tokens, self.reserve):
                break
            prefills.append(state.prefill(state.admit(head)))
            budget -= head.num_tokens
        return prefills

    def _next_tokens(self) -> Tokens:
        """One token of every sequence that can decode."""
        decode = self.state.decodable()
        return decode, ONES[: len(decode)]
