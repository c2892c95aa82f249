"""Protects hashes: equal for equal things wherever they lie, different for any difference."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.provenance import digest, weights_hash


def params(**changes):
    tree = {"embed": jnp.arange(12.0).reshape(3, 4), "layers": [{"w": jnp.ones((2, 2), jnp.bfloat16)}]}
    return tree | changes


def test_equal_weights_hash_equally_in_any_order_and_in_any_home():
    tree = params()
    same = {"layers": [{"w": np.ones((2, 2), jnp.bfloat16)}], "embed": np.arange(12, dtype=np.float32).reshape(3, 4)}
    assert weights_hash(tree) == weights_hash(same)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed": jnp.arange(12.0).reshape(3, 4).at[2, 3].set(np.nextafter(np.float32(11), np.float32(12)))},
        {"embed": jnp.arange(12.0).reshape(4, 3)},
        {"embed": jnp.arange(12, dtype=jnp.int32).reshape(3, 4)},
        {"layers": [{"v": jnp.ones((2, 2), jnp.bfloat16)}]},
        {"layers": []},
    ],
    ids=["one bit", "shape", "dtype", "name", "missing"],
)
def test_any_difference_shows(changes):
    assert weights_hash(params()) != weights_hash(params(**changes))


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
