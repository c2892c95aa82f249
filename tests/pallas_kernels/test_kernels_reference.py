"""The oracle: the shared suite through the public functions, and an independent computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import ints, place, queries, tokens
from kernel_suite import HEADS, DecodeSuite, PrefillSuite, WriteSuite

from engine.errors import ConfigError
from pallas_kernels import decode_attention, prefill_attention, write_kv
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.prefill_attention import reference as prefill_reference


class TestDecode(DecodeSuite):
    backend, jit = "reference", False


class TestPrefill(PrefillSuite):
    backend, jit = "reference", False


class TestWrite(WriteSuite):
    backend, jit = "reference", False


def test_decode_agrees_with_jax_attention_over_the_tokens_themselves():
    rng = np.random.default_rng(1)
    lens = (37, 5)
    case = place(*tokens(rng, lens, HEADS), 16, "paged")
    q = queries(rng, 2, HEADS.h, HEADS.d)
    o, _ = decode_reference.decode_attention(q, case.arena, case.view, lens, sm_scale=0.125, window=None, soft_cap=None)
    for b in range(2):
        want = jax.nn.dot_product_attention(q[b][None, None], case.k[b][None], case.v[b][None], scale=0.125)
        np.testing.assert_allclose(o[b], want[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_prefill_agrees_with_jax_attention_over_the_tokens_themselves(window):
    rng = np.random.default_rng(2)
    case = place(*tokens(rng, (37,), HEADS), 16, "paged")
    q = queries(rng, 37, HEADS.h, HEADS.d)
    args = (q[None], case.arena, case.view, [0], [37])
    o, _ = prefill_reference.prefill_attention(*args, sm_scale=0.125, window=window, soft_cap=None)
    local = None if window is None else (window - 1, 0)
    want = jax.nn.dot_product_attention(
        q[None], case.k[0][None], case.v[0][None], scale=0.125, is_causal=True, local_window_size=local
    )
    np.testing.assert_allclose(o, want, rtol=1e-5, atol=1e-5)


def test_inside_jit_it_says_that_it_cannot():
    case = place(*tokens(np.random.default_rng(3), (5,), HEADS), 16, "paged")
    q = jnp.ones((1, HEADS.h, HEADS.d))

    def step(q):
        return decode_attention(q, case.arena, case.view, ints([5]), sm_scale=1.0, backend="reference")

    with pytest.raises(ConfigError, match="outside jit"):
        jax.jit(step)(q)


@pytest.mark.parametrize("backend", ["mosaic", ""])
def test_a_named_backend_is_obeyed_or_refused(backend):
    case = place(*tokens(np.random.default_rng(3), (5,), HEADS), 16, "paged")
    q, new = jnp.ones((1, HEADS.h, HEADS.d)), jnp.ones((1, HEADS.k, HEADS.d))
    one = ints([1])
    with pytest.raises(ConfigError, match=r"decode_attention has no backend .*known: xla, reference"):
        decode_attention(q, case.arena, case.view, one, sm_scale=1.0, backend=backend)
    with pytest.raises(ConfigError, match=r"prefill_attention has no backend .*known: xla, reference"):
        prefill_attention(q[None], case.arena, case.view, one, one, sm_scale=1.0, backend=backend)
    with pytest.raises(ConfigError, match=r"write_kv has no backend .*known: xla, reference"):
        write_kv(case.arena, new, new, one, one, backend=backend)


def test_shapes_that_do_not_fit_are_refused():
    case = place(*tokens(np.random.default_rng(3), (5,), HEADS), 16, "paged")
    one = ints([1])
    with pytest.raises(ValueError, match="q has 5 heads of 64, the arena 2 kv heads of 64"):
        decode_attention(jnp.ones((1, 5, 64)), case.arena, case.view, one, sm_scale=1.0)
    with pytest.raises(ValueError, match="lens has shape"):
        decode_attention(jnp.ones((1, 4, 64)), case.arena, case.view, ints([1, 1]), sm_scale=1.0)
    with pytest.raises(ValueError, match="one per tile"):
        prefill_attention(jnp.ones((2, 8, 4, 64)), case.arena, case.view, one, one, sm_scale=1.0)
    with pytest.raises(ValueError, match="tokens must be"):
        write_kv(case.arena, jnp.ones((1, 3, 64)), jnp.ones((1, 3, 64)), one, one)
