"""Layers of running sequences parked on the host: streamed, regathered, brought home, swapped; the tokens stay the
same."""

from collections import Counter
from functools import lru_cache

import numpy as np
import pytest

from engine.memory.parking import MAX_BLOCKS_PER_FETCH
from engine.request import SamplingParams
from engine.scheduler.vllm_v0 import VllmV0
from tests.engine.pattern_engine import finish, land_all, pattern_engine, serving
from tests.engine.pattern_executor import PAGE_BYTES
from tests.engine.pattern_model import MODEL
from tests.engine.tiny import SLIDING, WIDE, prompts, tiny_engine

LENGTHS, PARAMS = [90, 40, 65, 17, 33], SamplingParams(max_tokens=30, ignore_eos=True)


class ParksAtRandom(VllmV0):
    """`vllm_v0` that parks full pages of random layers of running sequences before each step, and brings some home."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rng = np.random.default_rng(0)
        self.homecomings = self.streamed = 0
        self.park = 0.3
        self.piece = 1000  # pages that leave at a time, at most

    def plan(self, now):
        state, store = self.state, self.state.store
        for slot in state.running.tolist():
            for layer in range(store.pool.num_layers):
                a, b = store.parked[slot, layer].tolist()
                owner = state.requests[slot].id
                landed = b > a and store.tier.extents(owner, layer)[-1].end == b
                counts = np.eye(store.pool.num_layers, dtype=int)[layer] * (b - a)
                if landed and store.tier.landed(owner) and self.rng.random() < 0.2 and store.pool.fits(counts):
                    store.bring_home(slot, layer)
                    self.homecomings += 1
                elif self.rng.random() < self.park:
                    full = int(state.cached[slot]) // store.page_size
                    store.park(layer, [slot], [owner], [min(full, int(store.sent[slot, layer]) + self.piece)])
        plan = super().plan(now)
        self.streamed += len(plan.streams)
        return plan


@lru_cache(None)
def alone(model):
    """Each prompt served alone, without a host tier."""
    plain = tiny_engine(model, num_pages=64, max_num_seqs=1, deterministic=True)
    return [plain.generate([p], PARAMS)[0] for p in prompts(LENGTHS)]


@pytest.mark.parametrize(
    "model, preemption, num_pages, async_depth",
    [(WIDE, "recompute", 40, 1), (WIDE, "recompute", 8, 1), (WIDE, "swap", 8, 0), (SLIDING, "swap", 8, 1)],
    ids=["room", "recompute", "swap", "sliding"],
)
def test_parked_layers_change_no_bit(model, preemption, num_pages, async_depth):
    engine = tiny_engine(
        model,
        num_pages=num_pages,
        policy=f"{__name__}:ParksAtRandom",
        host_pages=200,
        transient_pages=40,
        preemption=preemption,
        async_depth=async_depth,
        deterministic=True,
    )
    if num_pages == 8:
        engine.policy.park = 0.03  # seldom enough that the pool still runs out
    outputs = engine.generate(prompts(LENGTHS), PARAMS)
    assert engine.policy.streamed > 0 and (num_pages == 8 or engine.policy.homecomings > 0)
    assert num_pages > 8 or sum(o.metrics.num_preemptions for o in outputs) > 0
    for out, want in zip(outputs, alone(model), strict=True):
        assert out.token_ids == want.token_ids
        assert np.array_equal(out.logits, want.logits)
    drained(engine)


def drained(engine):
    """Every page and block is gone when the last copy has ended."""
    while engine.store.copies_in_flight:
        engine._account_copies(engine.executor.wait_for_copies())
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0


@pytest.mark.parametrize("async_depth", [0, 1])
def test_layers_parked_in_many_pieces_change_no_bit(async_depth):
    """Pages leave one by one, 22 of the longest prompt in each layer, and are put together while they are read."""
    engine = tiny_engine(
        WIDE, num_pages=160, page_size=4, policy=f"{__name__}:ParksAtRandom", host_pages=400, transient_pages=160,
        async_depth=async_depth, deterministic=True,
    )  # fmt: skip
    engine.policy.park, engine.policy.piece = 0.9, 1
    outputs = engine.generate(prompts(LENGTHS), PARAMS)
    for out, want in zip(outputs, alone(WIDE), strict=True):
        assert out.token_ids == want.token_ids and np.array_equal(out.logits, want.logits)
    landed = Counter(c.layer for r in engine.step_log for c in r.copies if c.out and c.transient and c.ok)
    assert set(landed) == {0, 1} and engine.policy.homecomings > 0
    drained(engine)


@pytest.mark.parametrize("failures", [0, 2])
def test_a_layer_parked_in_many_pieces_is_soon_fetched_in_few(failures):
    """Page by page all layers leave; the ninth piece has each put together. From the step after the new block has
    landed, no (step, layer) takes more than eight fetches. Its bytes are counted, and those of a copy that failed are
    not; nobody loses anything by it."""
    engine = pattern_engine(pages=20, host_pages=200)
    a, b = serving(engine, 40, 9)
    executor, end, landed_at = engine.executor, 0, None
    while a.slot >= 0:
        end = min(end + 1, 10)
        for layer in range(MODEL.num_layers):
            engine.store.park(layer, [a.slot], [a.id], [end])
        engine.step()
        while executor.lanes[True]:
            move = executor.lanes[True][0]
            fails = move.transient and failures > 0
            failures -= fails
            executor.land(True, ok=not fails)
        land_all(engine, False)
        if executor.regathered == MODEL.num_layers and landed_at is None:
            landed_at = len(executor.plans)
    finish(engine, a, b)
    counts = [[len(s.fetches) for s in plan.streams] for plan in executor.plans]
    assert max(max(c, default=0) for c in counts) > MAX_BLOCKS_PER_FETCH
    # The step in flight was planned before the engine heard of the landing.
    after = [n for c in counts[landed_at + 1 :] for n in c]
    assert after and max(after) <= MAX_BLOCKS_PER_FETCH
    regathered = [c for r in engine.step_log for c in r.copies if c.out and c.transient]
    moves = {m.block: len(m.pages) for plan in executor.plans for s in plan.streams for m in s.sends}
    assert len(regathered) == len(moves) and all(c.num_bytes == moves[c.block] * PAGE_BYTES * c.ok for c in regathered)
    assert a.lost == b.lost == 0
