"""What every policy plans over: waiting requests, running sequences as arrays by slot, and the store.

The arrays make a step's planning a handful of NumPy calls however many sequences run. Policies decide; this class only
keeps the books. No JAX here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np

from engine.config import MAX_SLOTS
from engine.memory.moves import Stream
from engine.memory.parking import ParkingStore
from engine.memory.store import KVStore
from engine.request import Phase, Request
from engine.scheduler.plan import Plan, Prefill
from engine.scheduler.queue import RequestQueue, rank
from engine.scheduler.sampling_rows import ROW, is_plain, need_sampler, sampling_row

NOBODY = np.empty(0, np.int32)
FROM_DEVICE = -1  # input token of a decode row: the last one sampled into its slot
ALL_FROM_DEVICE = np.full(MAX_SLOTS, FROM_DEVICE, np.int32)


class SchedulerState:
    """Queues and per-slot arrays; `[slots]` unless said otherwise.

    The arrays describe what is planned: a token counts from the plan that samples it, before its value is known, so the
    next step can be planned while this one runs. Values, stop tokens and outputs arrive later, with `Engine._account`.
    """

    def __init__(self, store: KVStore, order: str = "fcfs", page_bytes: int = 0, cost: Any = None):
        """`page_bytes`: of a page, all devices together, as copies count them. `cost`: a StepModel, for policies that
        are told to believe one."""
        n = store.num_slots
        self.store, self.page_bytes, self.cost = store, page_bytes, cost
        self.waiting = RequestQueue(order)
        self.swapped = RequestQueue(order)  # preempted with their KV on the host
        self.running = np.empty(0, np.int32)  # slots, oldest admission first
        self.requests: list[Request | None] = [None] * n
        self.length = np.zeros(n, np.int32)  # tokens: prompt, and output with what planned steps will sample
        self.cached = np.zeros(n, np.int32)  # tokens whose KV is written, or will be by planned steps
        self.prefill_length = np.zeros(n, np.int32)  # tokens to prefill: the prompt, and what was produced before
        self._inputs: dict[int, int] = {}  # by slot: input token of the next decode when the host has to give it
        self.limit = np.zeros(n, np.int32)  # length at which the request ends
        self.prompt_length = np.zeros(n, np.int32)
        self.number = np.zeros(n, np.int64)  # of the requests
        self.arrival = np.zeros(n)  # of the requests, seconds
        self.first_token = np.full(n, np.nan)  # when it was produced, seconds; NaN: not yet
        self.sampling = np.zeros(n, ROW)
        self.forced = np.zeros(n, bool)
        self.may_stop: set[int] = set()  # slots whose sequences a token may end before their limit
        self._special: set[int] = set()  # slots that are sampled or forced
        self._prefilling: set[int] = set()  # slots with tokens left to prefill
        self.tokens_left = 1  # until the first of the rows sampled last is at its limit; 0: some sequence may be there
        self.step = 0
        self._preempted = 0  # since the last plan

    def admit(self, request: Request, num_tokens: int | None = None, away: np.ndarray | None = None) -> int:
        """Takes a request out of the queue and gives it a slot, and pages for `num_tokens` of its tokens (None: all it
        has). Returns the slot.

        Args:
          away: bool [L]: layers whose pages are written for the host, in a store that parks (None: none).

        Raises:
          OutOfPages: it stays in the queue; test `store.fits` (`store.fits_away`) first.
        """
        assert request.in_flight == 0, "a policy may not admit what it preempted in the same plan"
        count = request.num_tokens if num_tokens is None else num_tokens
        if away is None:
            slot = self.store.open(count)
        else:
            slot = cast(ParkingStore, self.store).open_away(count, request.id, away)
        self.waiting.remove(request)
        self._seat(request, slot, cached=0, prefill_length=request.num_tokens)
        return slot

    def swap_in(self, request: Request) -> int:
        """Brings a swapped request's KV back, with a page for its next token; it decodes at once. Returns its slot.

        Raises:
          OutOfPages: test `store.can_swap_in` first.
        """
        assert request.in_flight == 0
        slot = self.store.swap_in(request.id, request.num_tokens)
        self.swapped.remove(request)
        # All but the newest token cached: it decodes. Less: the rest is prefilled.
        decodes = request.cached == request.num_tokens - 1
        self._seat(request, slot, request.cached, request.cached if decodes else request.num_tokens)
        if decodes:
            self._inputs[slot] = request.output[-1] if request.output else int(request.prompt[-1])
        return slot

    def _seat(self, request: Request, slot: int, cached: int, prefill_length: int) -> None:
        request.slot, request.phase = slot, Phase.RUNNING
        self.requests[slot] = request
        self.running = np.append(self.running, np.int32(slot))
        self.cached[slot], self.prefill_length[slot] = cached, prefill_length
        self.length[slot] = request.num_tokens
        self.prompt_length[slot] = len(request.prompt)
        self.number[slot] = request.number
        self.limit[slot] = request.max_length
        self.arrival[slot] = request.arrival
        self.first_token[slot] = request.token_times[0] if request.token_times else np.nan
        self.sampling[slot], self.forced[slot] = sampling_row(request), bool(request.params.forced_tokens)
        if cached < prefill_length:
            self._prefilling.add(slot)
        if not is_plain(request):
            self._special.add(slot)
        if request.may_stop:
            self.may_stop.add(slot)

    def prefill(self, slot: int, num_tokens: int | None = None) -> Prefill:
        """The next `num_tokens` tokens to prefill of a sequence (None: all that are left). Their pages are mapped."""
        request, start = self.requests[slot], int(self.cached[slot])
        assert request is not None
        left = int(self.prefill_length[slot]) - start
        count = left if num_tokens is None else num_tokens
        return Prefill(slot, start, request.tokens(start, start + count), samples=count == left)

    def unfinished(self) -> np.ndarray:
        """Running sequences with tokens left to compute: all but those that reach their limit with the tokens that
        steps in flight will bring. Slots, oldest admission first."""
        if self.tokens_left:
            return self.running
        slots = self.running[self.length[self.running] < self.limit[self.running]]
        self.tokens_left = int(len(slots) == len(self.running))
        return slots

    def decodable(self) -> np.ndarray:
        """Unfinished sequences that are prefilled. Slots, oldest admission first."""
        slots = self.unfinished()
        return slots[self.cached[slots] >= self.prefill_length[slots]] if self._prefilling else slots

    def victim(self, slots: np.ndarray) -> int:
        """Which of these sequences is preempted first: the one that would be last in the queue."""
        return max(self.owners(slots), key=lambda request: rank(request, self.waiting.order)).slot

    def owners(self, slots: Iterable[int]) -> list[Request]:
        """The requests that hold these slots."""
        requests: Any = self.requests
        return [requests[slot] for slot in (slots.tolist() if isinstance(slots, np.ndarray) else slots)]

    def release(self, slot: int) -> None:
        """Takes a sequence out of the running set and frees its slot and pages.

        Steps in flight may still read and write them; whatever reuses them runs after these steps on the device.
        """
        request = self.requests[slot]
        assert request is not None
        self.store.close(slot)
        self._unseat(request)

    def _unseat(self, request: Request) -> None:
        self.running = self.running[self.running != request.slot]
        self.requests[request.slot] = None
        self._special.discard(request.slot)
        self.may_stop.discard(request.slot)
        self._prefilling.discard(request.slot)
        self._inputs.pop(request.slot, None)
        request.slot = -1

    def preempt(self, slot: int, swap: bool = False) -> None:
        """Takes a running sequence's pages away. `swap`: its KV goes to the host if that has room; otherwise it is
        dropped and recomputed, when its turn comes again."""
        request = self.requests[slot]
        assert request is not None
        request.num_preemptions += 1
        self._preempted += 1
        if swap and self.store.can_swap_out(slot):
            request.num_swaps += 1
            request.cached = int(self.cached[slot])
            self.store.swap_out(slot, request.id)
            self._unseat(request)
            request.phase = Phase.SWAPPED
            self.swapped.push(request)
        else:
            self.release(slot)
            request.phase = Phase.WAITING
            self.waiting.push(request)

    def drop(self, request: Request) -> None:
        """Forgets a request that has ended, whatever it holds."""
        if request.phase is Phase.RUNNING:
            self.release(request.slot)
        elif request.phase is Phase.SWAPPED:
            self.swapped.remove(request)
            self.store.forget(request.id)
        else:
            self.waiting.remove(request)

    def lose(self, request: Request) -> None:
        """A copy of the request's KV failed: it is recomputed, and rows in flight do not count."""
        request.lost += 1
        request.in_flight = 0
        if request.phase is Phase.RUNNING:
            self.preempt(request.slot)
        elif request.phase is Phase.SWAPPED:
            self.swapped.remove(request)
            request.phase = Phase.WAITING
            self.waiting.push(request)

    def make_plan(self, decode: np.ndarray, prefills: list[Prefill]) -> Plan:
        """Packs a decision into a `Plan`. `decode`: slots whose last token's KV is written by this step; their pages
        are mapped already."""
        positions = self.cached[decode]
        self.cached[decode] = positions + 1
        tokens = self._input_tokens(decode) if self._inputs else ALL_FROM_DEVICE[: len(decode)]
        for prefill in prefills:
            self.cached[prefill.slot] += len(prefill.tokens)
        ends = [p.slot for p in prefills if p.samples]
        self._prefilling.difference_update(ends)
        rows = np.concatenate([decode, np.asarray(ends, np.int32)]) if ends else decode
        sampling, forced = self._special_rows(rows) if self._special else (None, None)
        self.length[rows] = length = self.length[rows] + 1
        if len(rows) and self.tokens_left:
            self.tokens_left = int(np.minimum.reduce(self.limit[rows] - length))
        plan = Plan(
            step=self.step + 1,
            decode_slots=decode,
            decode_tokens=tokens,
            decode_positions=positions,
            prefills=tuple(prefills),
            deltas=self.store.take_deltas(),
            streams=self._streams(decode, prefills) if self.store.parks else (),
            moves=self.store.take_moves(),
            sampling=sampling,
            forced=forced,
            num_preempted=self._preempted,
        )
        if not plan.empty:  # an empty one is never submitted
            self.step, self._preempted = plan.step, 0
        return plan

    def _input_tokens(self, slots: np.ndarray) -> np.ndarray:
        """What decode rows read, int32 [n]."""
        return np.array([self._inputs.pop(slot, FROM_DEVICE) for slot in slots.tolist()], np.int32)

    def _streams(self, decode: np.ndarray, prefills: list[Prefill]) -> tuple[Stream, ...]:
        return self.store.streams(np.concatenate([decode, [p.slot for p in prefills]]).astype(np.int32))

    def _special_rows(self, slots: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
        """How the next token of each of these sequences is sampled, and where it is forced; see `Plan`."""
        index = self.length[slots] - self.prompt_length[slots]  # which token of its request each row samples
        rows = self.sampling.take(slots)  # a copy; a tenth of the time of [slots]
        rows["index"] = index
        return rows if need_sampler(rows) else None, self._forced(slots, index)

    def _forced(self, slots: np.ndarray, index: np.ndarray) -> np.ndarray | None:
        if not self.forced[slots].any():
            return None
        forced = np.full(len(slots), -1, np.int32)
        for i, (request, at) in enumerate(zip(self.owners(slots), index.tolist(), strict=True)):
            if at < len(request.params.forced_tokens):
                forced[i] = request.params.forced_tokens[at]
        return forced

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
            assert self.length[slot] == request.num_tokens + request.in_flight
            # While prefilling nothing is sampled; after it all but the newest token is cached.
            prefilling = self.cached[slot] < self.prefill_length[slot]
            assert prefilling or self.cached[slot] == self.length[slot] - 1
        assert all(r.slot == -1 and r.phase is Phase.WAITING for r in self.waiting)
        assert all(r.slot == -1 and r.phase is Phase.SWAPPED for r in self.swapped)
