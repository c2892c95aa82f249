"""The sparse set against a Python set, wrong calls included."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.errors import OutOfPages
from engine.memory.free_set import FreeSet


class FreeSetMachine(RuleBasedStateMachine):
    """Takes and puts back; whatever is wrong raises and leaves the set as it was."""

    @initialize(n=st.integers(1, 12))
    def make(self, n):
        self.n, self.set, self.free = n, FreeSet(n), set(range(1, n + 1))

    @rule(count=st.integers(0, 13))
    def take(self, count):
        if count > len(self.free):
            with pytest.raises(OutOfPages, match=f"{count} chunks wanted, {len(self.free)} free"):
                self.set.take(count)
            return
        ids = self.set.take(count)
        assert len(set(ids.tolist())) == count and set(ids.tolist()) <= self.free
        self.free -= set(ids.tolist())

    @rule(data=st.data())
    def put(self, data):
        """Any ids: also free ones, the reserved one, and the same one twice."""
        taken = sorted(set(range(1, self.n + 1)) - self.free)
        right = st.lists(st.sampled_from(taken), unique=True) if taken else st.just([])
        ids = data.draw(right | st.lists(st.integers(0, self.n), max_size=14))
        wrong = [i for i in ids if i == 0 or i in self.free or ids.count(i) > 1]
        if wrong:
            with pytest.raises(RuntimeError, match=f"double free of page ({'|'.join(map(str, wrong))})$"):
                self.set.put(np.array(ids, np.int32))
        else:
            self.set.put(np.array(ids, np.int32))
            self.free |= set(ids)

    @invariant()
    def same_as_the_set(self):
        if hasattr(self, "set"):
            self.set.check()
            ids = np.arange(self.n + 1)
            assert np.flatnonzero(self.set.contains(ids)).tolist() == [0, *sorted(self.free)]
            assert len(self.set) == len(self.free)


TestFreeSet = FreeSetMachine.TestCase
TestFreeSet.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_ids_come_back_in_the_order_they_were_put():
    """What one sequence gave back, in neighbouring pages, the next one gets as neighbouring pages."""
    free = FreeSet(9)
    ids = free.take(6)
    free.put(ids[[4, 0, 2]])
    assert free.take(3).tolist() == ids[[4, 0, 2]].tolist()
