"""Preemption to the host under each policy, worked out by hand (notation: `trace.py`). Pages hold 16 tokens."""

import pytest

from tests.engine.scheduler.trace import traced


def swap(policy, num_pages=6, host_pages=8, **setup):
    return traced(policy=policy, num_pages=num_pages, host_pages=host_pages, preemption="swap", **setup)


def test_v0_swaps_the_youngest_and_decodes_it_when_it_is_back():
    """A and B fill 6 pages. A's growth sends B out; while B is out, C is not admitted although it would fit. B comes
    back when A is done and decodes in the same step; C's prompt interrupts it in the next."""
    t = swap("vllm_v0")
    t.add("A", 48, 3)
    t.add("B", 48, 3)
    t.add("C", 16, 1)
    assert t.run() == ["A+48 B+48", "A >B", "A", "B <B", "C+16", "B"]


def test_a_full_host_tier_means_recomputing():
    """The host has 2 pages per layer, B holds 3: it is dropped, and prefilled again with its first token."""
    t = swap("vllm_v0", host_pages=2)
    t.add("A", 48, 3)
    t.add("B", 48, 3)
    assert t.run() == ["A+48 B+48", "A xB", "A", "B+49", "B"]


@pytest.mark.parametrize("host_pages, swaps", [(8, 1), (2, 0)])
def test_swaps_are_counted_apart_from_what_is_recomputed(host_pages, swaps):
    """B is preempted once in both of the schedules above, to the host in the first."""
    t = swap("vllm_v0", host_pages=host_pages)
    t.add("A", 48, 3)
    t.add("B", 48, 3)
    a, b = t.engine.state.waiting
    t.run()
    assert [(r.num_preemptions, r.num_swaps) for r in (a, b)] == [(0, 0), (1, swaps)]


@pytest.mark.parametrize("policy", ["vllm_v1", "chunked"])
def test_a_partial_prefill_is_swapped_and_goes_on_where_it_was(policy):
    """Budget 64. B goes out with 16 of its 47 tokens, and comes back to prefill the other 31. C, which would fit, waits
    until B is back."""
    t = swap(policy, max_batched_tokens=64)
    t.add("A", 48, 3)
    t.add("B", 47, 3)
    t.add("C", 16, 1)
    assert t.run() == ["A+48 B+16", "A >B", "A", "B+31 C+16 <B", "B", "B"]


def test_the_least_urgent_goes_and_comes_back_beside_the_others():
    """7 pages: A 3, B 2, C 1. Two of them can grow, so the least urgent goes: B. It comes back, with 3 pages, when
    C's 2 are free."""
    t = swap("vllm_v0", num_pages=7, order="priority")
    t.add("A", 48, 18, 0)
    t.add("B", 32, 3, 2)
    t.add("C", 16, 3, 1)
    assert t.run()[:5] == ["A+48 C+16 B+32", "A C >B", "A C", "A B <B", "A B"]
