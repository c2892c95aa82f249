"""Fast-forward: how many steps from a plan on are the same decodes, and the plan that stands for them all (ours).

A decode step changes token counts and maps pages, nothing else. So a policy whose decisions depend on no more than the
queues, the free pages and who runs decides alike until a sequence reaches its limit, a page is lacking, or somebody
comes; free pages only get fewer meanwhile, so whoever did not fit does not fit. The virtual clock runs such steps at
once, with pages mapped in the order in which single steps would map them: exactly what stepping gives (a test). No JAX
here.
"""

from __future__ import annotations

import numpy as np

from engine.errors import OutOfPages
from engine.memory.store import KVStore
from engine.scheduler.plan import Plan
from engine.scheduler.state import SchedulerState


def horizon(state: SchedulerState, plan: Plan) -> int:
    """How many steps, `plan` the first, are the same decodes if nothing arrives and pages suffice. `plan` was just
    made, and its policy looks at no clock."""
    slots = plan.decode_slots
    alone = not (plan.prefills or plan.moves or plan.streams or plan.num_preempted) and plan.forced is None
    if not alone or state.swapped or state.store.copies_in_flight or state.may_stop:
        return 1
    # A running sequence that does not decode has ended, or is about to: its pages will be free.
    if len(slots) != len(state.running) and (state.waiting or state.store.pages_per_chunk > 1):
        return 1
    return 1 + (state.tokens_left or int(np.minimum.reduce(state.limit[slots] - state.length[slots])))


def repeated(state: SchedulerState, plan: Plan, count: int) -> Plan:
    """`plan` for the first of up to `count` steps within its `horizon`: maps the pages of as many as fit, and moves the
    books on to the last of them."""
    store, slots, ahead = state.store, plan.decode_slots, count - 1
    lengths = state.cached[slots]
    try:
        _grow(store, slots, lengths, ahead)
    except OutOfPages:
        ahead = _most_that_fits(store, slots, lengths, ahead)
        if ahead == 0:
            return plan
        _grow(store, slots, lengths, ahead)
    state.cached[slots] = lengths + ahead
    state.length[slots] += ahead
    state.tokens_left = max(0, state.tokens_left - ahead)
    state.step += ahead
    deltas = np.concatenate([plan.deltas, store.take_deltas()]) if store.device_table else plan.deltas
    return plan.repeated(ahead + 1, deltas)


def _grow(store: KVStore, slots: np.ndarray, lengths: np.ndarray, ahead: int) -> None:
    """Maps what sequences of `lengths` [n] tokens lack for `ahead` more, all of them or none. Raises OutOfPages."""
    if store.pages_per_chunk == 1:
        store.grow(slots, lengths + ahead)
    elif store.can_grow(slots, lengths + ahead):  # which page goes to whom matters where chunks are shared out
        for step in _crossings(lengths, store.page_size, ahead):
            store.grow(slots, lengths + step)
    else:
        raise OutOfPages(f"{ahead} steps do not fit")


def _most_that_fits(store: KVStore, slots: np.ndarray, lengths: np.ndarray, ahead: int) -> int:
    """How many of `ahead` steps, too many, have pages."""
    low = 0
    while ahead - low > 1:  # low fits, ahead does not
        middle = (low + ahead) // 2
        low, ahead = (middle, ahead) if store.can_grow(slots, lengths + middle) else (low, middle)
    return low


def _crossings(lengths: np.ndarray, page_size: int, ahead: int) -> list[int]:
    """Steps 1 .. ahead after which some sequence of `lengths` [n] tokens begins a page."""
    first = -lengths % page_size + 1
    if ahead < page_size:
        return np.unique(first[first <= ahead]).tolist()
    starts = np.unique(first)
    steps = starts[:, None] + np.arange(0, ahead, page_size)
    return np.sort(steps[steps <= ahead]).tolist()
