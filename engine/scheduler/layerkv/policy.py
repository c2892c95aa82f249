"""`layerkv`: KV allocated, parked and streamed layer by layer, and prompts admitted while running requests can wait.

LayerKV (arXiv 2410.00428) was not available as a text. What is known of it: a prompt is admitted with only some of its
layers on the device, the fewest for which the others have left by the end of its prefill (Eqs 3 and 4), spread evenly;
as many prompts as the TPOT objective of running requests allows (Eqs 1 and 2); a forecast of free blocks, and layers
that leave before they are lacking. How these are put together is reconstructed. Ours: layers beyond the fewest stay
while pages are free; parked sequences wait until they come home, which takes what the link can do under decode steps,
and are streamed only when their objective is at stake (by knob also when it costs nothing, or always); requests that
are lost do not count in Eq 2. Every mechanism has a knob (`config.py`). No JAX here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from engine.config import SchedulerConfig, cdiv
from engine.errors import ConfigError
from engine.memory.moves import Copy
from engine.memory.parking import ParkingStore
from engine.request import Request
from engine.scheduler.base import BasePolicy
from engine.scheduler.layerkv.forecast import Watermarks, forecast
from engine.scheduler.layerkv.foresight import Foresight
from engine.scheduler.layerkv.placement import Placement
from engine.scheduler.layerkv.residency import Residency
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.policy import Observed, register_policy
from engine.scheduler.state import NOBODY, SchedulerState

MANY = 1 << 30


@register_policy("layerkv")
class LayerKV(BasePolicy):
    """Whole prompts first, as the baseline it was measured against; with `chunked`, chunks beside decodes."""

    mixes = False
    parks = True

    def __init__(self, config: SchedulerConfig, state: SchedulerState, max_batched_tokens: int):
        super().__init__(config, state, max_batched_tokens)
        knobs = self.knobs = config.layerkv
        self.store = store = cast(ParkingStore, state.store)
        if not getattr(store, "parks", False):
            raise ConfigError("policy layerkv parks layers: it needs store=paged, host_bytes and transient_pages")
        if (knobs.retained_layers or 0) > store.num_layers:
            raise ConfigError(f"layerkv retained_layers={knobs.retained_layers}: the model has {store.num_layers}")
        self.num_layers, self.mixes = store.num_layers, knobs.chunked
        self.residency = Residency(knobs, state, store)
        self.foresight = Foresight(knobs, state)
        self.watermarks = Watermarks(*(int(w * store.num_pages) for w in (knobs.low_watermark, knobs.high_watermark)))
        self.placement = Placement(config, state, store, self.foresight, self.residency, self.watermarks.high)
        self._turn = np.zeros(store.num_slots, np.int64)  # by slot: the step that computed it last
        self._now = 0.0

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
        """Prefills if anything may be admitted, else a decode step; with `chunked` both at once."""
        state, self._now = self.state, now
        if not self.knobs.overlap and self.store.unlanded.any():
            return state.make_plan(NOBODY, [])
        if self.knobs.chunked:
            decode, num_preempted = self._decodes()
            prefills = self._chunks(decode, self.max_batched_tokens - len(decode), not num_preempted)
            return state.make_plan(decode, prefills)
        prefills = self._admit(self.max_batched_tokens, 0) if state.waiting and not state.swapped else []
        return state.make_plan(NOBODY, prefills) if prefills else state.make_plan(self._decodes()[0], [])

    def horizon(self, plan: Plan) -> int:
        """See `BasePolicy`. The SLO rule looks at the clock while requests wait; parked rows take turns; and pages must
        suffice so far ahead that the forecast has nothing to say."""
        if self.state.waiting or not self.residency.idle:
            return 1
        return max(1, min(super().horizon(plan), self._carefree(len(plan.decode_slots)) + 1))

    def _admit(self, tokens: int, taken: int) -> list[Prefill]:
        """First come, first served, as many prompts as the token budget, running requests and memory allow; with
        `chunked`, the last may begin with a chunk. `taken`: transient pages that the step needs already."""
        state, knobs, prefills = self.state, self.knobs, []
        begun = state.decodable()
        rule = self.foresight.rule(self._now, begun, num_resting=int(np.count_nonzero(self._parked(begun))))
        while state.waiting and tokens > 0:
            head = state.waiting.head
            length, count = head.num_tokens, head.num_tokens
            # Alone a whole prompt may exceed the budget.
            if length > tokens and len(state.running) and not knobs.chunked:
                break
            if not rule.allows(state.waiting):
                break
            away = self.placement.choose(length, taken)
            if away is None:
                self.placement.leave_for(length)
                break
            parks = bool(away.any())
            if knobs.chunked and not (count := self._chunk(length, tokens, parks)):
                break
            prefills.append(state.prefill(state.admit(head, count, away if parks else None), count))
            rule.admitted(length)
            tokens -= count
            taken += length // self.store.page_size if parks else 0
        return prefills

    def _chunks(self, decode: np.ndarray, tokens: int, admits: bool) -> list[Prefill]:
        """The next chunk of the prompt that is being computed; when there is none, prompts are admitted. Chunks of a
        sequence with layers away end with a page, and wait until the one before has landed."""
        state, store, prefills = self.state, self.store, []
        partial = state.running[state.cached[state.running] < state.prefill_length[state.running]]
        taken = store.transient_need(decode)
        if not len(partial):
            return self._admit(tokens, taken) if admits and not state.swapped else []
        for slot in partial.tolist():
            parks = bool(store.away[slot].any())
            count = self._chunk(int(state.prefill_length[slot] - state.cached[slot]), tokens, parks)
            length = int(state.cached[slot]) + count
            need = taken + (length // store.page_size if parks else store.transient_need(np.array([slot])))
            if not count or store.unlanded[slot] or need > store.transient_pages or not store.can_extend(slot, length):
                continue
            store.extend(slot, length)
            prefills.append(state.prefill(slot, count))
            tokens, taken = tokens - count, need
        return prefills

    def _chunk(self, left: int, tokens: int, parks: bool) -> int:
        """Tokens of a chunk: with layers away it ends with a page unless it is the last."""
        count = min(left, tokens)
        return count // self.store.page_size * self.store.page_size if parks and count < left else count

    def _decodes(self) -> tuple[np.ndarray, int]:
        """Rows of a decode step with pages for their next tokens, and how many were preempted for them. Layers leave
        and come home."""
        state, residency = self.state, self.residency
        slots = state.decodable()
        if not residency.idle:
            residency.append(slots)
        parked = self._parked(slots)
        spare = self._look_ahead(slots, slots[~parked])
        ready = self.store.ready(slots)
        at_home, away = slots[~parked & ready], slots[parked & ready]
        rows, num_preempted = self._make_room(at_home)
        have_room = len(rows) == len(at_home)
        if have_room and len(away) and not num_preempted:
            more, num_preempted = self._from_host(away, at_home, min(spare, self.store.num_free_pages))
            rows = np.concatenate([rows, more])
            have_room = len(rows) > 0
        # What is free belongs to rows that wait for pages, or these would leave again for them.
        while state.swapped and have_room and not num_preempted and (slot := self.swap_in()) is not None:
            if state.cached[slot] >= state.prefill_length[slot]:  # else it goes on with its prompt: `_chunks`
                rows = np.append(rows, np.int32(slot))
        self._turn[rows] = state.step + 1
        return rows, num_preempted

    def _parked(self, slots: np.ndarray) -> np.ndarray:
        """Which of the sequences that have begun have layers on the host, bool [n]."""
        if self.residency.idle:
            return np.zeros(len(slots), bool)
        return self.residency.parked_pages(slots).max(1) > 0

    def _look_ahead(self, slots: np.ndarray, at_home: np.ndarray) -> int:
        """Parks layers of sequences `slots`, oldest first, when the forecast falls below the low watermark; those
        `at_home` go on decoding, the others wait. Returns the pages that may be taken while it stays above the high
        one."""
        state, store, residency, knobs = self.state, self.store, self.residency, self.knobs
        if not knobs.forecast:
            return max(0, store.num_free_pages - self.reserve)
        if not len(slots) or (residency.idle and self._carefree(len(slots)) >= 0):
            return 0
        free = store.num_free_pages + residency.leaving
        room = store.mapped[at_home] * store.page_size - state.cached[at_home]
        held, future = residency.held(at_home), self.foresight.remaining(at_home)
        ahead = forecast(free, held, room, future, self.num_layers, store.page_size, knobs.horizon)
        if lacking := self.watermarks.lacking(ahead):
            residency.leave(slots[1:], lacking)
        return min(self.watermarks.spare(ahead), store.num_free_pages)

    def _carefree(self, num_rows: int) -> int:
        """Decode steps of so many rows after which no forecast can be below the low watermark, though nobody ends;
        negative: it can be now."""
        size, pages = self.store.page_size, max(1, num_rows * self.num_layers)  # that begin in page_size steps
        spare = (self.store.num_free_pages - self.watermarks.low) // pages
        return (spare - cdiv(self.knobs.horizon, size)) * size if self.knobs.forecast else MANY

    def _from_host(self, away: np.ndarray, at_home: np.ndarray, spare: int) -> tuple[np.ndarray, int]:
        """Parked sequences that decode beside those `at_home`, and how many were preempted for them. What the link can
        do meanwhile goes first to layers that come home, into at most `spare` pages; then to rows that are streamed."""
        hidden = self._hidden_pages(at_home) if len(at_home) else np.inf
        hidden -= self.residency.come_home(away, min(spare, hidden))
        rows = self._streamed(away, hidden if len(at_home) else np.inf)
        if not len(at_home):
            return self._make_room(rows)
        while len(rows) and not self.store.can_grow(rows, self.state.cached[rows] + 1):
            rows = rows[:-1]
        self.store.grow(rows, self.state.cached[rows] + 1)
        return rows, 0

    def _streamed(self, away: np.ndarray, hidden: float) -> np.ndarray:
        """Those of sequences `away` that decode now, in turn: whose objective is at stake, or whose pages are at most
        `hidden` together, as far as the transient pages reach."""
        mode, pages = self.knobs.stream, self.residency.parked_pages(away)  # [n, L]
        need, total = pages.max(1), pages.sum(1)
        if mode == "always":
            hidden = np.inf
        elif mode != "hidden" and np.isfinite(hidden):
            hidden = 0
        allowed = self.foresight.allowed(self._now, away)
        urgent = (allowed >= 0) & (allowed < self._stake()) & (mode != "never")
        order = np.lexsort((self._turn[away], ~urgent))
        order = order[urgent[order] | (total[order] <= hidden)]
        fits = np.cumsum(need[order]) <= self.store.transient_pages
        taken = order[fits & (urgent[order] | (np.cumsum(total[order]) <= hidden))]
        return away[np.sort(taken)]

    def _stake(self) -> float:
        """Seconds of slack below which a parked sequence is streamed: it must not lose its objective, nor hold up the
        prompt that waits."""
        waiting = self.state.waiting
        return self.knobs.tpot_slo + (self.foresight.times.prefill(waiting.head.num_tokens) if waiting else 0.0)

    def _hidden_pages(self, slots: np.ndarray) -> float:
        """Pages that the link brings while these sequences decode."""
        seconds = self.foresight.times.decode(len(slots), int(self.state.length[slots].sum()))
        page = self.foresight.link.seconds_per_byte * self.state.page_bytes
        return seconds / page if page else np.inf

    def _make_room(self, rows: np.ndarray) -> tuple[np.ndarray, int]:
        """Maps pages for the next tokens of `rows`, oldest first. When they lack, layers of the newest leave and the
        newest rows wait for their pages; when nothing can leave any more, the newest is preempted. Returns the rows
        that go on, and how many were preempted."""
        state, store, residency, num_preempted = self.state, self.store, self.residency, 0
        while len(rows):
            lengths = state.cached[rows] + 1
            if store.holds(rows, lengths):
                break
            if store.can_grow(rows, lengths):
                store.grow(rows, lengths)
                break
            lacking = int(store.lacking(rows, lengths).sum()) * self.num_layers - store.num_free_pages
            missing = max(lacking, 1) - residency.leaving
            if self.knobs.layerwise and missing > 0:
                residency.leave(state.decodable()[1:], missing)
            if residency.leaving:
                while len(rows) and not store.can_grow(rows, state.cached[rows] + 1):
                    rows = rows[:-1]
                continue
            victim = state.victim(state.unfinished())
            state.preempt(victim, self.swap)
            num_preempted += 1
            rows = rows[rows != victim]
        return rows, num_preempted
