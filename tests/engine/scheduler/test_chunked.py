"""`chunked` (Sarathi-Serve) against schedules worked out by hand (notation: `trace.py`). Pages hold 16 tokens."""

import pytest

from engine.scheduler.state import NOBODY
from tests.engine.scheduler.trace import traced


def chunked(num_pages=64, budget=32, **setup):
    return traced(policy="chunked", num_pages=num_pages, max_batched_tokens=budget, **setup)


def test_decodes_then_partial_prefills_then_admissions_share_the_budget():
    """A decodes in every step; B takes 22 + 31 + 17; C, admitted with the 14 tokens left of the third step, takes 5."""
    t = chunked()
    t.add("A", 10, 4)
    t.add("B", 70, 2)
    t.add("C", 5, 1)
    assert t.run() == ["A+10 B+22", "A B+31", "A B+17 C+5", "A B"]


class SecondFirst:
    """Admits all that wait and prefills only the second of them."""

    mixes = True

    def __init__(self, state):
        self.state = state

    def plan(self, now):
        slots = [self.state.admit(request) for request in [*self.state.waiting]]
        return self.state.make_plan(NOBODY, [self.state.prefill(slots[1])])


@pytest.mark.parametrize(
    "policy, expected",
    [
        ("chunked", ["B+1", "B A+1", "B A+1", "A+1"]),  # B's decode first, A's prompt with what is left
        ("vllm_v1", ["B+1", "A+2", "B A+1", "B"]),  # A first: it was admitted first
    ],
)
def test_a_decode_goes_before_a_partial_prefill_that_was_admitted_earlier(policy, expected):
    """Budget 2. A (3 tokens) was admitted before B (1), but B was prefilled first, by another policy."""
    t = traced(policy=policy, num_pages=64, max_batched_tokens=2)
    t.add("A", 3, 1)
    t.add("B", 1, 3)
    own, t.engine.policy = t.engine.policy, SecondFirst(t.engine.state)
    t.engine.step()
    t.engine.policy = own
    assert t.run() == expected


def test_a_prompt_has_all_its_pages_from_admission_on():
    """As in `test_vllm_v1`, but B's 4 pages are taken at once: A finds none for its third, and B goes."""
    t = chunked(num_pages=6, budget=17)
    t.add("A", 31, 3)
    t.add("B", 60, 2)
    assert t.run() == ["A+17", "A+14 B+3", "A B+16", "A xB", "B+17", "B+17", "B+17", "B+9", "B"]


def test_the_prompt_alone_must_fit_above_the_watermark():
    """10 pages, 2 kept, A has 6: B's 2 pages fit exactly; C's 1 does not, until A ends."""
    t = chunked(num_pages=10, budget=4096, watermark=0.2)
    t.add("A", 90, 3)
    t.add("B", 30, 3)
    t.add("C", 5, 1)
    assert t.run() == ["A+90 B+30", "A B", "A B", "C+5"]


def test_decodes_are_held_to_the_budget():
    """Budget 2, three sequences: the two admitted first decode."""
    t = chunked(budget=2)
    for name in "ABC":
        t.add(name, 1, 3)
    assert t.run() == ["A+1 B+1", "A B", "A B", "C+1", "C", "C"]
