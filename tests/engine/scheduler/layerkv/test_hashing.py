"""The hash against published numbers, and as a source of chance."""

import numpy as np
import pytest

from engine.scheduler.layerkv.hashing import uniform


def test_first_outputs_of_splitmix64():
    """One key is a seed; the numbers are those of the reference implementation."""
    found = uniform(np.array([0, 1234567]))
    assert found.tolist() == [(n >> 11) * 2**-53 for n in (16294208416658607535, 6457827717110365317)]


def test_keys_are_told_apart():
    """Order and number of keys count; every integer of NumPy's will do."""
    a, b = np.array([3]), np.array([4], np.int32)
    assert len({uniform(*keys).item() for keys in ((a,), (b,), (a, b), (b, a), (a, b, 0), (0, a, b))}) == 6
    assert uniform(3, np.arange(5)).tolist() == [uniform(3, np.array([i])).item() for i in range(5)]


def test_numbers_are_even():
    """20,000 of neighbouring keys: mean and each tenth within four standard deviations."""
    found = uniform(7, np.arange(20_000))
    assert found.min() >= 0 and found.max() < 1
    assert found.mean() == pytest.approx(0.5, abs=4 * (1 / 12 / 20_000) ** 0.5)
    counts = np.bincount((found * 10).astype(int), minlength=10)
    assert abs(counts - 2000).max() < 4 * (20_000 * 0.1 * 0.9) ** 0.5
