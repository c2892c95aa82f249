"""How many layers stay and which: brute force, the paper's example and hand-made masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.scheduler.layerkv.retention import PATTERNS, num_retained, parked_layers

SIZES = [(layers, x) for layers in (1, 2, 3, 7, 8, 32, 45) for x in range(layers + 1)]


def indices(num_layers, x, pattern):
    """Parked layers as a list."""
    return np.flatnonzero(parked_layers(num_layers, x, pattern)).tolist()


def longest_run(mask):
    """The longest run of parked layers."""
    return max(map(len, "".join("x" if parked else " " for parked in mask).split()), default=0)


seconds = st.floats(0, 100) | st.sampled_from([0.1, 0.3, 0.7, 1e-300, 5e-324, float("inf")])


@given(seconds, seconds | st.integers(0, 40), st.integers(1, 80))
def test_the_fewest_layers_that_let_the_copies_end_in_time(copy, prefill, layers):
    """Against the definition; a whole number stands for so many copies, where rounding decides."""
    if isinstance(prefill, int):
        prefill = prefill * copy if prefill else 0.0
    expected = min(x for x in range(layers + 1) if x == layers or (layers - x) * copy <= prefill)
    assert num_retained(prefill, copy, layers) == expected


def test_by_hand():
    """The numbers of research/papers.md 1.3: a slow link keeps a few layers, a fast one none."""
    assert num_retained(10.0, 2.0, 8) == 3  # 5 copies in 10 s
    assert num_retained(9.9, 2.0, 8) == 4
    assert num_retained(16.0, 2.0, 8) == num_retained(1.0, 0.0, 8) == num_retained(0.0, 0.0, 8) == 0
    assert num_retained(0.0, 1e-9, 8) == num_retained(1.0, float("inf"), 8) == 8


@pytest.mark.parametrize("times", [(-1.0, 1.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_times_that_cannot_be(times):
    """One line that says which."""
    with pytest.raises(ValueError, match=rf"times must be >= 0, got prefill {times[0]} s, copy {times[1]} s a layer"):
        num_retained(*times, 8)


def test_interleave_is_the_papers_example():
    """L = 8, x = 4: 1, 3, 5, 7 stay. And by hand for others."""
    assert indices(8, 4, "interleave") == [0, 2, 4, 6]
    assert indices(8, 3, "interleave") == [0, 1, 3, 4, 6]
    assert indices(8, 7, "interleave") == [0]


@pytest.mark.parametrize("layers, x", SIZES)
def test_interleave_spreads_evenly(layers, x):
    """The formula, and the bound on runs that follows from it."""
    parked = layers - x
    assert indices(layers, x, "interleave") == [int(j * layers / parked + 1e-9) for j in range(parked)]
    assert longest_run(parked_layers(layers, x, "interleave")) <= -(-parked // max(x, 1))


@pytest.mark.parametrize("layers, x", SIZES)
def test_every_pattern_parks_as_many_as_it_says(layers, x):
    """The first stay, the last stay, any stay; one in k may park more."""
    parked = layers - x
    assert indices(layers, x, "prefix") == list(range(x, layers))
    assert indices(layers, x, "suffix") == list(range(parked))
    assert len(indices(layers, x, "random")) == parked
    k = max((k for k in range(1, layers + 1) if layers // k >= parked), default=0) if parked else layers + 1
    assert indices(layers, x, "interval") == [i for i in range(layers) if i % k == k - 1]
    assert len(indices(layers, x, "interval")) >= parked


def test_interval_by_hand():
    """3 of 8: every second, one more than asked for; 5 of 8: all."""
    assert indices(8, 5, "interval") == [1, 3, 5, 7]
    assert indices(8, 3, "interval") == list(range(8))
    assert indices(7, 5, "interval") == [2, 5]


def test_random_is_the_same_every_time_and_different_each():
    """Frozen masks (a change of the hash would show), and no favourite layers over many sizes."""
    assert indices(8, 4, "random") == [0, 2, 6, 7]
    counts = sum(parked_layers(32, x, "random").astype(int) for x in range(33))
    assert counts.min() > 8 and counts.max() < 25  # 16.5 in the mean


def test_masks_are_kept_and_cannot_be_written():
    """One array for all who ask."""
    mask = parked_layers(8, 4, "interleave")
    assert mask is parked_layers(8, 4, "interleave") and mask.dtype == bool
    with pytest.raises(ValueError, match="read-only"):
        mask[0] = False


def test_bad_arguments_are_named():
    """One line each."""
    with pytest.raises(ConfigError, match=f"pattern 'odd' is unknown; known: {', '.join(PATTERNS)}"):
        parked_layers(8, 4, "odd")
    for x in (-1, 9):
        with pytest.raises(ValueError, match=f"num_retained must be from 0 to 8, the layers, got {x}"):
            parked_layers(8, x, "prefix")
