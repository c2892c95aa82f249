"""Step times and link rates learned online: what is found, what is kept, and what is said before."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.scheduler.layerkv.step_times import MAX_COPIES, MAX_STEPS, LinkRate, StepTimes, features
from engine.scheduler.plan import Plan, Prefill

COSTS = np.array([5e-3, 2e-5, 3e-8, 1e-4, 1e-6])


def prefills(rng, n):
    """Steps of one prompt each, some behind cached tokens: features [n, 5]."""
    new, start = rng.integers(16, 4000, n), rng.integers(0, 4000, n) * rng.integers(0, 2, n)
    return np.stack([np.ones(n), new, new * start + new**2 / 2, np.zeros(n), np.zeros(n)], 1)


def decodes(rng, n):
    """Steps of decodes: features [n, 5]."""
    rows = rng.integers(1, 64, n)
    return np.stack([np.ones(n), np.zeros(n), np.zeros(n), rows, rows * rng.integers(50, 3000, n)], 1)


def plan(prefills=(), positions=(), repeat=1):
    """A plan of these prompts, (start, new), and decodes."""
    none = np.empty(0, np.int32)
    prompts = tuple(Prefill(9, start, np.zeros(new, np.int32), True) for start, new in prefills)
    rows = np.arange(len(positions), dtype=np.int32), none, np.array(positions, np.int32)
    return Plan(1, *rows, prompts, none, None, None, repeat=repeat)


def test_features_by_hand():
    """Two prompts, one behind 100 cached tokens, beside two decodes; and decodes that repeat."""
    assert features(plan([(0, 10), (100, 20)], [7, 9])).tolist() == [[1, 30, 50 + 2000 + 200, 2, 18]]
    assert features(plan((), [7, 9], repeat=3)).tolist() == [[1, 0, 0, 2, 18], [1, 0, 0, 2, 20], [1, 0, 0, 2, 22]]
    assert features(plan([(0, 4)])).tolist() == [[1, 4, 8, 0, 0]]


def test_nothing_is_known_at_first():
    """Each kind is learned from its own steps."""
    times, rng = StepTimes(), np.random.default_rng(0)
    assert times.prefill(1000) == times.decode(4, 1000) == 0.0
    steps = decodes(rng, 5)
    times.observe(steps, steps @ COSTS)
    assert times.prefill(1000) == 0.0 < times.decode(4, 1000)
    steps = prefills(rng, 1)
    times.observe(steps, np.array([0.25]))
    assert times.prefill(int(steps[0, 1])) > 0


def test_what_steps_cost_is_found():
    """From 60 of each kind, in one batch, with 1% noise: longer prompts and larger batches than were seen."""
    rng = np.random.default_rng(1)
    steps = np.concatenate([prefills(rng, 60), decodes(rng, 60)])
    times = StepTimes()
    times.observe(steps, steps @ COSTS * rng.normal(1, 0.01, 120))
    assert times.prefill(8000) == pytest.approx(5e-3 + 0.16 + 3e-8 * 8000**2 / 2, rel=0.03)
    assert times.prefill(1000, start=6000) == pytest.approx(5e-3 + 0.02 + 3e-8 * 6.5e6, rel=0.03)
    assert times.decode(128, 200_000) == pytest.approx(5e-3 + 0.0128 + 0.2, rel=0.03)


def test_mixed_steps_count_as_prefills():
    """A policy that always decodes beside prompts still learns what a prompt costs."""
    rng = np.random.default_rng(2)
    steps = prefills(rng, 80)
    steps[:, 3:] = decodes(rng, 80)[:, 3:]
    times = StepTimes()
    times.observe(steps, steps @ COSTS)
    assert times.prefill(2000) == pytest.approx(5e-3 + 0.04 + 0.06, rel=1e-3) and times.decode(4, 1000) == 0.0


def test_long_decodes_push_no_prefill_out():
    """And old decodes are forgotten when the machine changes."""
    rng = np.random.default_rng(3)
    times, steps = StepTimes(), prefills(rng, 10)
    times.observe(steps, steps @ COSTS)
    before = times.prefill(3000)
    for factor in (1, 7):
        steps = decodes(rng, 3 * MAX_STEPS)
        times.observe(steps, factor * (steps @ COSTS))
    assert times.prefill(3000) == before
    assert times.decode(32, 40_000) == pytest.approx(7 * (5e-3 + 3.2e-3 + 0.04), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 700), st.lists(st.integers(0, 700), max_size=5), st.randoms(use_true_random=False))
def test_how_steps_come_in_does_not_matter(n, cuts, random):
    """At once, or in parts with questions in between: the same to the bit."""
    rng = np.random.default_rng(random.randrange(1000))
    steps = np.where(rng.random((n, 1)) < 0.3, prefills(rng, n), decodes(rng, n))
    seconds = steps @ COSTS * rng.uniform(0.7, 1.4, n)
    whole, parts = StepTimes(), StepTimes()
    whole.observe(steps, seconds)
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    for start, end in itertools.pairwise(edges):
        parts.observe(steps[start:end], seconds[start:end])
        parts.decode(3, 1000)
        parts.prefill(100)
    assert parts.prefill(777, 55) == whole.prefill(777, 55)
    assert parts.decode(17, 12_345) == whole.decode(17, 12_345)


def test_a_step_takes_time():
    """One line."""
    with pytest.raises(ValueError, match=r"a step must take more than 0 s, got 0.0 s"):
        StepTimes().observe(np.ones((2, 5)), np.array([1.0, 0.0]))


def test_link_rate_by_hand():
    """Two small copies do not count; of the rates 1, 2, 3, 4 and 5 GB/s of large ones the upper quartile is 4."""
    link = LinkRate()
    assert link.gbs is None and link.seconds_per_byte == 0.0
    link.observe(1e3, 1.0)
    assert link.gbs == pytest.approx(1e-6)  # better than nothing
    link.observe([1e3, 1e9, 1e9, 1e9, 1e9, 1e9], [1.0, 1, 1 / 2, 1 / 5, 1 / 3, 1 / 4])
    assert link.gbs == pytest.approx(4.0) and link.seconds_per_byte == pytest.approx(0.25e-9)


def test_link_rate_forgets_and_does_not_mind_how_copies_come():
    """64 later the old ones are gone."""
    rng = np.random.default_rng(4)
    sizes, seconds = rng.integers(1, 10**9, 200).astype(float), rng.random(200) + 0.01
    whole, single = LinkRate(), LinkRate()
    whole.observe(sizes, seconds)
    for size, second in zip(sizes, seconds, strict=True):
        single.observe(size, second)
    kept = sorted(zip(sizes[-MAX_COPIES:], seconds[-MAX_COPIES:], strict=True))[MAX_COPIES // 2 - 1 :]
    rates = [size / second for size, second in kept]
    assert whole.gbs == single.gbs == np.quantile(rates, 0.75, method="lower") / 1e9
    with pytest.raises(ValueError, match=r"a copy must take more than 0 s, got -1.0 s"):
        whole.observe([1.0, 2.0], [1.0, -1.0])
