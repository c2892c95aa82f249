"""What the state machine draws: requests, and events that are followed by steps."""

from hypothesis import strategies as st
from hypothesis.stateful import rule

from engine.request import SamplingParams
from tests.engine.pattern_model import MODEL

TOKENS = st.integers(0, MODEL.vocab_size - 1)
LANDS = st.sampled_from([(), (True, False), (True,), (False,)])  # copies in these directions, by `out`
PARAMS = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 9, 20, 30, 40]),
    temperature=st.sampled_from([0, 0, 0.7]),
    seed=st.none() | st.integers(0, 9),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    forced_tokens=st.lists(TOKENS, max_size=4).map(tuple),
)
PROMPTS = st.builds(
    lambda start, n: (start * n)[:n], st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from([1, 9, 13, 18, 40])
)


def event(**strategies):
    """A rule that is followed by some steps, before each of which some copies land: hypothesis leaves whole rules out
    of many examples, but not these."""

    def wrap(method):
        def happen(self, steps, lands, **kwargs):
            method(self, **kwargs)
            for _ in range(steps):
                for out in lands:
                    while self.executor.lanes[out]:
                        self.executor.land(out)
                self.step()

        happen.__name__ = method.__name__
        return rule(steps=st.sampled_from([1, 0, 2, 5]), lands=LANDS, **strategies)(happen)

    return wrap
