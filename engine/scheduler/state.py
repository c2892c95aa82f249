"""What every policy plans over: waiting requests, running sequences as arrays by slot, and the store.

The arrays make a step's planning a handful of NumPy calls however many sequences run. Policies decide; this class only
keeps the books. No JAX here.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from engine.memory.store import KVStore
from engine.request import Phase, Request
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.sampling_rows import ROW, need_sampler, sampling_row

NO_STOP, MANY_STOPS = -1, -2  # values of `stop` besides a token id


class SchedulerState:
    """Queues and per-slot arrays; `[slots]` unless said otherwise."""

    def __init__(self, store: KVStore):
        n = store.num_slots
        self.store = store
        self.waiting: deque[Request] = deque()
        self.running = np.empty(0, np.int32)  # slots, oldest admission first
        self.requests: list[Request | None] = [None] * n
        self.length = np.zeros(n, np.int32)  # tokens known: prompt and output
        self.cached = np.zeros(n, np.int32)  # tokens whose KV is written, or will be by planned steps
        self.limit = np.zeros(n, np.int32)  # length at which the request ends
        self.stop = np.full(n, NO_STOP, np.int32)  # its stop token when it has one
        self.prompt_length = np.zeros(n, np.int32)
        self.sampling = np.zeros(n, ROW)
        self.forced = np.zeros(n, bool)
        self.step = 0

    def admit(self, request: Request) -> Prefill:
        """Gives the request a slot and pages for all tokens it has, and returns its whole-prompt prefill.

        Raises:
          OutOfPages: test `store.fits` first.
        """
        tokens = request.all_tokens()
        slot = self.store.open(len(tokens))
        request.slot, request.phase = slot, Phase.RUNNING
        self.requests[slot] = request
        self.running = np.append(self.running, np.int32(slot))
        self.length[slot] = self.cached[slot] = len(tokens)
        self.prompt_length[slot] = len(request.prompt)
        self.limit[slot] = request.max_length
        stops = request.stop_ids
        self.stop[slot] = NO_STOP if not stops else MANY_STOPS if len(stops) > 1 else next(iter(stops))
        self.sampling[slot], self.forced[slot] = sampling_row(request), bool(request.params.forced_tokens)
        return Prefill(slot, 0, tokens, samples=True)

    def release(self, slots: np.ndarray) -> None:
        """Takes sequences out of the running set and frees their slots and pages."""
        if not len(slots):
            return
        self.running = self.running[~np.isin(self.running, slots)]
        for slot in slots.tolist():
            self.store.close(slot)
            request = self.requests[slot]
            assert request is not None
            request.slot = -1
            self.requests[slot] = None

    def preempt(self, slot: int) -> None:
        """Drops a running sequence's KV; it goes to the head of the queue and will be recomputed."""
        request = self.requests[slot]
        assert request is not None
        self.release(np.array([slot], np.int32))
        request.phase = Phase.WAITING
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def make_plan(self, decode: np.ndarray, prefills: list[Prefill], num_preempted: int = 0) -> Plan:
        """Packs a decision into a `Plan`. `decode`: slots whose last token's KV is written by this step; their pages
        are mapped already."""
        positions = self.cached[decode]
        self.cached[decode] += 1
        ends = [p.slot for p in prefills if p.samples]
        rows = np.concatenate([decode, np.asarray(ends, np.int32)]) if ends else decode
        self.step += 1
        return Plan(
            step=self.step,
            decode_slots=decode,
            decode_positions=positions,
            prefills=tuple(prefills),
            deltas=self.store.take_deltas(),
            sampling=self._sampling(rows),
            forced=self._forced(rows),
            num_preempted=num_preempted,
        )

    def _sampling(self, slots: np.ndarray) -> np.ndarray | None:
        rows = self.sampling.take(slots)  # a copy; a tenth of the time of [slots]
        rows["index"] = self.length[slots] - self.prompt_length[slots]
        return rows if need_sampler(rows) else None

    def _forced(self, rows: np.ndarray) -> np.ndarray | None:
        if not self.forced[rows].any():
            return None
        forced = np.full(len(rows), -1, np.int32)
        for i, slot in enumerate(rows.tolist()):
            request = self.requests[slot]
            assert request is not None
            script = request.params.forced_tokens
            if len(request.output) < len(script):
                forced[i] = script[len(request.output)]
        return forced

    def append(self, slots: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Records one new token per slot. Returns who ends with it: 0 goes on, 1 stop token, 2 length."""
        self.length[slots] += 1
        ended = np.where(self.length[slots] >= self.limit[slots], 2, 0)
        too_early = self.length[slots] - self.prompt_length[slots] <= self.sampling["min_tokens"][slots]
        stop = np.where(too_early, NO_STOP, self.stop[slots])  # forced tokens can be stop tokens
        ended[tokens == stop] = 1
        for i in np.flatnonzero(stop == MANY_STOPS).tolist():
            request = self.requests[slots[i]]
            assert request is not None
            if int(tokens[i]) in request.stop_ids:
                ended[i] = 1
        return ended

    def check(self) -> None:
        """Asserts that queues, slots and store agree (debug mode and tests)."""
        self.store.check()
        # No step may touch what is not mapped: JAX would clamp the page id silently.
        assert not self.store.lacking(self.running, self.cached[self.running]).any(), "a planned token has no page"
        held = [s for s, r in enumerate(self.requests) if r is not None]
        assert sorted(self.running.tolist()) == held, "running set and slots disagree"
        assert self.store.num_slots - self.store.num_free_slots == len(held), "a slot is held by nobody"
        for slot in held:
            request = self.requests[slot]
            assert request is not None and request.slot == slot and request.phase is Phase.RUNNING
            assert self.length[slot] == request.num_tokens
            # Decoding: all but the newest token is cached.
            assert self.cached[slot] in (self.length[slot] - 1, self.length[slot])
        assert all(r.slot == -1 and r.phase is Phase.WAITING for r in self.waiting)
