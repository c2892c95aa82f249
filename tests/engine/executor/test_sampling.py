"""Sampling without a sort against NumPy with one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executor.sampling import sample

VOCAB = 50
run = jax.jit(sample)


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, index=0, rows=1):
    """Tokens of `rows` rows with the same parameters and indices index, index + 1, ..."""
    full = lambda x, t: jnp.full(rows, x, t)  # noqa: E731
    return np.asarray(
        run(
            jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits))),
            full(temperature, jnp.float32),
            full(top_k, jnp.int32),
            full(top_p, jnp.float32),
            full(seed, jnp.int32),
            index + jnp.arange(rows),
        )
    )


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """The kept tokens by sorting, in float64; ties at a threshold are kept."""
    x = logits.astype(np.float64) / temperature
    keep = np.ones(len(x), bool) if top_k == 0 else x >= np.sort(x)[-min(top_k, len(x))]
    p = np.where(keep, np.exp(x - x.max()), 0.0)
    p /= p.sum()
    more_likely = np.array([p[x > v].sum() for v in x])
    return keep & (more_likely < top_p)


def probabilities(logits, temperature, top_k, top_p):
    keep = allowed(logits, temperature, top_k, top_p)
    p = np.where(keep, np.exp((logits - logits.max()) / temperature), 0.0)
    return p / p.sum()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 2.0]), st.integers(0, 60), st.sampled_from([0.05, 0.5, 0.9, 1.0])
)
def test_only_allowed_tokens_are_drawn(seed, temperature, top_k, top_p):
    """Seeded logits, some rounded so that ties occur."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=VOCAB) * 3).astype(np.float32)
    if seed % 2:
        logits = logits.round()
    tokens = draw(logits, temperature, top_k, top_p, seed=seed, rows=64)
    assert allowed(logits, temperature, top_k, top_p)[tokens].all()


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.5, 10, 1.0), (1.5, 0, 0.7), (1.0, 20, 0.8)])
def test_frequencies_follow_the_probabilities(temperature, top_k, top_p):
    """20,000 draws: every frequency within five standard errors (the draws are seeded, so this never flickers)."""
    logits = (np.random.default_rng(3).normal(size=VOCAB) * 2).astype(np.float32)
    rows = 20_000
    p = probabilities(logits, temperature, top_k, top_p)
    got = np.bincount(draw(logits, temperature, top_k, top_p, seed=11, rows=rows), minlength=VOCAB) / rows
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / rows) + 1e-9).all()


def test_top_k_one_and_tiny_top_p_are_greedy():
    """The most likely token alone is left."""
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    assert (draw(logits, top_k=1, rows=20) == logits.argmax()).all()
    assert (draw(logits, top_p=1e-6, rows=20) == logits.argmax()).all()


def test_rows_of_all_kinds_mix_and_keep_their_own_randomness():
    """A row's token is the same alone and beside others: its key is its own seed and index."""
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(4, VOCAB)) * 2).astype(np.float32)
    temperature = np.array([0, 1, 0.7, 1.3], np.float32)
    top_k, top_p = np.array([0, 5, 0, 0], np.int32), np.array([1, 1, 0.8, 1], np.float32)
    seed, index = np.array([1, 2, 3, 4], np.int32), np.array([0, 7, 2, 9], np.int32)
    together = np.asarray(run(logits, temperature, top_k, top_p, seed, index))
    assert together[0] == logits[0].argmax()
    for i in range(4):
        assert together[i] == draw(logits[i], temperature[i], top_k[i], top_p[i], seed[i], index[i])[0]


def test_seeds_and_indices_give_different_draws():
    """Neither is ignored."""
    logits = np.zeros(VOCAB, np.float32)
    assert len(set(draw(logits, rows=40).tolist())) > 15
    assert len({int(draw(logits, seed=s)[0]) for s in range(40)}) > 15
