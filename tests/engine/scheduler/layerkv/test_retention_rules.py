"""How many layers stay by other rules: worked out by hand, and against their definitions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.layerkv.retention import num_retained_by_deadline, num_retained_by_interval

SECONDS = st.floats(0, 1, allow_nan=False)


@pytest.mark.parametrize(
    "decode, copy, layers, retained",
    [
        (0.032, 0.001, 32, 0),  # a layer is fetched while one decodes
        (0.032, 0.0015, 32, 16),  # one in two
        (0.032, 0.0025, 32, 22),  # one in three: 10 are parked
        (0.032, 0.1, 32, 32),  # one in a hundred: none
        (0.0, 0.001, 32, 32),  # nothing is known to hide it
        (0.0, 0.0, 32, 0),
    ],
)
def test_by_interval(decode, copy, layers, retained):
    assert num_retained_by_interval(decode, copy, layers) == retained


@given(SECONDS, SECONDS, st.integers(1, 80))
def test_the_interval_hides_a_fetch_and_a_smaller_one_does_not(decode, copy, layers):
    """By its definition, up to rounding of the quotient."""
    retained = num_retained_by_interval(decode, copy, layers)
    fits = [k for k in range(1, layers + 1) if copy <= k * decode / layers * (1 + 1e-12)]
    near = [k for k in range(1, layers + 1) if copy <= k * decode / layers * (1 - 1e-12)]
    allowed = {layers - layers // found[0] if found else layers for found in (fits, near)}
    assert retained in allowed


@pytest.mark.parametrize("slo, copy, retained", [(0.2, 0.01, 12), (0.2, 0.00625, 0), (0.2, 0.3, 32), (0.2, 0.0, 0)])
def test_by_deadline(slo, copy, retained):
    """20 of 32 layers are fetched in 0.2 s at 0.01 s each."""
    assert num_retained_by_deadline(slo, copy, 32) == retained


@pytest.mark.parametrize("rule", [num_retained_by_interval, num_retained_by_deadline])
def test_negative_times_are_refused(rule):
    with pytest.raises(ValueError, match="must be >= 0"):
        rule(-1.0, 0.1, 8)
