"""What every policy promises, fuzzed: right tokens, legal plans, no leak, an end. `make conformance POLICY=...`"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conformance.loads import Arrival, run

ARRIVALS = st.builds(
    Arrival,
    prompt=st.sampled_from([1, 5, 15, 16, 17, 31, 40, 63, 80]),
    output=st.integers(1, 40),
    gap=st.sampled_from([0, 0, 1, 3]),
    priority=st.integers(0, 2),
    abort=st.sampled_from([None, None, None, 0, 2, 15]),
)
SETUPS = st.fixed_dictionaries(
    {
        "num_pages": st.sampled_from([24, 32, 48]),  # / 16 * page_size, for each layer
        "page_size": st.sampled_from([4, 16]),
        "num_slots": st.sampled_from([3, 8]),
        "max_batched_tokens": st.sampled_from([3, 17, 64, 4096]),
        "pages_per_chunk": st.sampled_from([1, 4]),
        "order": st.sampled_from(["fcfs", "sjf", "priority"]),
        "watermark": st.sampled_from([0.0, 0.1]),
    }
)
HOST_PAGES = st.sampled_from([2, 6, 64])


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("async_depth", [0, 1])
@settings(max_examples=30, deadline=None)
@given(load=st.lists(ARRIVALS, min_size=1, max_size=8), setup=SETUPS, host_pages=HOST_PAGES)
def test_any_load(policy, async_depth, preemption, load, setup, host_pages):
    """Small pools, all orders, aborts at any time; every token is a hash of what the pages hold."""
    if setup["page_size"] == 16:
        setup = {**setup, "num_pages": setup["num_pages"] // 4}
    if preemption == "swap":
        setup = {**setup, "host_pages": host_pages}
    run(policy, load, async_depth=async_depth, preemption=preemption, **setup)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_many_sequences(policy, preemption):
    """Two hundred requests at once, sixty-four slots, a pool for about twenty."""
    load = [Arrival(prompt=1 + 37 * i % 90, output=1 + 17 * i % 50, gap=int(i % 40 == 0)) for i in range(200)]
    host = {"host_pages": 300} if preemption == "swap" else {}
    run(policy, load, num_pages=100, num_slots=64, max_batched_tokens=256, preemption=preemption, async_depth=1, **host)
