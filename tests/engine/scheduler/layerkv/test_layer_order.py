"""Orders of leaving and coming home: brute force over every mask of few layers, and bounds for many."""

import itertools

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.scheduler.layerkv.layer_order import order_home, order_out
from engine.scheduler.layerkv.retention import PATTERNS, parked_layers

SPREAD = ["interleave", "interval"]
MASKS = [np.array(bits, bool) for n in range(1, 9) for bits in itertools.product([0, 1], repeat=n)]


def runs(mask):
    """Lengths of the runs of parked layers, longest first."""
    return sorted(map(len, "".join("x" if parked else " " for parked in mask).split()), reverse=True)


def after(mask, layer, parked):
    """The mask once a layer has moved."""
    mask = mask.copy()
    mask[layer] = parked
    return mask


def best_out(mask):
    """The docstring, word by word: shortest longest run, then furthest from what is parked, then lowest."""
    n, there = len(mask), np.flatnonzero(mask).tolist()
    ways = []
    for i in np.flatnonzero(~mask).tolist():
        distance = min([(i - j) % n for j in there] + [(j - i) % n for j in there], default=n)
        ways.append((runs(after(mask, i, True))[0], -distance, i))
    return min(ways)[-1]


def best_home(mask):
    """Whatever leaves the shortest runs, longest first: nothing about middles."""
    return min((runs(after(mask, i, False)), i) for i in np.flatnonzero(mask).tolist())[-1]


@pytest.mark.parametrize("order, best, parks", [(order_out, best_out, True), (order_home, best_home, False)])
def test_every_step_is_the_best_one(order, best, parks):
    """All masks of up to 8 layers; the rest of an order is the order of what the first step left."""
    for mask in MASKS:
        found = order(mask, "interleave")
        assert sorted(found) == np.flatnonzero(mask != parks).tolist()
        if found:
            assert found[0] == best(mask), mask
            assert found[1:] == order(after(mask, found[0], parks), "interleave")
        assert order(mask, "interval") == found


def test_by_hand():
    """Halves, then quarters, as the pattern itself has them; then the gaps from where the runs stay short."""
    none = np.zeros(8, bool)
    out = order_out(none, "interleave")
    assert out == (0, 4, 2, 6, 7, 1, 5, 3)
    for n in (1, 2, 4):
        assert sorted(out[:n]) == np.flatnonzero(parked_layers(8, 8 - n, "interleave")).tolist()
    assert order_home(~none, "interleave") == (3, 5, 1, 6, 0, 2, 4, 7)
    assert order_home(np.array([1, 0, 1, 1, 1, 0, 1, 1], bool), "interleave")[:2] == (3, 6)


@pytest.mark.parametrize("layers", [12, 13, 32, 45])
def test_runs_stay_short(layers):
    """At most twice as long as they must be: n parked layers between x retained ones."""
    mask = np.zeros(layers, bool)
    for n, layer in enumerate(order_out(mask, "interleave"), 1):
        mask[layer] = True
        assert runs(mask)[0] <= 2 * -(-n // max(layers - n, 1))
    assert mask.all()
    for x, layer in enumerate(order_home(mask, "interleave"), 1):
        mask[layer] = False
        assert max(runs(mask), default=0) <= 2 * -(-(layers - x) // (x + 1))


@pytest.mark.parametrize("pattern", ["prefix", "suffix"])
def test_what_has_a_shape_keeps_it(pattern):
    """After each move the mask is that of the pattern."""
    mask = np.zeros(9, bool)
    for n, layer in enumerate(order_out(mask, pattern), 1):
        mask[layer] = True
        assert (mask == parked_layers(9, 9 - n, pattern)).all()
    for x, layer in enumerate(order_home(mask, pattern), 1):
        mask[layer] = False
        assert (mask == parked_layers(9, x, pattern)).all()


@pytest.mark.parametrize("pattern", ["prefix", "suffix", "random"])
def test_home_undoes_out(pattern):
    """Whatever is parked, the last to leave is the first to come home."""
    everything = order_out(np.zeros(8, bool), pattern)
    assert sorted(everything) == list(range(8))
    for mask in MASKS[-256:]:
        out, home = order_out(mask, pattern), order_home(mask, pattern)
        assert out == tuple(i for i in everything if not mask[i])
        assert home == tuple(i for i in reversed(everything) if mask[i])


def test_random_has_an_order_of_its_own():
    """Neither up nor down; other layers, another order."""
    assert order_out(np.zeros(8, bool), "random") == (1, 3, 0, 6, 2, 7, 4, 5)
    assert order_out(np.zeros(9, bool), "random")[:4] != (1, 3, 0, 6)


def test_integers_will_do_for_a_mask_and_unknown_patterns_will_not():
    """0 and 1 as False and True; every known pattern has an order."""
    assert order_out(np.array([0, 1, 0, 0]), "interleave") == order_out(np.array([0, 1, 0, 0], bool), "interleave")
    for pattern in PATTERNS:
        assert order_out(np.ones(4, bool), pattern) == order_home(np.zeros(4, bool), pattern) == ()
    for order in (order_out, order_home):
        with pytest.raises(ConfigError, match="pattern 'odd' is unknown"):
            order(np.zeros(4, bool), "odd")
