"""An executor without a model: a page holds what was written into it, and every read is checked.

The KV of a token in a layer is one number made of (request, layer, position). A step does to the arena what the real
executor's programs do, in their order; then each row reads all tokens of its sequence, through a page table made of
deltas alone, and every one must be that sequence's own. Sampled tokens are hashes of (prompt, seed, position), so they
cannot depend on the schedule. Copies land, and everything fails, when the test says so.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.memory.moves import Copy, Move
from engine.memory.slots import NOT_WANTED, SlotStore
from engine.request import Request
from engine.scheduler.plan import Plan, StepResult
from tests.engine.pattern_model import EMPTY, LOST, patterns, sampled_token, sequence_token

PAGE_BYTES = 100


class Injected(Exception):
    """A failure that the test asked for."""


class StepClock:
    """As many seconds as steps have taken."""

    time = 0.0

    def now(self) -> float:
        """Seconds."""
        return self.time


@dataclass(frozen=True)
class Row:
    """Tokens of one sequence in a step."""

    slot: int
    request: Request
    start: int
    tokens: list[int]
    samples: bool

    @property
    def end(self) -> int:
        """Tokens in the cache after the step."""
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class Ticket:
    """A submitted step."""

    plan: Plan
    last_tokens: np.ndarray
    start: float


class PatternExecutor:
    """Implements `Executor`. `requests`: whose each slot is, so that it knows what a read must find."""

    def __init__(self, store: SlotStore, clock: StepClock, transient_pages: int):
        self.clock, self.page_size, self.num_layers, self.view = clock, store.page_size, store.num_layers, store.view
        self.requests: list[Request | None] = []
        self.serials: dict[Request, int] = {}
        self.transient = store.arena_pages  # the first transient page
        self.arena = np.full((self.transient + transient_pages, store.page_size), EMPTY, np.int64)  # [P, S]
        self.table = np.zeros((self.num_layers, store.num_slots, store.table_width), np.int32)
        self.last_tokens = np.zeros(store.num_slots, np.int64)
        self.blocks: dict[int, np.ndarray] = {}  # int64 [n, S]
        self.lanes: dict[bool, deque[Move]] = {True: deque(), False: deque()}  # copies in flight, by `out`
        self.fail: set[str] = set()  # poison | submit | half way | collect: where the next call raises
        self.fail_start = {True: 0, False: 0}  # how many of the next copies fail, by `out`
        self.seconds: Callable[[Plan], float] = lambda plan: 1.0  # that a step takes
        self.page_seconds = 0.0  # that a copy takes for each page
        self.wait_lands = True, True  # `out` of the copy that ends first when the engine waits, and whether it is ok
        self.ended: list[Copy] = []  # not reported yet
        self.begun: list[Move] = []  # of the last step submitted
        self.plans: list[Plan] = []
        self.progress = 0  # steps collected and copies reported
        self.regathered = 0  # blocks that landed

    def submit(self, plan: Plan) -> Ticket:
        """Copies out; table; then for each layer copies in, writes, reads, and what is regathered leaves."""
        self.begun = []
        self._maybe_fail("submit")
        self.plans.append(plan)
        for move in plan.moves:
            if move.out:
                self._send(move)
        self._apply(plan.deltas)
        self.arena[self.transient :] = EMPTY
        rows = self._rows(plan)
        good = [self._knows_its_input(row) for row in rows]
        for layer in range(self.num_layers):
            if layer == self.num_layers // 2:
                self._maybe_fail("half way")
            for move in plan.all_moves:
                if not move.out and move.layer == layer:
                    self._fetch(move)
            parked = {row[0]: row[1:] for s in plan.streams if s.layer == layer for row in s.rows.tolist()}
            for row, ok in zip(rows, good, strict=True):
                self._write(layer, row, ok, parked.get(row.slot))
            good = [self._read(layer, row, parked.get(row.slot)) and ok for row, ok in zip(rows, good, strict=True)]
            for stream in plan.streams:
                for move in stream.sends if stream.layer == layer else ():
                    self._send(move)
        self._sample(plan, rows, good)
        start, self.clock.time = self.clock.time, self.clock.time + self.seconds(plan)
        return Ticket(plan, self.last_tokens.copy(), start)

    def collect(self, ticket: Ticket) -> StepResult:
        """Tokens, and the copies that have ended."""
        self._maybe_fail("collect")
        self.progress += 1
        tokens = ticket.last_tokens[ticket.plan.sampled_slots].astype(np.int32)
        return StepResult(tokens, None, ticket.start, self.clock.time, copies=self._report())

    def abandon(self, moves: tuple[Move, ...]) -> tuple[Copy, ...]:
        """Moves that were not begun have failed."""
        for move in moves:
            if not any(move is begun for begun in self.begun):
                self._end(move, ok=False)
        return self._report()

    def wait_for_copies(self) -> tuple[Copy, ...]:
        """Lands the copy that `wait_lands` says, if none has ended."""
        if not self.ended:
            out, ok = self.wait_lands
            self.land(out if self.lanes[out] else not out, ok)
        return self._report()

    def drop(self, blocks: tuple[int, ...]) -> None:
        """A block goes only when no copy reads or writes it."""
        busy = {move.block for lane in self.lanes.values() for move in lane}
        assert not busy & set(blocks), "a block is dropped under a copy"
        for block in blocks:
            self.blocks.pop(block, None)  # not there when its copy failed

    def poison(self, mask: np.ndarray) -> None:
        """Nobody may read these pages before they are written."""
        self._maybe_fail("poison")
        self.arena[mask] = EMPTY

    def land(self, out: bool, ok: bool = True) -> None:
        """The oldest copy of a lane ends. A copy in that fails was never written: say so with `fail_start`."""
        move = self.lanes[out].popleft()
        if out and not ok:
            del self.blocks[move.block]
        self._end(move, ok or not out)

    def _maybe_fail(self, where: str) -> None:
        if where in self.fail:
            self.fail.remove(where)
            raise Injected(where)

    def _end(self, move: Move, ok: bool) -> None:
        num_bytes, now, took = len(move.pages) * PAGE_BYTES * ok, self.clock.time, len(move.pages) * self.page_seconds
        self.regathered += ok and move.out and move.transient
        which = move.out, move.block, move.layer
        self.ended.append(Copy(*which, ok, num_bytes, now - took, now, move.owners, move.transient))

    def _report(self) -> tuple[Copy, ...]:
        copies, self.ended = tuple(self.ended), []
        self.progress += len(copies)
        return copies

    def _start(self, move: Move) -> bool:
        self.begun.append(move)
        if self.fail_start[move.out]:
            self.fail_start[move.out] -= 1
            self._end(move, ok=False)
            return False
        self.lanes[move.out].append(move)
        return True

    def _send(self, move: Move) -> None:
        pages = move.pages + (self.transient if move.transient else 0)
        assert (pages > 0).all() and move.block not in self.blocks, "a block is written once"
        if self._start(move):
            self.blocks[move.block] = self.arena[pages]

    def _fetch(self, move: Move) -> None:
        assert all(move.block != m.block for m in self.lanes[True]), "a block is fetched before it has landed"
        block, wanted = self.blocks[move.block], move.pages != NOT_WANTED
        pages = move.pages[wanted] + (self.transient if move.transient else 0)
        assert len(block) == len(move.pages) and (pages > 0).all()
        self.arena[pages] = block[wanted] if self._start(move) else LOST

    def _apply(self, deltas: np.ndarray) -> None:
        where, first = np.unique(deltas[:, :3], axis=0, return_index=True)
        layer, slot, index = where.T
        self.table[layer, slot, index] = deltas[first, 3]
        layer, slot, index, page = deltas.T
        assert (self.table[layer, slot, index] == page).all(), "deltas contradict each other: a scatter has no order"

    def _rows(self, plan: Plan) -> list[Row]:
        rows = []
        columns = plan.decode_slots, plan.decode_positions, plan.decode_tokens
        for slot, position, token in zip(*(c.tolist() for c in columns), strict=True):
            rows.append((slot, position, [token if token >= 0 else int(self.last_tokens[slot])], True))
        rows += [(p.slot, p.start, p.tokens.tolist(), p.samples) for p in plan.prefills]
        assert len({slot for slot, *_ in rows}) == len(rows), "a sequence has two rows in a step"
        return [Row(slot, self.requests[slot], *rest) for slot, *rest in rows]

    def _lost_is_reported(self) -> bool:
        """Whether the engine has heard of every copy in that failed: from then on nothing may come of them."""
        return not any(not copy.ok and not copy.out for copy in self.ended)

    def _knows_its_input(self, row: Row) -> bool:
        """Input tokens are the sequence's own, but for one sampled from KV that was lost."""
        expected = [sequence_token(row.request, p) for p in range(row.start, row.end)]
        if row.tokens == expected:
            return True
        assert row.tokens == [LOST] and not self._lost_is_reported(), f"{row} should have the input {expected}"
        return False

    def _where(self, layer: int, slot: int, positions: np.ndarray, parked: list[int] | None = None):
        """Page and place in it of each position. `parked`: [a, b) and the first transient page of these."""
        index = positions // self.page_size
        pages = self.table[layer, slot, 0] + index if self.view == "run" else self.table[layer, slot, index]
        if parked is not None:
            a, b, first = parked
            pages = np.where((index >= a) & (index < b), index - a + first + self.transient, pages)
        assert (pages > 0).all(), "a token has no page"
        return pages, positions % self.page_size

    def _pattern(self, layer: int, row: Row, positions: np.ndarray) -> np.ndarray:
        return patterns(self.serials.setdefault(row.request, len(self.serials)), layer, positions)

    def _write(self, layer: int, row: Row, good: bool, parked: list[int] | None) -> None:
        """Pages of layers that are away are transient ones when they are written, too."""
        where = self._where(layer, row.slot, positions := np.arange(row.start, row.end), parked)
        self.arena[where] = self._pattern(layer, row, positions) if good else LOST

    def _read(self, layer: int, row: Row, parked: list[int] | None) -> bool:
        """Checks all tokens of a row's sequence. False when some were lost with a copy, unknown to the engine yet."""
        positions = np.arange(row.end)
        found = self.arena[self._where(layer, row.slot, positions, parked)]
        wrong = np.flatnonzero(found != self._pattern(layer, row, positions))
        if len(wrong):
            assert (found[wrong] == LOST).all() and not self._lost_is_reported(), (
                f"{row} reads {found[wrong[0]]:#x} at position {wrong[0]} of layer {layer}"
            )
        return not len(wrong)

    def _sample(self, plan: Plan, rows: list[Row], good: list[bool]) -> None:
        self.last_tokens = self.last_tokens.copy()  # tickets keep the one before
        sampled = [(row, ok) for row, ok in zip(rows, good, strict=True) if row.samples]
        for i, (row, ok) in enumerate(sampled):
            seed, key = 0, None if plan.sampling is None else plan.sampling[i]
            if key is not None and key["temperature"] > 0:
                assert key["index"] == row.end - len(row.request.prompt), "another token's sampling key"
                seed = int(key["seed"])
            token = sampled_token(row.request.prompt, seed, row.end)
            if plan.forced is not None and plan.forced[i] >= 0:
                token = int(plan.forced[i])
            self.last_tokens[row.slot] = token if ok else LOST
