"""Eqs 1 and 2 by hand and by definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.scheduler.layerkv.slo import allowed_prefill, budget, num_admitted


def test_eq_1_by_hand():
    """TPOT objective 0.2 s, steps of 0.05 s: one on time, one that has waited, one that has lost."""
    found = allowed_prefill(
        n_past=np.array([10, 10, 10]),
        n_future=np.array([10.0, 1.0, 1.0]),
        t_past=np.array([0.5, 2.0, 3.0]),
        decode_seconds=0.05,
        tpot_slo=0.2,
    )
    assert found == pytest.approx([4.0 - 1.0, 2.2 - 2.05, 2.2 - 3.05]) and found.dtype == np.float64


counts = st.integers(0, 2000)


@given(st.lists(st.tuples(counts, counts, st.floats(0, 500)), min_size=1, max_size=8), st.floats(1e-4, 1))
def test_a_stall_of_what_is_allowed_ends_at_the_objective(sequences, slo):
    """Played out: past, a stall, then every future token. The mean TPOT is the objective, no more and no less."""
    past, future, t_past = (np.array(column) for column in zip(*sequences, strict=True))
    for stall, n, f, t in zip(allowed_prefill(past, future, t_past, 0.03, slo), past, future, t_past, strict=True):
        end = t + stall + sum([0.03] * int(f))
        assert end == pytest.approx(slo * (n + f), abs=1e-6)


def test_eq_2_and_lost_causes():
    """A negative one blocks, or does not count; zero is not lost; without anybody there is no limit."""
    allowed = np.array([3.0, -0.85, 0.15])
    assert budget(allowed, "block") == -0.85 and budget(allowed, "ignore") == 0.15
    assert budget(np.array([0.0, 2.0]), "ignore") == budget(np.array([0.0, 2.0]), "block") == 0.0
    assert budget(np.array([-1.0]), "ignore") == float("inf")
    assert budget(np.empty(0), "block") == budget(np.empty(0), "ignore") == float("inf")
    with pytest.raises(ConfigError, match="lost must be one of block, ignore, got 'forgive'"):
        budget(allowed, "forgive")


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(-2, 20))
def test_as_many_as_fit_together(seconds, limit):
    """The longest prefix; whole numbers, so that sums are exact."""
    assert num_admitted(seconds, limit) == max(
        n for n in range(len(seconds) + 1) if n == 0 or sum(seconds[:n]) <= limit
    )


def test_nobody_is_skipped_and_nobody_behind_is_asked():
    """The second does not fit, the third would. No budget, no prefill; no limit, all of them."""
    assert num_admitted([1.0, 5.0, 0.5], 2.0) == 1
    assert num_admitted([0.0], -0.1) == 0 and num_admitted([0.0, 0.0], 0.0) == 2
    assert num_admitted([1e9] * 3, float("inf")) == 3
    asked = iter([1.0, 5.0, 0.5])
    assert num_admitted(asked, 2.0) == 1 and [*asked] == [0.5]
