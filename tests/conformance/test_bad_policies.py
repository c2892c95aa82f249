"""A suite that nothing fails is worth nothing: policies that are wrong in one way each, and what is said of them."""

import numpy as np
import pytest

from engine.errors import OutOfPages, PolicyError
from engine.scheduler.state import NOBODY
from engine.scheduler.vllm_v1 import VllmV1
from tests.conformance.loads import Arrival, run

LOAD = [Arrival(prompt=17 + 5 * i, output=30) for i in range(6)]
SETUP = {"num_pages": 10, "max_batched_tokens": 32, "host_pages": 64}


class NeverAdmits(VllmV1):
    """Everybody waits for ever."""

    def plan(self, now):
        return self.state.make_plan(NOBODY, [])


class ForgetsPages(VllmV1):
    """Decodes without mapping a page for the next token."""

    def make_room(self, wanted):
        return wanted(), 0


class SkipsATurn(VllmV1):
    """Leaves the newest running sequence alone, for ever."""

    def _next_tokens(self):
        slots, counts = super()._next_tokens()
        return slots[:-1], counts[:-1]


class DecodesTwice(VllmV1):
    """The first sequence is in the step twice."""

    def make_room(self, wanted):
        (slots, counts), preempted = super().make_room(wanted)
        return (np.append(slots, slots[:1]), np.append(counts, counts[:1])), preempted


class LosesATurn(VllmV1):
    """Preempts, and forgets the request."""

    def plan(self, now):
        plan = super().plan(now)
        for request in self.state.waiting.first(99):
            if request.num_preemptions:
                self.state.waiting.remove(request)
        return plan


class DoesNotTestWhatFits(VllmV1):
    """Admits whoever is first."""

    def _admissions(self, budget):
        while self.state.waiting:
            head = self.state.waiting.head
            yield self.state.admit(head), head.num_tokens


@pytest.mark.parametrize(
    "wrong, error",
    [
        (NeverAdmits, PolicyError),
        (ForgetsPages, AssertionError),
        (SkipsATurn, PolicyError),
        (DecodesTwice, AssertionError),
        (LosesATurn, PolicyError),
        (DoesNotTestWhatFits, OutOfPages),
    ],
)
def test_what_is_wrong_is_found(wrong, error):
    """The same load passes under the policy that they all derive from."""
    with pytest.raises(error):
        run(f"{__name__}:{wrong.__name__}", LOAD, **SETUP)


def test_the_load_itself_is_fine():
    """It preempts, too."""
    engine = run("vllm_v1", LOAD, **SETUP)
    assert sum(plan.num_preempted for plan in engine.executor.plans) > 0
