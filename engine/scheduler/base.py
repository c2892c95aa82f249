"""What the built-in policies share: limits, the watermark, room by preemption, and the way back from the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.config import SchedulerConfig
from engine.scheduler.horizon import horizon
from engine.scheduler.plan import Plan
from engine.scheduler.state import SchedulerState

Tokens = tuple[np.ndarray, np.ndarray]  # slots int32 [n], and how many tokens each computes in a step int32 [n]


class BasePolicy:
    """Constructed as every policy is: with the configuration, the state and the token budget of a step."""

    default_budget: int | None = (
        None  # tokens per step when max_num_batched_tokens is not set; None: max(context, 2048)
    )

    def __init__(self, config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int):
        self.state = state
        self.max_batched_tokens = max_batched_tokens
        self.swap = config.preemption == "swap"
        self._watermark_pages = int(config.watermark * state.store.num_pages)

    def horizon(self, plan: Plan) -> int:
        """How many steps are like `plan`, just made, if nothing arrives: these policies look at no clock."""
        return horizon(self.state, plan)

    @property
    def reserve(self) -> int:
        """Pages that an admission leaves free. Alone a request may have them all: it must be able to finish."""
        return self._watermark_pages if len(self.state.running) else 0

    def make_room(self, wanted: Callable[[], Tokens]) -> tuple[Tokens, int]:
        """Maps pages for the next tokens of running sequences, preempting one after the other while they do not fit.

        `wanted` says who computes how many; it is asked again after each preemption. Returns what it said last, and how
        many were preempted.
        """
        state, num_preempted = self.state, 0
        while True:
            slots, counts = wanted()
            lengths = state.cached[slots] + counts
            if state.store.holds(slots, lengths):
                return (slots, counts), num_preempted
            if state.store.can_grow(slots, lengths):
                state.store.grow(slots, lengths)
                return (slots, counts), num_preempted
            state.preempt(state.victim(state.unfinished()), self.swap)
            num_preempted += 1

    def swap_in(self) -> int | None:
        """Brings the first swapped sequence back if it fits with a page for its next token. Returns its slot."""
        state = self.state
        if not state.swapped:
            return None
        head = state.swapped.head
        if not state.store.can_swap_in(head.id, head.num_tokens, self.reserve):
            return None
        return state.swap_in(head)
