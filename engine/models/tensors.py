"""One definition per tensor; its shape, sharding, initial values and checkpoint layout all derive from it.

A model describes its parameters once, as a pytree of `TensorSpec`. The functions here turn that pytree into abstract
arrays, shardings, seeded random arrays, and (with `weights.py`) into and out of Hugging Face checkpoints. The idea is
`ArrayInfo` of jax-llm-examples; the checkpoint half is ours.
"""

from __future__ import annotations

import contextlib
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

from engine.errors import ConfigError

# logical axis -> mesh axis
LOGICAL_AXES = {"heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "vocab": "tensor"}


@dataclass(frozen=True)
class HFPart:
    """One checkpoint tensor that a packed tensor is made of."""

    name: str
    shape: tuple[int, ...]  # as the checkpoint stores it, [out, in]
    view: Callable[[np.ndarray], np.ndarray]  # packed array -> view of this part, its axes in checkpoint order


@dataclass(frozen=True)
class TensorSpec:
    """A parameter: everything there is to know about it.

    `shape` is the packed array's, as checkpoints are packed into and Orbax stores it. What the devices hold differs in
    one case: with fewer kv heads than devices, `spread` repeats heads so that every device has one.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical name of each axis; None is never sharded
    dtype: str
    mean: float  # of the uniform distribution that random weights are drawn from
    std: float  # its standard deviation; 0: a constant
    parts: tuple[HFPart, ...]
    spread: Callable[[Any], Any] | None = None  # packed array (of NumPy or JAX) -> the array on the devices

    @property
    def device_shape(self) -> tuple[int, ...]:
        """The shape on the devices, over all of them."""
        if self.spread is None:
            return self.shape
        return jax.eval_shape(self.spread, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape

    @property
    def name(self) -> str:
        """The name that seeds its random values: that of its first checkpoint tensor."""
        return self.parts[0].name


def device_mesh(tensor: int = 1) -> Mesh:
    """A mesh of the first `tensor` devices, on the axis `tensor` that every sharding names.

    On CPU devices are virtual: they are asked for here, which works until JAX has started. When several processes
    serve one model (`executor/distributed.py`), the mesh takes all devices of all of them.

    Raises:
      ConfigError: there are fewer devices, or processes have more of them together.
    """
    if tensor > 1 and not jax.distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # JAX has started: what it has is counted below
            jax.config.update("jax_num_cpu_devices", max(tensor, jax.config.values["jax_num_cpu_devices"]))
    devices = jax.devices()
    if len(devices) < tensor:
        raise ConfigError(f"tensor={tensor} takes {tensor} devices, JAX has {len(devices)} ({devices[0].device_kind})")
    if jax.process_count() > 1 and len(devices) != tensor:
        raise ConfigError(f"tensor={tensor}: {jax.process_count()} processes have {len(devices)} devices; use them all")
    return Mesh(np.array(devices[:tensor]), ("tensor",))


def put(array: Any, where: NamedSharding) -> jax.Array:
    """To the devices. JAX may alias the buffer: hand over fresh arrays and never change them.

    Every process of several has the whole array and keeps its part; `device_put` would compare them at every call.
    """
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    return jax.make_array_from_callback(np.shape(array), where, lambda index: np.asarray(array)[index])


def partition(spec: TensorSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axis of each axis."""
    return PartitionSpec(*(LOGICAL_AXES[axis] if axis else None for axis in spec.axes))


def sharding(spec: TensorSpec, mesh: Mesh) -> NamedSharding:
    """Where the tensor lives."""
    return NamedSharding(mesh, partition(spec, mesh))


def shardings(specs: Any, mesh: Mesh) -> Any:
    """`sharding` of every tensor, as a pytree like `specs`."""
    return jax.tree.map(lambda s: sharding(s, mesh), specs)


def abstract(specs: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct` of every tensor on the devices, with its sharding: for lowering and `eval_shape`."""

    def struct(spec: TensorSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(spec.device_shape, jnp.dtype(spec.dtype), sharding=sharding(spec, mesh))

    return jax.tree.map(struct, specs)


def num_bytes(specs: Any, tensor: int = 1) -> int:
    """Bytes of all tensors on one of `tensor` devices."""
    mesh = AbstractMesh((tensor,), ("tensor",))

    def size(spec: TensorSpec) -> int:
        shard = NamedSharding(mesh, partition(spec, mesh)).shard_shape(spec.device_shape)
        return math.prod(shard) * jnp.dtype(spec.dtype).itemsize

    return sum(map(size, jax.tree.leaves(specs)))


def init(specs: Any, mesh: Mesh, seed: int) -> Any:
    """Random arrays. A tensor's values depend on the seed, its name and its shape only: not on order or sharding."""

    def draw(spec: TensorSpec) -> jax.Array:
        digest = hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=8).digest()
        fill = _filler(spec.shape, spec.dtype, spec.mean, spec.std, spec.spread, sharding(spec, mesh))
        return fill(np.frombuffer(digest, "<u4").copy())

    return jax.tree.map(draw, specs)


@functools.lru_cache(maxsize=64)
def _filler(shape: tuple[int, ...], dtype: str, mean: float, std: float, spread: Any, where: NamedSharding):
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

    return jax.jit(lambda key: spread(fill(key)) if spread else fill(key), out_shardings=where)


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: a bijection of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def place(spec: TensorSpec, packed: np.ndarray, mesh: Mesh) -> jax.Array:
    """A packed array, on the devices."""
    return put(spec.spread(packed) if spec.spread else packed, sharding(spec, mesh))


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
