"""The forecast against sequences that are played out page by page, and the two marks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.scheduler.layerkv.forecast import Watermarks, forecast

sequences = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 20), st.integers(1, 90) | st.floats(1, 90) | st.just(float("inf"))),
    max_size=6,
)


def played_out(free, sequences, layers, page_size, horizon):
    """Free pages after each step: everybody writes a token, and those that have produced all leave."""
    alive = [list(sequence) for sequence in sequences]
    result = []
    for step in range(1, horizon + 1):
        for sequence in alive:
            sequence[1] -= 1
            if sequence[1] < 0:  # the token has no page
                sequence[1] += page_size
                sequence[0] += layers
                free -= layers
        free += sum(held for held, _, n_future in alive if n_future <= step)
        alive = [sequence for sequence in alive if sequence[2] > step]
        result.append(free)
    return result


@given(st.integers(0, 500), sequences, st.integers(1, 5), st.sampled_from([1, 2, 5, 16]), st.sampled_from([1, 7, 64]))
def test_page_by_page(free, sequences, layers, page_size, horizon):
    """Any phase, also with pages mapped ahead; ends inside and outside the horizon, whole and in between."""
    held, room = np.array([s[:2] for s in sequences], np.int32).reshape(-1, 2).T
    found = forecast(free, held, room, np.array([s[2] for s in sequences]), layers, page_size, horizon)
    assert found.dtype == np.int64 and found.tolist() == played_out(free, sequences, layers, page_size, horizon)


def test_by_hand():
    """Pages of 4, 2 layers. A: one token fits, so it maps with its second and its sixth. B ends with its third."""
    held, room, left = np.array([4, 10]), np.array([1, 9]), np.array([100, 3])
    assert forecast(20, held, room, left, 2, 4, 7).tolist() == [20, 18, 28, 28, 28, 26, 26]


def test_what_a_sequence_takes_it_gives_back():
    """Alone, after its end, all is free that it ever had."""
    found = forecast(10, np.array([6]), np.array([0]), np.array([20.0]), 3, 4, 30)
    assert found[18] == 10 - 3 * 5 and (found[19:] == 16).all()


pages = st.integers(0, 40)


@given(pages, pages, st.lists(st.integers(-20, 60), min_size=1, max_size=5))
def test_marks_by_definition(low, more, values):
    """The fewest pages that reach the one, the most that stay above the other; never both."""
    marks, found = Watermarks(low, low + more), np.array(values)
    assert marks.lacking(found) == next(n for n in range(99) if min(values) + n >= low)
    assert marks.spare(found) == max((n for n in range(99) if min(values) - n > low + more), default=0)
    assert not (marks.lacking(found) and marks.spare(found))


@given(pages, st.integers(1, 40), st.integers(-20, 99))
def test_marks_do_not_chase_each_other(low, more, free):
    """Once what was lacking has been freed nothing is spare, and the other way round."""
    marks = Watermarks(low, low + more)
    freed = np.array([free + marks.lacking(np.array([free]))])
    if marks.lacking(np.array([free])):
        assert marks.spare(freed) == 0
    taken = np.array([free - marks.spare(np.array([free]))])
    if marks.spare(np.array([free])):
        assert marks.lacking(taken) == 0


@pytest.mark.parametrize("low, high", [(-1, 3), (5, 4)])
def test_bad_marks_are_named(low, high):
    """One line."""
    with pytest.raises(ConfigError, match=f"watermarks must be 0 <= low <= high, got low={low} and high={high}"):
        Watermarks(low, high)
