"""What derives from the one definition of each tensor."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from engine.errors import ConfigError
from engine.models import llama, tensors
from engine.models.weights import init_params
from engine.presets import PRESETS, preset

TINY = preset("tiny-1m")
MESH = tensors.device_mesh()


@pytest.mark.parametrize("name", PRESETS)
def test_definitions_hold_every_parameter(name):
    cfg = preset(name)
    specs = jax.tree.leaves(llama.definitions(cfg))
    assert sum(int(np.prod(s.shape)) for s in specs) == cfg.num_parameters
    assert sum(int(np.prod(p.shape)) for s in specs for p in s.parts) == cfg.num_parameters
    names = [part.name for s in specs for part in s.parts]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("spec", jax.tree.leaves(llama.definitions(TINY.replace(qkv_bias=True, qk_norm=True)))[:12])
def test_pack_and_unpack_are_inverse(spec):
    offsets = np.cumsum([0, *(int(np.prod(part.shape)) for part in spec.parts)])
    assert offsets[-1] == np.prod(spec.shape) < 2**24  # exact in float32
    sources = [
        np.arange(start, end, dtype=np.float32).reshape(part.shape)
        for part, start, end in zip(spec.parts, offsets[:-1], offsets[1:], strict=True)
    ]
    packed = tensors.pack(spec, sources)
    assert packed.shape == spec.shape
    np.testing.assert_array_equal(np.sort(packed.ravel()), np.arange(packed.size))  # each element once
    for source, back in zip(sources, tensors.unpack(spec, packed), strict=True):
        np.testing.assert_array_equal(source, back)


def test_packed_layout_is_heads_of_each_group_then_k_then_v():
    spec = llama.definitions(TINY)["layers"][0]["qkv"]
    q, k, v = (np.full(part.shape, i, np.float32) for i, part in enumerate(spec.parts))
    q += np.arange(len(q))[:, None] / 1000  # the row of the checkpoint: head * D + d
    packed = tensors.pack(spec, [q, k + 100, v + 100])
    d, g = TINY.head_dim, TINY.group_size
    for head in range(TINY.num_heads):
        np.testing.assert_allclose(packed[0, head // g, head % g], (head * d + np.arange(d)) / 1000, rtol=1e-6)
    assert (packed[:, :, g] == 101).all()
    assert (packed[:, :, g + 1] == 102).all()


def test_random_values_have_the_definitions_statistics():
    params = init_params(preset("small-20m").replace(num_layers=1), MESH)
    for name, spec in llama.definitions(preset("small-20m"))["layers"][0].items():
        values = np.asarray(params["layers"][0][name], np.float64)
        assert values.mean() == pytest.approx(spec.mean, abs=4 * spec.std / values.size**0.5)
        assert values.std() == pytest.approx(spec.std, rel=0.01)
    rows = np.asarray(params["embed"], np.float64)
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 2e-3  # 3.1M pairs: 3.5 sigma
    assert abs(np.corrcoef(rows.ravel()[:-1], rows.ravel()[1:])[0, 1]) < 2e-3


def test_random_values_depend_on_seed_and_name_only():
    one, deep = init_params(TINY, MESH, 7), init_params(TINY.replace(num_layers=6), MESH, 7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one["layers"], deep["layers"][:4]))
    assert (one["head"] == deep["head"]).all()
    equal = np.asarray(one["layers"][0]["down"] == one["layers"][1]["down"])
    assert equal.mean() < 1e-3
    other = init_params(TINY, MESH, 8)
    assert (np.asarray(one["embed"]) == np.asarray(other["embed"])).mean() < 1e-3


def test_abstract_arrays_are_those_of_the_parameters():
    specs = llama.definitions(TINY.replace(dtype="bfloat16"))
    params = init_params(TINY.replace(dtype="bfloat16"), MESH)
    same = jax.tree.map(
        lambda a, p: (a.shape, a.dtype, a.sharding) == (p.shape, p.dtype, p.sharding),
        tensors.abstract(specs, MESH),
        params,
    )
    assert jax.tree.all(same)
    assert tensors.num_bytes(specs) == sum(p.nbytes for p in jax.tree.leaves(params)) == 2 * TINY.num_parameters


def test_logical_axes_shard_over_tensor():
    mesh = jax.sharding.AbstractMesh((2,), ("tensor",))
    spec = llama.definitions(TINY)["layers"][0]
    assert tensors.partition(spec["qkv"], mesh) == PartitionSpec(None, "tensor", None, None)
    assert tensors.partition(spec["o"], mesh) == PartitionSpec("tensor", None, None)
    assert tensors.partition(spec["gate_up"], mesh) == PartitionSpec(None, None, "tensor")
    assert tensors.partition(spec["down"], mesh) == PartitionSpec("tensor", None)
    assert tensors.partition(spec["norm1"], mesh) == PartitionSpec(None)


def test_shardings_name_the_given_mesh():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    leaves = jax.tree.leaves(tensors.shardings(llama.definitions(TINY), mesh))
    assert leaves
    assert all(leaf.mesh == mesh for leaf in leaves)


def test_kv_heads_repeat_when_devices_are_more():
    """Two kv heads on four devices: each twice, with half of its query heads, and the same random values."""
    cfg = TINY.replace(qkv_bias=True)
    packed, spread = (llama.definitions(cfg, tensor)["layers"][0]["qkv"] for tensor in (1, 2 * cfg.num_kv_heads))
    assert packed.spread is None
    m, k, width, d = packed.shape
    w = np.asarray(tensors.init(packed, MESH, 0))
    got = np.asarray(tensors.init(spread, MESH, 0))
    assert got.shape == spread.device_shape == (m, 2 * k, width // 2 + 1, d)
    np.testing.assert_array_equal(got, spread.spread(w))
    np.testing.assert_array_equal(got[:, :, :-2].reshape(m, -1, d), w[:, :, :-2].reshape(m, -1, d))
    for copy in (0, 1):
        np.testing.assert_array_equal(got[:, copy::2, -2:], w[:, :, -2:])


@pytest.mark.parametrize(
    "change, tensor, message",
    [
        ({"num_heads": 6, "num_kv_heads": 2}, 4, "tensor=4 does not divide tiny-1m's num_heads=6"),
        ({"num_heads": 12, "num_kv_heads": 6}, 4, "neither divides tiny-1m's num_kv_heads=6 nor is a multiple of it"),
        ({"ffn_size": 330}, 4, "does not divide tiny-1m's ffn_size=330"),
        ({"vocab_size": 1001}, 2, "does not divide tiny-1m's vocab_size=1001"),
    ],
)
def test_what_does_not_divide_is_refused(change, tensor, message):
    with pytest.raises(ConfigError, match=message):
        llama.definitions(TINY.replace(**change), tensor)


def test_bytes_of_a_device():
    """Everything is split over the devices but the norms; kv heads are copied beyond one per device."""
    specs = [tensors.num_bytes(llama.definitions(TINY, n), n) for n in (1, TINY.num_kv_heads, TINY.num_heads)]
    norms = 4 * TINY.hidden_size * (2 * TINY.num_layers + 1)
    assert specs[1] == (specs[0] - norms) // TINY.num_kv_heads + norms
    copies = 4 * TINY.num_layers * 2 * TINY.hidden_size * TINY.head_dim * (TINY.num_heads - TINY.num_kv_heads)
    assert specs[2] == (specs[0] - norms + copies) // TINY.num_heads + norms
