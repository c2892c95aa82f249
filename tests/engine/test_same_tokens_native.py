"""Invariant 4 over stores: `native` gives the tokens of `paged`, whose plain run serves each prompt alone.

(a) and (b) as in `test_same_tokens.py`. Growth never fails in the native store, so nothing there preempts by itself;
the policy here does it all the time.
"""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given

from engine.request import SamplingParams
from engine.scheduler.state import NOBODY
from tests.engine.identity import LOADS, MODELS, OUTPUT, RELAXED, check_close, plain, serve
from tests.engine.test_fuzz import CompileCount
from tests.engine.tiny import NARROW, prompts, tiny_engine

CONTEXT = 112  # the longest prompt and its output


class Restless:
    """Admits what fits, brings back what was swapped, and preempts the youngest in every fifth step."""

    mixes = False

    def __init__(self, config, state, max_batched_tokens):
        self.state, self.swap, self.steps = state, config.preemption == "swap", 0

    def plan(self, now):
        state = self.state
        self.steps += 1
        decode = state.decodable()
        if self.steps % 5 == 0 and len(decode) > 1:
            state.preempt(int(decode[-1]), swap=self.swap)
            decode = decode[:-1]
        else:
            prefills = []
            while state.waiting and state.store.fits(state.waiting.head.num_tokens):
                prefills.append(state.prefill(state.admit(state.waiting.head)))
            if prefills:
                return state.make_plan(NOBODY, prefills)
            back = []
            while state.swapped and state.store.can_swap_in(state.swapped.head.id, state.swapped.head.num_tokens):
                back.append(state.swap_in(state.swapped.head))
            decode = np.concatenate([decode, np.array(back, np.int32)])
        state.store.grow(decode, state.length[decode])
        return state.make_plan(decode, [])


@lru_cache(None)
def native_engine(name: str, page_size: int, deterministic: bool, preemption: str, async_depth: int):
    """Three reservations for four slots asked for. Engines are reused over examples."""
    return tiny_engine(
        MODELS[name],
        num_pages=3 * -(-CONTEXT // page_size),
        page_size=page_size,
        store="native",
        max_context=CONTEXT,
        policy=f"{__name__}:Restless",
        host_pages=3 * -(-CONTEXT // page_size),
        preemption=preemption,
        deterministic=deterministic,
        async_depth=async_depth,
    )


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("name, page_size, async_depth", [("wide", 1, 1), ("sliding", 16, 0), ("sliding", 64, 1)])
@RELAXED
@given(load=LOADS)
def test_a_native_logits_are_bit_identical(name, page_size, async_depth, preemption, load):
    """One tile body for both views: every bit of every logit."""
    lengths, gaps = zip(*load, strict=True)
    prompt_list = prompts(lengths)
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True)] * len(lengths)
    engine = native_engine(name, page_size, True, preemption, async_depth)
    outputs, _ = serve(engine, prompt_list, params, gaps)
    for prompt, out in zip(prompt_list, outputs, strict=True):
        tokens, logits = plain(name, tuple(prompt), True)
        assert tuple(out.token_ids) == tokens
        assert np.array_equal(out.logits, logits)


@pytest.mark.parametrize("name, page_size, async_depth", [("narrow", 64, 1), ("sliding", 1, 0)])
@RELAXED
@given(load=LOADS)
def test_b_native_teacher_forced_logits_are_close(name, page_size, async_depth, load):
    """Default buckets."""
    lengths, gaps = zip(*load, strict=True)
    prompt_list = prompts(lengths)
    expected = [plain(name, tuple(p), False) for p in prompt_list]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=t) for t, _ in expected]
    outputs, _ = serve(native_engine(name, page_size, False, "swap", async_depth), prompt_list, params, gaps)
    assert [tuple(o.token_ids) for o in outputs] == [t for t, _ in expected]
    check_close(np.concatenate([e for _, e in expected]), np.concatenate([o.logits for o in outputs]))


@pytest.mark.parametrize("async_depth", [0, 1])
def test_swapped_sequences_do_move(async_depth):
    """The loads above mean nothing if nobody goes to the host and comes back; nor if their step records say nothing."""
    engine = native_engine("wide", 16, True, "swap", async_depth)
    engine.step_log.clear()
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True)] * 4
    _, preemptions = serve(engine, prompts([63] * 4), params, [0] * 4)
    log, total = list(engine.step_log), engine.store.num_pages
    assert preemptions > 0 and min(sum(s.bytes_out for s in log), sum(s.bytes_in for s in log)) > 0
    reserved = [s for s in log if s.num_running == 3 and s.free_pages == 0]
    assert reserved and all(0 < s.mapped_pages < total for s in reserved), "reservations are not free, nor all in use"


def test_a_native_engine_compiles_nothing_after_warm_up():
    """Prefill, decode, preemption by swap and back."""
    engine = tiny_engine(
        NARROW, num_pages=16, max_context=128, store="native", policy=f"{__name__}:Restless", host_pages=16,
        preemption="swap", max_num_seqs=2, max_tiles=2, poison=False, capture_logits=False,
    )  # fmt: skip
    compiles = CompileCount()
    engine.warmup()
    assert compiles.n > 10
    compiles.n = 0
    params = [SamplingParams(max_tokens=20, ignore_eos=True)] * 5
    _, preemptions = serve(engine, prompts([5, 60, 17, 33, 90]), params, [0, 2, 1, 0, 4])
    assert preemptions > 0 and compiles.n == 0
