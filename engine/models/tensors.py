"""One definition per tensor; its shape, sharding, initial values and checkpoint layout all derive from it.

A model describes its parameters once, as a pytree of `TensorSpec`. The functions here turn that pytree into abstract
arrays, shardings, seeded random arrays, and (with `weights.py`) into and out of Hugging Face checkpoints. The idea is
`ArrayInfo` of jax-llm-examples; the checkpoint half is ours.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

LOGICAL_AXES = {"kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}  # logical axis -> mesh axis


@dataclass(frozen=True)
class HFPart:
    """One checkpoint tensor that a packed tensor is made of."""

    name: str
    shape: tuple[int, ...]  # as the checkpoint stores it, [out, in]
    view: Callable[[np.ndarray], np.ndarray]  # packed array -> view of this part, its axes in checkpoint order


@dataclass(frozen=True)
class TensorSpec:
    """A parameter: everything there is to know about it."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of each axis; None is never sharded
    dtype: str
    mean: float  # of the uniform distribution that random weights are drawn from
    std: float  # its standard deviation; 0: a constant
    parts: tuple[HFPart, ...]

    @property
    def name(self) -> str:
        """The name that seeds its random values: that of its first checkpoint tensor."""
        return self.parts[0].name


def single_device_mesh(device: Any = None) -> Mesh:
    """A mesh of one device, with the axis `tensor` that every sharding names."""
    return Mesh(np.array([device or jax.devices()[0]]), ("tensor",))


def partition(spec: TensorSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of each axis. One that its mesh axis does not divide is replicated (kv heads when K < tensor)."""
    names = [LOGICAL_AXES[axis] if axis else None for axis in spec.axes]
    fits = [n if n and size % mesh.shape[n] == 0 else None for n, size in zip(names, spec.shape, strict=True)]
    return PartitionSpec(*fits)


def sharding(spec: TensorSpec, mesh: Mesh) -> NamedSharding:
    """Where the tensor lives."""
    return NamedSharding(mesh, partition(spec, mesh))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """`sharding` of every tensor, as a pytree like `specs`."""
    return jax.tree.map(lambda s: sharding(s, mesh), specs)


def abstract(specs: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct` of every tensor, with its sharding: for lowering, `eval_shape` and Orbax restores."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=sharding(s, mesh)), specs)


def num_bytes(specs: Any) -> int:
    """Bytes of all tensors together, one copy."""
    return sum(math.prod(s.shape) * jnp.dtype(s.dtype).itemsize for s in jax.tree.leaves(specs))


def init(specs: Any, mesh: Mesh, seed: int) -> Any:
    """Random arrays. A tensor's values depend on the seed, its name and its shape only: not on order or sharding."""

    def draw(spec: TensorSpec) -> jax.Array:
        digest = hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=8).digest()
        fill = _filler(spec.shape, spec.dtype, spec.mean, spec.std, sharding(spec, mesh))
        return fill(np.frombuffer(digest, "<u4").copy())

    return jax.tree.map(draw, specs)


@functools.lru_cache(maxsize=64)
def _filler(shape: tuple[int, ...], dtype: str, mean: float, std: float, where: NamedSharding):
    """A jitted `key [2] uint32 -> array`. Each element hashes its own index: `jax.random` took 1.5 s and 0.3 s of
    compilation per shape for 124M weights on a CPU, this 0.05 s and 0.05 s. Indices repeat after 2**32 elements."""

    def fill(key: jax.Array) -> jax.Array:
        if std == 0:
            return jnp.full(shape, mean, dtype)
        index = sum(
            jax.lax.broadcasted_iota(jnp.uint32, shape, i) * np.uint32(math.prod(shape[i + 1 :]))
            for i in range(len(shape))
        )
        bits = _mix(_mix(index + key[0]) ^ key[1])
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - 1.0  # [-1, 1), variance 1/3
        return (mean + std * 3**0.5 * uniform).astype(dtype)

    return jax.jit(fill, out_shardings=where)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def pack(spec: TensorSpec, sources: Sequence[np.ndarray]) -> np.ndarray:
    """Checkpoint tensors, in the order of `spec.parts` -> the packed array in `spec.dtype`, a fresh buffer."""
    packed = np.empty(spec.shape, jnp.dtype(spec.dtype))
    for part, source in zip(spec.parts, sources, strict=True):
        target = part.view(packed)
        _copy(target, source.reshape(target.shape))
    return packed


def unpack(spec: TensorSpec, packed: np.ndarray) -> list[np.ndarray]:
    """The inverse of `pack`: contiguous checkpoint tensors, in the order of `spec.parts`."""
    tensors = []
    for part in spec.parts:
        source = part.view(packed)
        target = np.empty(source.shape, packed.dtype)
        _copy(target, source)
        tensors.append(target.reshape(part.shape))
    return tensors


def _copy(target: np.ndarray, source: np.ndarray, rows: int = 32) -> None:
    """`target[...] = source`, fast when it is a transpose.

    NumPy fills a transpose from thousands of source rows at once and misses the cache at every element (0.2 GB/s). So
    copy blocks: `rows` steps along the axis that is contiguous in the target, the axis that is contiguous in the
    source whole, and one index at a time of any axis that NumPy would walk inside the latter.
    """
    near, far = int(np.argmin(target.strides)), int(np.argmin(source.strides))
    if near == far:
        target[...] = source
        return
    inside = [a for a in range(target.ndim) if a != near and target.strides[a] < target.strides[far]]
    order = [*inside, near, *(a for a in range(target.ndim) if a != near and a not in inside)]
    target, source = target.transpose(order), source.transpose(order)
    for index in np.ndindex(target.shape[: len(inside)]):
        for i in range(0, target.shape[len(inside)], rows):
            target[index][i : i + rows] = source[index][i : i + rows]
