"""Layers of running sequences parked on the host: streamed, brought home, swapped; the tokens stay the same."""

from functools import lru_cache

import numpy as np
import pytest

from engine.request import SamplingParams
from engine.scheduler.vllm_v0 import VllmV0
from tests.engine.tiny import SLIDING, WIDE, prompts, tiny_engine

LENGTHS, PARAMS = [90, 40, 65, 17, 33], SamplingParams(max_tokens=30, ignore_eos=True)


class ParksAtRandom(VllmV0):
    """`vllm_v0` that parks full pages of random layers of running sequences before each step, and brings some home."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rng = np.random.default_rng(0)
        self.homecomings = self.streamed = 0
        self.park = 0.3

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
                    store.park(layer, [slot], [owner], [int(state.cached[slot]) // store.page_size])
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
    while engine.store.copies_in_flight:
        engine._account_copies(engine.executor.wait_for_copies())
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0
