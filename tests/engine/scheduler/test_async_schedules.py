"""Schedules at `async_depth=1`: step n + 1 is planned before the tokens of step n are known (notation: `trace.py`)."""

import pytest

from tests.conformance.symbolic import answer
from tests.engine.scheduler.trace import traced

POLICIES = ["vllm_v0", "vllm_v1", "chunked"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_late_stop_wastes_one_row_and_nothing_else(policy):
    """A's second token is a stop. It is seen after the step that would sample the third was submitted: one late row, of
    which nobody learns. B takes A's slot one step later than it would."""
    second = answer([1] * 10, 2)[1]
    expected = {0: ["A+10", "A", "B+5", "B"], 1: ["A+10", "A", "A", "B+5", "B"]}
    for depth, lines in expected.items():
        t = traced(policy=policy, num_pages=64, num_slots=1, async_depth=depth)
        t.add("A", 10, 9, stop=(second,))
        t.add("B", 5, 2)
        outputs = []
        while t.engine.has_work():
            outputs += t.engine.step()
        assert t.lines == lines
        assert [o.request_id for o in outputs] == ["A", "A", "B", "B"]
        assert sum(record.num_late for record in t.engine.step_log) == depth


@pytest.mark.parametrize("policy", POLICIES)
def test_a_limit_is_known_in_time(policy):
    """No row is wasted on a request that ends by its length; its slot is free one step later than at depth 0."""
    t = traced(policy=policy, num_pages=64, num_slots=1, async_depth=1)
    t.add("A", 10, 2)
    t.add("B", 5, 1)
    assert t.run() == ["A+10", "A", "B+5"]
    assert sum(record.num_late for record in t.engine.step_log) == 0


@pytest.mark.parametrize("policy", ["vllm_v1", "chunked"])
def test_who_ends_with_the_step_in_flight_is_no_victim(policy):
    """7 pages, budget 64. At depth 1 A's end is not accounted yet when C could return: C comes one step later, and
    nothing else changes."""
    both = ["A+48 B+16", "A B+16 C+16", "A B xC", "A B"]
    for depth, rest in ((0, ["B C+17", "C", "C"]), (1, ["B", "C+17", "C", "C"])):
        t = traced(policy=policy, num_pages=7, max_batched_tokens=64, async_depth=depth)
        for name, prompt in (("A", 48), ("B", 32), ("C", 16)):
            t.add(name, prompt, 4)
        assert t.run() == both + rest


def test_a_preempted_sequence_keeps_the_token_that_was_in_flight():
    """B is preempted while the step that samples its first token is in flight: it recomputes 48 + 1 tokens."""
    t = traced(policy="vllm_v0", num_pages=6, async_depth=1)
    t.add("A", 48, 3)
    t.add("B", 48, 3)
    assert t.run() == ["A+48 B+48", "A xB", "A", "B+49", "B"]
