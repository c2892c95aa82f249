"""Costs that are not negative: by hand, and by the conditions of optimality."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.layerkv.linear_fit import RIDGE, LinearFit, nonnegative_least_squares


def test_by_hand():
    """Least relative error: (x - 1)^2 + (x / 2 - 1)^2 is least at x = 1.2, not at 1.5."""
    fit = LinearFit(1, 8)
    fit.observe(np.ones((2, 1)), np.array([1.0, 2.0]))
    assert fit.predict(1) == pytest.approx(1.2, rel=1e-5) and fit.predict(10) == pytest.approx(12, rel=1e-5)


def test_a_cost_is_never_negative():
    """Times that fall with the second feature: it costs nothing, and the first costs what fits best without it."""
    fit = LinearFit(2, 8)
    fit.observe(np.array([[1.0, 1.0], [1.0, 2.0]]), np.array([2.0, 1.0]))
    assert fit.predict(1, 0) == fit.predict(1, 100) == pytest.approx(1.2, rel=1e-5)


numbers = st.floats(0, 1e3, allow_subnormal=False).map(lambda x: round(x, 3))
samples = st.lists(st.tuples(*[numbers] * 5, st.floats(1e-3, 1e3)), min_size=1, max_size=12)


@given(samples)
def test_conditions_of_optimality(samples):
    """Karush, Kuhn and Tucker: no slope where a cost is positive, none downwards where it is zero."""
    features, seconds = np.array(samples)[:, :5], np.array(samples)[:, 5]
    a = features / seconds[:, None]
    x = nonnegative_least_squares(a.T @ a, a.sum(0))
    weight = np.sqrt((a * a).sum(0))
    unit = a / np.where(weight > 0, weight, 1)
    costs = x * weight  # of features of unit weight
    slope = unit.T @ (unit @ costs - 1) + RIDGE * costs
    assert (x >= 0).all() and (x[weight == 0] == 0).all()
    assert (slope > -1e-6).all() and abs(slope[costs > 1e-6]).max(initial=0) < 1e-6


def test_costs_that_are_there_are_found():
    """Decode steps whose rows and tokens grow together; what has not been seen is predicted from them."""
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 64, 100)
    features = np.stack([np.ones(100), rows, rows * rng.integers(900, 1100, 100)], 1)
    fit = LinearFit(3, 256)
    fit.observe(features, features @ [8e-3, 1e-4, 2e-6])
    assert fit.predict(1, 500, 100_000) == pytest.approx(8e-3 + 0.05 + 0.2, rel=1e-3)


def test_what_samples_do_not_tell_is_shared():
    """All steps alike: their own time is met, and each feature has a share in it."""
    fit = LinearFit(2, 8)
    assert fit.predict(1, 4) == 0
    fit.observe(np.array([[1.0, 4.0]] * 3), np.full(3, 0.5))
    assert fit.predict(1, 4) == pytest.approx(0.5, rel=1e-5)
    assert fit.predict(1, 0) == pytest.approx(fit.predict(0, 4), rel=1e-5)


def by_definition(features, seconds, capacity):
    """Prediction for (1, 10, 10000) from the last samples in whole groups of 8, from 64 on."""
    n = len(seconds) if len(seconds) <= 64 else len(seconds) // 8 * 8
    a = (features / seconds[:, None])[:n][-capacity:]
    return float(nonnegative_least_squares(a.T @ a, a.sum(0)) @ [1, 10, 10_000])


@pytest.mark.parametrize("capacity", [32, 96])
def test_the_samples_decide_to_the_bit(capacity):
    """At once, or one by one with a question after each; and only the last of them count."""
    rng = np.random.default_rng(1)
    features, seconds = rng.random((230, 3)) * [1, 64, 64_000], rng.random(230) + 1e-3
    single = LinearFit(3, capacity)
    for n in range(1, 231):
        single.observe(features[n - 1 : n], seconds[n - 1 : n])
        whole = LinearFit(3, capacity)
        whole.observe(features[:n], seconds[:n])
        assert single.predict(1, 10, 10_000) == whole.predict(1, 10, 10_000)
        assert single.predict(1, 10, 10_000) == pytest.approx(by_definition(features[:n], seconds[:n], capacity))
