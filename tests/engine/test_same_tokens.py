"""Invariant 4: tokens do not depend on batching, preemption or page size.

(a) `deterministic=True`: logits bit-identical to the plain run's. (b) default buckets, teacher-forced: logits within
2e-5 of the largest, and other tokens only where the plain run's two best logits are closer than twice that.
The plain run serves each prompt alone, in a large pool, without poison.
"""

from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config import ModelConfig
from engine.request import SamplingParams
from tests.engine.tiny import NARROW, SLIDING, WIDE, prompts, tiny_engine

OUTPUT = 12
MODELS = {m.name: m for m in (WIDE, SLIDING, NARROW)}
POOLS = {1: 210, 16: 14, 64: 5}  # pages per layer: about three of the longer sequences, so that batches preempt


@lru_cache(None)
def engine_of(name: str, page_size: int, deterministic: bool, small: bool):
    """Engines are reused over examples: leftovers of one must not change the next."""
    num_pages = POOLS[page_size] if small else 2048 // page_size
    return tiny_engine(MODELS[name], num_pages, page_size, deterministic=deterministic)


@lru_cache(None)
def plain_engine(name: str, deterministic: bool):
    return tiny_engine(
        MODELS[name], num_pages=64, max_num_seqs=1, deterministic=deterministic, poison=False, debug_checks=False
    )


@lru_cache(None)
def plain(name: str, prompt: tuple[int, ...], deterministic: bool):
    """(tokens, logits [n, V]) of the prompt served alone."""
    (out,) = plain_engine(name, deterministic).generate([prompt], SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    return tuple(out.token_ids), out.logits


def serve(engine, prompt_list, params, gaps):
    """Serves the prompts, letting `gaps[i]` steps pass before prompt i arrives. Outputs in order, and preemptions."""
    ids, done = [], {}

    def step():
        done.update((o.request_id, o) for o in engine.step() if o.finished)

    for prompt, p, gap in zip(prompt_list, params, gaps, strict=True):
        for _ in range(gap):
            step()
        ids.append(engine.add_request(prompt, p))
    while engine.has_work():
        step()
    assert engine.store.num_free_pages == engine.store.num_pages
    return [done[i] for i in ids], sum(done[i].metrics.num_preemptions for i in ids)


# Lengths on and around tile and page borders, from a small set so that plain runs are shared.
LENGTHS = st.lists(st.sampled_from([1, 15, 16, 17, 40, 63, 64, 65, 90]), min_size=1, max_size=6)
LOADS = LENGTHS.flatmap(
    lambda ls: st.tuples(st.just(ls), st.lists(st.integers(0, 3), min_size=len(ls), max_size=len(ls)))
)
RELAXED = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def check_bit_identical(name, page_size, load):
    lengths, gaps = load
    prompt_list = prompts(lengths)
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True)] * len(lengths)
    outputs, _ = serve(engine_of(name, page_size, True, True), prompt_list, params, gaps)
    for prompt, out in zip(prompt_list, outputs, strict=True):
        tokens, logits = plain(name, tuple(prompt), True)
        assert tuple(out.token_ids) == tokens
        assert np.array_equal(out.logits, logits)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", ["wide", "sliding"])
@RELAXED
@given(load=LOADS)
def test_a_deterministic_logits_are_bit_identical(name, page_size, load):
    """Whatever the batch, the preemptions and the page size: every bit of every logit."""
    check_bit_identical(name, page_size, load)


@pytest.mark.long
@pytest.mark.parametrize("page_size", [1, 16, 64])
@settings(RELAXED, max_examples=100)
@given(load=LOADS)
def test_a_deterministic_logits_are_bit_identical_at_length(page_size, load):
    """The same, over many more loads."""
    check_bit_identical("sliding", page_size, load)


def check_close(expected: np.ndarray, got: np.ndarray, tolerance: float = 2e-5) -> None:
    """Check (b) over all positions of one load. expected, got: float32 [n, V]; tolerance: of the largest logit."""
    tolerance = tolerance * np.abs(expected).max()
    assert np.abs(got - expected).max() <= tolerance
    best = np.sort(expected, -1)
    close = best[:, -1] - best[:, -2] < 2 * tolerance
    differs = got.argmax(-1) != expected.argmax(-1)
    assert not (differs & ~close).any() and differs.mean() <= 0.005


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("name", ["wide", "sliding", "narrow"])
@RELAXED
@given(load=LOADS)
def test_b_teacher_forced_logits_are_close(name, page_size, load):
    """Default buckets: batch shapes differ from the plain run's, so sums differ in the last bits and no further."""
    lengths, gaps = load
    prompt_list = prompts(lengths)
    expected = [plain(name, tuple(p), False) for p in prompt_list]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, forced_tokens=t) for t, _ in expected]
    outputs, _ = serve(engine_of(name, page_size, False, True), prompt_list, params, gaps)
    assert [tuple(o.token_ids) for o in outputs] == [t for t, _ in expected]
    check_close(np.concatenate([e for _, e in expected]), np.concatenate([o.logits for o in outputs]))


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_small_pools_do_preempt(deterministic):
    """The loads above mean nothing if nobody is ever preempted."""
    engine = engine_of("wide", 16, deterministic, True)
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True)] * 4
    _, preemptions = serve(engine, prompts([63, 63, 63, 63]), params, [0] * 4)
    assert preemptions > 0


@pytest.mark.parametrize("chunk", [4, 32])
def test_chunks_do_not_change_tokens(chunk):
    """Pages owned in chunks: another placement, the same logits."""
    prompt_list = prompts([40, 65, 17])
    engine = tiny_engine(num_pages=64, chunk=chunk, deterministic=True)
    outputs = engine.generate(prompt_list, SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    for prompt, out in zip(prompt_list, outputs, strict=True):
        assert np.array_equal(out.logits, plain("wide", tuple(prompt), True)[1])


@pytest.mark.parametrize("budget", [16, 64])
def test_token_budgets_do_not_change_tokens(budget):
    """Prompts admitted over several steps, and one longer than the budget: the same logits."""
    prompt_list = prompts([90, 17, 40])
    engine = tiny_engine(num_pages=64, max_batched_tokens=budget, deterministic=True)
    outputs = engine.generate(prompt_list, SamplingParams(max_tokens=OUTPUT, ignore_eos=True))
    for prompt, out in zip(prompt_list, outputs, strict=True):
        assert np.array_equal(out.logits, plain("wide", tuple(prompt), True)[1])


def test_sampled_tokens_do_not_depend_on_the_batch():
    """A seeded request draws the same tokens alone and among greedy and sampled others, preempted or not."""
    prompt_list = prompts([40, 63, 63, 17])
    kinds = [{"temperature": 0.9, "seed": 5}, {}, {"temperature": 1.2, "top_k": 20}, {"temperature": 0.7, "top_p": 0.8}]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, **k) for k in kinds]
    together, preemptions = serve(engine_of("wide", 16, True, True), prompt_list, params, [0] * 4)
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
