"""`paged_park`: what LayerKV would be without layers, to tell what is layer-wise about its gain (ours).

A prompt is prefilled at once, under the same SLO rule: when pages lack, the *whole* of the newest running requests goes
to the host for it. They come back first come, first served, as pages free up. No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from engine.config import SchedulerConfig
from engine.memory.moves import Copy
from engine.memory.paged import PagedStore
from engine.request import Request
from engine.scheduler.base import BasePolicy, Tokens
from engine.scheduler.layerkv.foresight import Foresight
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.policy import Observed, register_policy
from engine.scheduler.state import NOBODY, SchedulerState


@register_policy("paged_park")
class PagedPark(BasePolicy):
    """Whole requests in place of layers; of LayerKV's knobs those of the SLO rule count."""

    mixes = False
    needs_host = True

    def __init__(self, config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int):
        super().__init__(config, state, max_batched_tokens)
        self.swap, self.store = True, cast(PagedStore, state.store)
        self.foresight = Foresight(config.layerkv, state)

    def observe(self, seen: Observed) -> None:
        """Learns what steps take."""
        self.foresight.observe(seen)

    def copied(self, copies: Sequence[Copy]) -> None:
        """Learns what the link does."""
        self.foresight.copied(copies)

    def ended(self, request: Request) -> None:
        """Learns how long outputs are."""
        self.foresight.ended(request)

    def plan(self, now: float) -> Plan:
        """Prefills if anything may be admitted, else decodes what is on the device."""
        state = self.state
        prefills = self._admit(now) if state.waiting else []
        if prefills:
            return state.make_plan(NOBODY, prefills)
        (decode, _), num_preempted = self.make_room(self._next_tokens)
        while state.swapped and not num_preempted and (slot := self.swap_in()) is not None:
            decode = np.append(decode, np.int32(slot))
        return state.make_plan(decode, [])

    def horizon(self, plan: Plan) -> int:
        """See `BasePolicy`: while requests wait, the SLO rule looks at the clock."""
        return 1 if self.state.waiting else super().horizon(plan)

    def _admit(self, now: float) -> list[Prefill]:
        state, tokens, prefills = self.state, self.max_batched_tokens, []
        rule, running = self.foresight.rule(now, state.decodable(), list(state.swapped)), state.running
        while state.waiting:
            head = state.waiting.head
            if head.num_tokens > tokens and len(state.running):
                break
            if not rule.allows(state.waiting):
                break
            running = self._park(running, head.num_tokens)
            if not state.store.fits(head.num_tokens):
                break
            prefills.append(state.prefill(state.admit(head)))
            rule.admitted(head.num_tokens)
            tokens -= head.num_tokens
        return prefills

    def _park(self, slots: np.ndarray, num_tokens: int) -> np.ndarray:
        """Parks the newest of sequences `slots`, oldest first, until so many tokens fit; nobody if all of them are too
        few. Returns who stays."""
        state, store = self.state, self.store
        pages = int(store.mapped[slots].sum()) * store.num_layers + store.num_free_pages
        if store.pages_for(num_tokens) * store.num_layers > pages:
            return slots
        while len(slots) and not store.fits(num_tokens) and store.can_swap_out(int(slots[-1])):
            state.preempt(int(slots[-1]), swap=True)
            slots = slots[:-1]
        return slots

    def _next_tokens(self) -> Tokens:
        """One token of every sequence that can decode."""
        decode = self.state.decodable()
        return decode, np.ones(len(decode), np.int32)
