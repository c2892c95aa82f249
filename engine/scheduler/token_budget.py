"""Steps that mix prefill and decode under one token budget: what `vllm_v1` and `chunked` have in common.

Running sequences come first: a decode takes one token, a partial prefill what is left of its prompt and of the budget.
What remains goes to sequences that return from the host and then to new admissions, in a step that preempted nobody.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engine.scheduler.base import BasePolicy, Tokens
from engine.scheduler.plan import Plan


class TokenBudgetPolicy(BasePolicy):
    """Subclasses choose who among the running comes first, and when a prompt's pages are mapped."""

    mixes = True
    decodes_first: bool  # True: before partial prefills; False: in order of admission
    whole_prompt: bool  # True: all pages of a prompt are mapped at admission; False: as its chunks are scheduled

    def plan(self, now: float) -> Plan:
        """One pass over the running sequences, vectorised; then admissions."""
        state = self.state
        (slots, counts), num_preempted = self.make_room(self._next_tokens)
        if not num_preempted and (state.waiting or state.swapped):
            more = [*self._admissions(self.max_batched_tokens - int(counts.sum()))]
            slots, counts = np.concatenate([[slots, counts], np.asarray(more, np.int32).reshape(-1, 2).T], 1)
        prefills = state.cached[slots] < state.prefill_length[slots]
        scheduled = counts > 0
        decode, chunks = slots[scheduled & ~prefills], np.flatnonzero(scheduled & prefills)
        return state.make_plan(decode, [state.prefill(int(slots[i]), int(counts[i])) for i in chunks])

    def _next_tokens(self) -> Tokens:
        """The running sequences and their shares of the budget."""
        state = self.state
        slots = state.unfinished()
        left = state.prefill_length[slots] - state.cached[slots]  # <= 0: decodes
        if self.decodes_first:
            order = np.argsort(left > 0, kind="stable")
            slots, left = slots[order], left[order]
        wanted = np.maximum(left, 1)
        ahead = np.cumsum(wanted, dtype=np.int32) - wanted
        return slots, np.clip(self.max_batched_tokens - ahead, 0, wanted)

    def _admissions(self, budget: int) -> Iterator[tuple[int, int]]:
        """Yields (slot, tokens) of sequences that start or return in this step."""
        state = self.state
        while budget > 0 and (slot := self.swap_in()) is not None:
            count = min(budget, max(int(state.prefill_length[slot] - state.cached[slot]), 1))
            budget -= count
            yield slot, count
        while budget > 0 and state.waiting and not state.swapped:
            head = state.waiting.head
            if not state.store.fits(head.num_tokens, self.reserve):
                break
            count = min(budget, head.num_tokens)
            budget -= count
            yield state.admit(head, None if self.whole_prompt else count), count
