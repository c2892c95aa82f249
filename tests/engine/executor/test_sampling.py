"""Sampling without a sort against NumPy with one, and log-probabilities against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.executor.sampling import keep, log_probabilities, sample, unpack
from engine.logprobs import MAX_LOGPROBS, read_row
from engine.scheduler.sampling_rows import FIELDS, MAX_STOP_IDS, ROW

VOCAB = 50
run = jax.jit(sample)
kept = jax.jit(keep)


def make_rows(rows=1, **fields) -> np.ndarray:
    """`ROW`s [rows] with these fields, in the form that the device gets."""
    out = np.zeros(rows, ROW)
    for name, value in {"temperature": 1.0, "top_p": 1.0, **fields}.items():
        out[name] = value
    return out.view(np.int32).reshape(rows, FIELDS)


def draw(logits, rows=1, index=0, **fields):
    """Tokens of `rows` rows with the same parameters and indices index, index + 1, ..."""
    logits = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (rows, len(logits)))
    return np.asarray(run(logits, make_rows(rows, index=index + np.arange(rows), **fields)))


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """The kept tokens by sorting, in float64; ties at a threshold are kept. Min-p, then top-k, then top-p."""
    x = logits.astype(np.float64) / temperature
    x[np.exp(x - x.max()) < min_p] = -np.inf
    keep = np.isfinite(x) if top_k == 0 else np.isfinite(x) & (x >= np.sort(x)[-min(top_k, len(x))])
    p = np.where(keep, np.exp(x - x.max()), 0.0)
    p /= p.sum()
    if top_p == 1:
        return keep  # however little is left
    more_likely = np.array([p[x > v].sum() for v in x])
    return keep & (more_likely < top_p)


def probabilities(logits, temperature, top_k, top_p, min_p=0.0):
    keep = allowed(logits, temperature, top_k, top_p, min_p)
    p = np.where(keep, np.exp((logits - logits.max()) / temperature), 0.0)
    return p / p.sum()


CUTS = {
    "temperature": st.sampled_from([0.3, 1.0, 2.0]),
    "top_k": st.integers(0, 60),
    "top_p": st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    "min_p": st.sampled_from([0.0, 0.02, 0.1, 0.6, 1.0]),
}


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.fixed_dictionaries(CUTS))
def test_the_kept_set_and_the_token_drawn(seed, cuts):
    """Exactly the tokens that sorting keeps, and of them the one with the largest logit plus the same Gumbel noise.
    Seeded logits, some rounded so that ties occur."""
    logits = (np.random.default_rng(seed).normal(size=VOCAB) * 3).astype(np.float32)
    if seed % 2:
        logits = logits.round()
    want = allowed(logits, **cuts)
    for scale in (0.99999, 1.00001):  # not where float32 cannot tell
        near = {name: cuts[name] * scale for name in ("min_p", "top_p") if cuts[name] < 1}
        assume(np.array_equal(allowed(logits, **cuts | near), want))
    row = unpack(jnp.asarray(make_rows(**cuts)))
    scaled = jnp.asarray(logits)[None] / row["temperature"][:, None]
    np.testing.assert_array_equal(kept(scaled, row["min_p"], row["top_k"], row["top_p"])[0], want)
    rows = 16
    keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(rows)]
    noise = np.stack([jax.random.gumbel(key, (VOCAB,), jnp.float32) for key in keys])
    best = np.where(want, np.asarray(scaled) + noise, -np.inf).argmax(-1)
    np.testing.assert_array_equal(draw(logits, rows, seed=seed, **cuts), best)


@pytest.mark.parametrize(
    "temperature, top_k, top_p, min_p",
    [(1.0, 0, 1.0, 0.0), (0.5, 10, 1.0, 0.0), (1.5, 0, 0.7, 0.0), (1.0, 20, 0.8, 0.05)],
)
def test_frequencies_follow_the_probabilities(temperature, top_k, top_p, min_p):
    """20,000 draws: every frequency within five standard errors (the draws are seeded, so this never flickers)."""
    logits = (np.random.default_rng(3).normal(size=VOCAB) * 2).astype(np.float32)
    rows = 20_000
    p = probabilities(logits, temperature, top_k, top_p, min_p)
    tokens = draw(logits, rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=11)
    got = np.bincount(tokens, minlength=VOCAB) / rows
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / rows) + 1e-9).all()


def test_top_k_one_tiny_top_p_and_large_min_p_are_greedy():
    """The most likely token alone is left."""
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    for cut in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.9999}):
        assert (draw(logits, rows=20, **cut) == logits.argmax()).all()


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_stop_tokens_cannot_be_drawn_before_min_tokens(temperature):
    """One or several, greedy or not, by the index of the token alone; from then on nothing is masked."""
    logits = np.random.default_rng(5).normal(size=VOCAB).astype(np.float32)
    order = logits.argsort()[::-1]
    for stops in (order[:1], order[:3], np.sort(order[: MAX_STOP_IDS - 1])):
        fields = {"temperature": temperature, "seed": 4, "stop_ids": np.resize(stops, MAX_STOP_IDS)}
        tokens = draw(logits, rows=200, min_tokens=120, **fields)
        free = draw(logits, rows=200, **fields)
        assert not np.isin(tokens[:120], stops).any() and np.isin(free[:120], stops).any()
        np.testing.assert_array_equal(tokens[120:], free[120:])
        if temperature == 0:
            assert (tokens[:120] == order[len(stops)]).all()


def test_rows_of_all_kinds_mix_and_keep_their_own_randomness():
    """A row's token is the same alone and beside others: its key is its own seed and index."""
    logits = (np.random.default_rng(1).normal(size=(5, VOCAB)) * 2).astype(np.float32)
    kinds = [
        {"temperature": 0, "seed": 1, "index": 0},
        {"temperature": 1, "top_k": 5, "seed": 2, "index": 7},
        {"temperature": 0.7, "top_p": 0.8, "seed": 3, "index": 2},
        {"temperature": 1.3, "min_p": 0.1, "seed": 4, "index": 9},
        {"temperature": 0, "min_tokens": 9, "index": 8, "stop_ids": logits[4].argmax()},
    ]
    together = np.asarray(run(logits, np.concatenate([make_rows(**kind) for kind in kinds])))
    assert together[0] == logits[0].argmax() and together[4] == logits[4].argsort()[-2]
    for i, kind in enumerate(kinds):
        assert together[i] == draw(logits[i], **kind)[0]


def test_seeds_and_indices_give_different_draws():
    """Neither is ignored."""
    logits = np.zeros(VOCAB, np.float32)
    assert len(set(draw(logits, rows=40).tolist())) > 15
    assert len({int(draw(logits, seed=s)[0]) for s in range(40)}) > 15


@pytest.mark.parametrize("vocab", [7, VOCAB, 3000])
def test_log_probabilities(vocab):
    """Own value, rank and alternatives against a sort in float64; ties count the lower id as more likely only among
    the alternatives, never in the rank."""
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(6, vocab)) * 5).astype(np.float32)
    logits[3] = logits[3].round()
    tokens = rng.integers(0, vocab, 6).astype(np.int32)
    tokens[0] = logits[0].argmax()
    rows = np.asarray(jax.jit(log_probabilities)(logits, tokens))
    k = min(MAX_LOGPROBS, vocab)
    for token, row, x in zip(tokens.tolist(), rows, logits.astype(np.float64), strict=True):
        want = x - x.max() - np.log(np.exp(x - x.max()).sum())
        got = read_row(token, row, k)
        assert got.token == token and got.rank == 1 + (x > x[token]).sum()
        assert got.top_tokens == tuple(np.argsort(-x, kind="stable")[:k].tolist())
        np.testing.assert_allclose((got.logprob, *got.top_logprobs), want[[token, *got.top_tokens]], atol=1e-5)
