"""Invariant 4: tokens do not depend on policy, batching, preemption, token budget, asynchrony or page size.

(a) `deterministic=True`: logits bit-identical to the plain run's. (b) default buckets, teacher-forced: logits within
2e-5 of the largest, and other tokens only where the plain run's two best logits are closer than twice that.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.request import SamplingParams
from tests.engine.identity import (
    BUDGETS,
    LOADS,
    OUTPUT,
    RELAXED,
    check_bit_identical,
    check_close,
    plain,
    plain_engine,
    serve,
    small_engine,
    variant,
)
from tests.engine.tiny import WIDE, prompts, tiny_engine

POLICIES = ["vllm_v0", "vllm_v1", "chunked"]
PREEMPTIONS = st.sampled_from(["recompute", "swap"])
CACHES = st.sampled_from([("wide", 16), ("sliding", 1), ("sliding", 64)])  # model, page size
FULL_POOL = [(63, 0)] * 4  # three fit


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", POLICIES)
@settings(RELAXED, max_examples=6)
@given(cache=CACHES, budget=BUDGETS, load=LOADS)
def test_a_deterministic_logits_are_bit_identical(policy, preemption, async_depth, cache, budget, load):
    """Whatever the batch, the chunks, the preemptions and the page size: every bit of every logit."""
    options = {"policy": policy, "preemption": preemption, "async_depth": async_depth, "budget": budget}
    check_bit_identical(*cache, load, **options)


@pytest.mark.long
@pytest.mark.parametrize("policy", POLICIES)
@settings(RELAXED, max_examples=100)
@given(cache=CACHES, preemption=PREEMPTIONS, async_depth=st.integers(0, 1), budget=BUDGETS, load=LOADS)
def test_a_deterministic_logits_are_bit_identical_at_length(policy, cache, load, **options):
    """The same, over many more loads."""
    check_bit_identical(*cache, load, policy=policy, **options)


@pytest.mark.parametrize("async_depth", [0, 1])
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_small_pools_do_preempt(policy, preemption, async_depth):
    """The loads above mean nothing if nobody is ever preempted."""
    assert check_bit_identical("wide", 16, FULL_POOL, policy=policy, preemption=preemption, async_depth=async_depth) > 0


@pytest.mark.parametrize("name, page_size", [("sliding", 16), ("narrow", 1)])
@RELAXED
@given(
    policy=st.sampled_from(POLICIES),
    preemption=PREEMPTIONS,
    async_depth=st.integers(0, 1),
    budget=BUDGETS,
    load=LOADS,
)
def test_b_teacher_forced_logits_are_close(name, page_size, load, **options):
    """Default buckets: batch shapes differ from the plain run's, so sums differ in the last bits and no further."""
    lengths, gaps = zip(*load, strict=True)
    prompt_list = prompts(lengths)
    expected = [plain(name, tuple(p), False) for p in prompt_list]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=t) for t, _ in expected]
    outputs, _ = serve(variant(small_engine(name, page_size, False), **options), prompt_list, params, gaps)
    assert [tuple(o.token_ids) for o in outputs] == [t for t, _ in expected]
    check_close(np.concatenate([e for _, e in expected]), np.concatenate([o.logits for o in outputs]))


@pytest.mark.parametrize("chunk", [4, 32])
def test_chunks_do_not_change_tokens(chunk):
    """Pages owned in chunks: another placement, the same logits."""
    prompt_list = prompts([40, 65, 17])
    engine = tiny_engine(num_pages=64, chunk=chunk, deterministic=True)
    outputs = engine.generate(prompt_list, SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    for prompt, out in zip(prompt_list, outputs, strict=True):
        assert np.array_equal(out.logits, plain("wide", tuple(prompt), True)[1])


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_under_pressure_do_not_change_tokens(policy, preemption):
    """Seven chunks of 4 pages for two layers: sequences are preempted, to the host too, and chunks change layers."""
    load = [*FULL_POOL, (90, 1), (17, 2)]
    budget = 72 if policy == "chunked" else None  # a prompt and a part of the next
    options = {"chunk": 4, "policy": policy, "preemption": preemption, "budget": budget}
    assert check_bit_identical("wide", 16, load, **options) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_sampled_tokens_do_not_depend_on_the_batch(policy):
    """A seeded request draws the same tokens alone and among greedy and sampled others, preempted or not."""
    prompt_list = prompts([40, 63, 63, 17])
    kinds = [{"temperature": 0.9, "seed": 5}, {}, {"temperature": 1.2, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8}]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, **k) for k in kinds]
    together, preemptions = serve(variant(small_engine("wide", 16, True), policy=policy), prompt_list, params, [0] * 4)
    (alone,) = plain_engine("wide", True).generate(prompt_list[:1], params[0])
    assert together[0].token_ids == alone.token_ids and preemptions > 0
    assert together[1].token_ids == list(plain("wide", tuple(prompt_list[1]), True)[0])


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 2**-6), ("float16", 2**-9)])
def test_a_16_bit_model_serves_the_same_batch_or_alone(dtype, tolerance):
    """Check (b) with the tolerance of that precision, about four times what was measured."""
    model: ModelConfig = WIDE.replace(name=f"wide-{dtype}", dtype=dtype)
    prompt_list = prompts([40, 65, 17])
    p = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    engine = tiny_engine(model, poison=False)
    alone = [engine.generate([x], p)[0] for x in prompt_list]
    forced = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=tuple(o.token_ids)) for o in alone]
    together = tiny_engine(model).generate(prompt_list, forced)
    expected, got = (np.concatenate([o.logits for o in outs]) for outs in (alone, together))
    check_close(expected, got, tolerance)
