"""Invariant 4 on the tiny real engine: what a request gets beside others, and what it gets alone.

The plain run serves each prompt alone, in a large pool, without poison. One device, store and set of compiled programs
per model and page size serves under every policy: `variant` puts another engine around them.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from engine.config import SchedulerConfig
from engine.engine import Engine
from engine.request import SamplingParams
from engine.scheduler.policy import parks as policy_parks
from engine.scheduler.policy import token_budget
from tests.engine.tiny import DEEP, NARROW, SLIDING, WIDE, prompts, tiny_engine

OUTPUT = 12
MODELS = {m.name: m for m in (WIDE, DEEP, SLIDING, NARROW)}
POOLS = {1: 210, 16: 14, 64: 5}  # pages per layer: about three of the longer sequences, so that batches preempt
RELAXED = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
# Lengths on and around tile and page borders, from a small set so that plain runs are shared; steps between arrivals.
LOADS = st.lists(
    st.tuples(st.sampled_from([1, 15, 16, 17, 40, 63, 64, 65, 90]), st.integers(0, 3)), min_size=1, max_size=6
)
BUDGETS = st.sampled_from([None, 16, 40, 64])


@lru_cache(None)
def small_engine(name: str, page_size: int, deterministic: bool, chunk: int = 1, parks: bool = False) -> Engine:
    """Reused over examples: leftovers of one must not change the next. `parks`: layers can be parked."""
    pages = POOLS[page_size]
    options = {"deterministic": deterministic, "host_pages": 2 * pages, "chunk": chunk}
    return tiny_engine(MODELS[name], pages, page_size, transient_pages=pages * parks, **options)


def variant(engine: Engine, async_depth: int = 1, budget: int | None = None, **scheduler) -> Engine:
    """An engine around an idle one's device, store and programs, with other SchedulerConfig fields."""
    assert not engine.has_work()
    scheduler = replace(engine.config.scheduler, max_num_batched_tokens=budget, **scheduler)
    config = replace(engine.config, async_depth=async_depth, scheduler=scheduler)
    memory = replace(engine.memory, max_batched_tokens=token_budget(scheduler, engine.max_context))
    return Engine(engine.model_config, config, memory, engine.store, engine.executor, engine.clock)


@lru_cache(None)
def plain_engine(name: str, deterministic: bool) -> Engine:
    """What the plain run runs on."""
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
    assert engine.store.num_free_pages == engine.store.num_pages and engine.store.num_host_pages == 0
    return [done[i] for i in ids], sum(done[i].metrics.num_preemptions for i in ids)


def check_bit_identical(name: str, page_size: int, load, chunk: int = 1, **options) -> int:
    """Serves a load on a small deterministic engine, `variant(**options)`: every bit of every logit is as in the plain
    run. load: (prompt tokens, gap) pairs. Returns the number of preemptions."""
    lengths, gaps = zip(*load, strict=True)
    prompt_list = prompts(lengths)
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True)] * len(lengths)
    parks = policy_parks(SchedulerConfig(options.get("policy", "vllm_v0")))
    engine = variant(small_engine(name, page_size, True, chunk, parks), **options)
    outputs, preemptions = serve(engine, prompt_list, params, gaps)
    for prompt, out in zip(prompt_list, outputs, strict=True):
        tokens, logits = plain(name, tuple(prompt), True)
        assert tuple(out.token_ids) == tokens
        assert np.array_equal(out.logits, logits)
    return preemptions


def check_close(expected: np.ndarray, got: np.ndarray, tolerance: float = 2e-5) -> None:
    """Check (b) over all positions of one load. expected, got: float32 [n, V]; tolerance: of the largest logit."""
    tolerance = tolerance * np.abs(expected).max()
    assert np.abs(got - expected).max() <= tolerance
    best = np.sort(expected, -1)
    close = best[:, -1] - best[:, -2] < 2 * tolerance
    differs = got.argmax(-1) != expected.argmax(-1)
    assert not (differs & ~close).any() and differs.mean() <= 0.005
