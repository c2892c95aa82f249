"""Bisection against curves made by hand: the threshold is known, so is what must be found."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.bisection import HIGH, LOW, Bracket, crossings, drive, rate_at, search


def found(passes, start=0, low=LOW, high=HIGH) -> tuple[Bracket, dict[int, bool]]:
    """A bracket, and what was asked on the way."""
    outcomes = {}

    def answer(wanted):
        ((_, index),) = wanted
        assert index not in outcomes, "nothing is asked twice"
        outcomes[index] = passes(index)
        return [outcomes[index]]

    return drive({0: search(start, low, high)}, answer)[0], outcomes


@given(st.integers(LOW, HIGH - 1), st.integers(-90, 90))
def test_a_falling_curve_has_one_bracket_wherever_the_search_starts(last, start):
    """6 doublings reach 63 grid steps, and halving 32 takes 5 more."""
    bracket, outcomes = found(lambda index: index <= last, start)
    assert bracket == Bracket(last, last + 1) and len(outcomes) <= 14
    assert crossings(outcomes) == []


@pytest.mark.parametrize("start", [LOW, -7, 0, 3, HIGH])
def test_no_bracket_where_all_fails_or_all_passes(start):
    assert found(lambda index: False, start)[0] == Bracket(None, LOW)
    assert found(lambda index: True, start)[0] == Bracket(HIGH, None)


@given(st.sets(st.integers(-8, 8)), st.integers(-8, 8))
def test_of_any_curve_neighbours_are_found(passing, start):
    """Whatever the curve, one rate passes and the next does not, or an end of the grid is reached."""
    bracket, outcomes = found(lambda index: index in passing, start, -8, 8)
    if bracket.passes is None:
        assert bracket.fails == -8 and -8 not in passing
    elif bracket.fails is None:
        assert bracket.passes == 8 and 8 in passing
    else:
        assert bracket.fails == bracket.passes + 1
        assert bracket.passes in passing and bracket.fails not in passing
    assert all(outcomes[index] == (index in passing) for index in outcomes)


def test_a_dip_is_told_of():
    """Fails at 3, passes again at 5: seen only if both were tried."""
    assert crossings({0: True, 3: False, 5: True, 9: False}) == [(3, 5)]
    assert crossings({5: True, 3: False, 4: False, 8: False, 9: True}) == [(4, 5), (8, 9)]
    assert crossings({0: True, 9: False}) == [] == crossings({})


def test_searches_go_on_together():
    """A round asks each search that has not ended for one rate, whatever its order; ended ones are not asked."""
    last, rounds = {"a": 0, "b": 17}, []

    def answer(wanted):
        rounds.append([key for key, _ in wanted])
        return [index <= last[key] for key, index in wanted]

    assert drive({key: search() for key in last}, answer) == {"a": Bracket(0, 1), "b": Bracket(17, 18)}
    assert rounds[0] == ["a", "b"] and rounds[-1] == ["b"] and all(len(set(keys)) == len(keys) for keys in rounds)


def test_rates_are_what_their_text_says():
    assert (rate_at(2.0, 0), rate_at(2.0, 1), rate_at(2.0, -1)) == (2.0, 2.1, 1.9048)
    assert all(float(f"{rate_at(0.613, i):g}") == pytest.approx(rate_at(0.613, i), rel=1e-5) for i in (-60, -3, 7, 60))
