"""Sampling on the device: temperature, min-p, top-k and top-p, mixed per row, without a sort; and log-probabilities.

A full sort of V = 32,000 logits costs several times the LM head. Both cuts only need a threshold: the k-th largest
logit, and the smallest logit whose more likely rivals hold less than `top_p` of the mass. Bisection over the 32 bits of
the logits' order finds it exactly (ours). Ties at the threshold are all kept.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from engine.logprobs import MAX_LOGPROBS
from engine.scheduler.sampling_rows import ROW

LANES = 128


def most_likely(logits: jax.Array) -> jax.Array:
    """The first index of each row's maximum, [R, V] -> int32 [R]: `argmax`, written so that XLA vectorises it on CPU
    (8 to 20 times faster at V = 32,000). First the block of 128 that holds the maximum, then the place in it."""
    r, v = logits.shape
    blocks = jnp.pad(logits, ((0, 0), (0, -v % LANES)), constant_values=-jnp.inf).reshape(r, -1, LANES)
    block = _first(blocks.max(-1))
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * LANES + _first(inside)


def _first(x: jax.Array) -> jax.Array:
    """The first index of each row's maximum, [R, n] -> int32 [R]; the last index for a row of NaN."""
    n = x.shape[-1]
    return jnp.where(x == x.max(-1, keepdims=True), jnp.arange(n, dtype=jnp.int32), n - 1).min(-1)


def _ordered(x: jax.Array) -> jax.Array:
    """Float32 -> uint32 with the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_key(keys: jax.Array, weights: jax.Array, at_least: jax.Array) -> jax.Array:
    """Per row the largest key t for which the weights of entries with key >= t sum to `at_least` or more.

    keys uint32 [R, V], weights float32 [R, V], at_least float32 [R] -> uint32 [R]. Builds t bit by bit from the top.
    """

    def body(i, t):
        trial = t | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(keys >= trial[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= at_least, trial, t)

    return jax.lax.fori_loop(0, 32, body, jnp.zeros(keys.shape[0], jnp.uint32))


def unpack(rows: jax.Array) -> dict[str, jax.Array]:
    """Fields of `sampling_rows.ROW` from its int32 form [R, FIELDS]: [R] each, `stop_ids` [R, MAX_STOP_IDS]."""
    out = {}
    for name, (dtype, offset, *_) in (ROW.fields or {}).items():
        at, width = offset // 4, dtype.itemsize // 4
        values = rows[:, at : at + width] if dtype.subdtype else rows[:, at]
        out[name] = jax.lax.bitcast_convert_type(values, jnp.float32) if dtype.kind == "f" else values
    return out


def keep(scaled: jax.Array, min_p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Which tokens may be drawn, bool [R, V]: min-p and top-k cut first, top-p works on the mass that is left.

    That is vLLM's order: min-p, top-k, top-p. Min-p and top-k each keep everything above a threshold of the whole row,
    so their order does not matter.

    Args:
      scaled: float32 [R, V], logits over temperature.
      min_p: float32 [R]; top_k: int32 [R], 0 = all; top_p: float32 [R].
    """
    vocab = scaled.shape[-1]
    keys = _ordered(scaled)
    k = jnp.where(top_k == 0, vocab, jnp.minimum(top_k, vocab)).astype(jnp.float32)
    kept = keys >= _largest_key(keys, jnp.ones_like(scaled), k)[:, None]
    # Rounding must not lose the most likely token when min_p is 1: it and its equals are kept then.
    kept &= jnp.exp(scaled - scaled.max(-1, keepdims=True)) >= jnp.minimum(min_p, 1 - 1e-6)[:, None]
    probs = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    # Rounding must not lose the whole row when top_p is 1: nothing is cut then.
    cut = _largest_key(keys, probs, jnp.clip(top_p, 1e-6, 1.0))  # below that: the most likely token alone
    return kept & ((keys >= cut[:, None]) | (top_p >= 1.0)[:, None])


def sample(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """One token per row, int32 [R].

    The random key of a row is `fold_in(key(seed), index)`: it does not depend on batching, chunking or preemption.

    Args:
      logits: float32 [R, V].
      rows: int32 [R, FIELDS], see `unpack`.
    """
    p, vocab = unpack(rows), logits.shape[-1]
    early = (p["index"] < p["min_tokens"])[:, None]
    forbidden = jnp.where(early, p["stop_ids"], vocab)  # out of range: dropped
    logits = logits.at[jnp.arange(len(logits))[:, None], forbidden].set(-jnp.inf, mode="drop")
    greedy, best = p["temperature"] == 0, most_likely(logits)

    def noise(s, i):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(s), i), (vocab,), jnp.float32)

    def draw():
        scaled = logits / jnp.where(greedy, 1.0, p["temperature"])[:, None]
        noisy = scaled + jax.vmap(noise)(p["seed"], p["index"])
        noisy = jnp.where(keep(scaled, p["min_p"], p["top_k"], p["top_p"]), noisy, -jnp.inf)
        return jnp.where(greedy, best, most_likely(noisy))

    return jax.lax.cond(greedy.all(), lambda: best, draw)  # all greedy: here for masks or log-probabilities alone


def log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """What `engine.logprobs.read_row` reads, int32 [R, ROW_FIELDS]: of `tokens` [R] and of the most likely tokens under
    log-softmax of logits float32 [R, V]."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    rank = 1 + jnp.sum(logits > own, axis=-1, keepdims=True, dtype=jnp.int32)
    values, ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    pad = ((0, 0), (0, MAX_LOGPROBS - ids.shape[-1]))  # a vocabulary smaller than that
    own, values = (jax.lax.bitcast_convert_type(v - total, jnp.int32) for v in (own, values))
    return jnp.concatenate([own, rank, jnp.pad(ids, pad), jnp.pad(values, pad)], axis=-1)
