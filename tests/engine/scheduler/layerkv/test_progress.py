"""However late copies land: parked layers do not go to and fro, and nobody is preempted again and again.

The state machine of `test_machine.py` has failures and moves of its own; here policies are left alone, so that what
they do can be bounded.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import LayerKVConfig
from engine.request import SamplingParams
from tests.engine.pattern_engine import finish, pattern_engine
from tests.engine.pattern_model import MODEL

KNOBS = st.builds(
    LayerKVConfig,
    layerwise=st.sampled_from([True, True, True, False]),
    chunked=st.booleans(),
    retained_layers=st.sampled_from([None, None, 0, 1, 2, 3]),
    overlap=st.booleans(),
    stream=st.sampled_from(["hidden", "urgent", "always", "never"]),
    slo_rule=st.booleans(),
    tpot_slo=st.sampled_from([0.5, 1.5, 100.0]),
    lengths=st.sampled_from(["quantile", "oracle"]),
    forecast=st.booleans(),
)
SETUPS = st.fixed_dictionaries(
    {
        "pages": st.sampled_from([20, 30]),
        "chunk": st.sampled_from([1, 1, 4]),
        "host_pages": st.sampled_from([30, 90, 300]),
        "num_slots": st.integers(3, 6),
        "preemption": st.sampled_from(["recompute", "swap"]),
        "order": st.sampled_from(["fcfs", "sjf", "priority"]),
        "async_depth": st.integers(0, 1),
        "streamed": st.sampled_from([1, 2, None]),
        "watermark": st.sampled_from([0.0, 0.1]),
        "layerkv": KNOBS,
    }
)
REQUESTS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20), st.integers(0, 2)), min_size=3, max_size=14)
CHANCES = st.sampled_from([0.02, 0.1, 0.5, 1.0])  # that a copy lands before the next step
MOST = 2 * MODEL.num_layers + 2  # plans in a row that only move pages: layers leave one after the other


def check(policy, setup, requests, chance, rng) -> None:
    """Serves all of them: right tokens, few plans in a row that compute nothing, and no request is preempted more often
    than there are others to come before it."""
    engine = pattern_engine(policy=policy, **setup)
    executor, live, idle = engine.executor, [], 0
    for i, (prompt, output, priority) in enumerate(requests):
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        engine.add_request([i] * prompt, params, request_id=str(i), priority=priority)
        live.append(engine._live[str(i)])
    while engine._live:
        for out in (True, False):
            while executor.lanes[out] and rng.random() < chance:
                executor.land(out)
        before = len(executor.plans)
        engine.step()
        for plan in executor.plans[before:]:
            idle = 0 if plan.num_sampled or plan.prefills else idle + 1
            assert idle <= MOST, "pages move, and nobody computes"
    finish(engine, *live)
    assert max(request.num_preemptions for request in live) <= len(live)


LOADS = {"setup": SETUPS, "requests": REQUESTS, "chance": CHANCES, "rng": st.randoms(use_true_random=False)}
POLICIES = pytest.mark.parametrize("policy", ["layerkv", "paged_park"])


@POLICIES
@settings(max_examples=100, deadline=None)
@given(**LOADS)
def test_pages_move_so_that_somebody_can_compute(policy, **load):
    """Small pools, all knobs."""
    check(policy, **load)


@pytest.mark.long
@POLICIES
@settings(max_examples=1000, deadline=None)
@given(**LOADS)
def test_pages_move_so_that_somebody_can_compute_at_length(policy, **load):
    """The same, over many more loads."""
    check(policy, **load)
