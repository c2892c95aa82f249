"""Static batching, as before Orca (Yu et al., OSDI 2022): a batch runs until its last member has ended.

python -m experiments.serve --model=base-124m --policy=tests/conformance/example_policy.py:StaticBatching
make conformance POLICY=tests/conformance/example_policy.py:StaticBatching
"""

from engine.scheduler.state import NOBODY


class StaticBatching:
    """Admits only when nothing runs. Maps pages for all tokens at admission: nobody needs more, or is preempted."""

    mixes = False  # no step prefills and decodes at once

    def __init__(self, config, state, max_batched_tokens):
        self.state, self.max_batched_tokens = state, max_batched_tokens

    def plan(self, now):
        """The next step: `make_plan(slots that decode, prefills)`."""
        if len(self.state.running):
            return self.state.make_plan(self.state.decodable(), [])
        return self.state.make_plan(NOBODY, self.admit())

    def admit(self):
        state, prefills, budget = self.state, [], self.max_batched_tokens
        while state.waiting:
            head = state.waiting.head
            needed = head.max_length - 1  # the last token's KV is never read
            if not state.store.fits(needed) or (prefills and head.num_tokens > budget):
                break
            slot = state.admit(head, needed)
            prefills.append(state.prefill(slot))
            budget -= head.num_tokens
        return prefills
