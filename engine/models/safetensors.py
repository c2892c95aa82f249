"""A small reader and writer of the safetensors format, so that the core needs no package for it.

Format: 8 bytes little-endian header length n, n bytes of JSON `{name: {dtype, shape, data_offsets: [begin, end]}}`
with offsets relative to the end of the header, then the data. The header is checked in full before any byte of data is
believed: it must tile the file exactly, as the reference implementation demands. Data is read into fresh buffers, not
mapped: resident memory stays at the tensors in use, and a file that shrinks under us is an error instead of SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from engine.errors import WeightsError
from engine.files import whole_file

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `begin` and `end` in bytes from the start of the file."""

    path: Path
    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    begin: int
    end: int

    def read(self) -> np.ndarray:
        """The tensor, in a buffer of its own.

        Raises:
          WeightsError: the file went away, or ends before the tensor does (it was whole when its header was read).
        """
        dtype = DTYPES[self.dtype]
        try:
            flat = np.fromfile(self.path, dtype, (self.end - self.begin) // dtype.itemsize, offset=self.begin)
        except OSError as error:
            raise WeightsError(f"{self.path}: tensor {self.name}: cannot be read: {error.strerror}") from error
        if flat.nbytes != self.end - self.begin:
            raise WeightsError(f"{self.path}: tensor {self.name}: the file ends before byte {self.end}")
        return flat.reshape(self.shape)


def read_header(path: str | os.PathLike) -> dict[str, TensorInfo]:
    """Every tensor of a file, by name.

    Raises:
      WeightsError: missing, truncated or malformed file, unknown dtype, offsets that are out of range, overlap, leave
        holes or do not fit the shape; names the file and the tensor.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise WeightsError(f"{path}: truncated or not a safetensors file: {size} bytes, header of {length}")
            text = file.read(length)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
    except ValueError as error:
        raise WeightsError(f"{path}: corrupt header: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: corrupt header: a JSON object is expected, not {type(header).__name__}")
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_tiling(path, tensors.values(), 8 + length, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {name}"
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise WeightsError(f"{where}: needs dtype, shape and two data_offsets") from error
    if dtype not in DTYPES:
        raise WeightsError(f"{where}: dtype {dtype!r} is not supported; known: {', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise WeightsError(f"{where}: shape {list(shape)} and data_offsets must be integers >= 0")
    if not begin <= end <= size - data_start:
        raise WeightsError(
            f"{where}: data_offsets [{begin}, {end}] reach outside the file's {size - data_start} bytes of data;"
            " is the file truncated?"
        )
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise WeightsError(f"{where}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return TensorInfo(path, name, dtype, shape, data_start + begin, data_start + end)


def _check_tiling(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    at = data_start
    for info in sorted(tensors, key=lambda t: (t.begin, t.end)):
        if info.begin != at:
            what = "overlaps another tensor" if info.begin < at else "leaves a hole before it"
            raise WeightsError(f"{path}: tensor {info.name}: {what}")
        at = info.end
    if at != size:
        raise WeightsError(f"{path}: {size - at} bytes after the last tensor belong to none")


def write_file(
    path: str | os.PathLike, layout: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes one file, whole or not at all.

    Args:
      layout: name -> (dtype as in DTYPES, shape), in file order.
      arrays: one per entry, in that order; consumed one at a time, so a generator bounds host memory.

    Raises:
      OutputError: a full disk, for one; what was there stays.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # what transformers insists on
    at = 0
    for name, (dtype, shape) in layout.items():
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with whole_file(Path(path)) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), array in zip(layout.items(), arrays, strict=True):
            if array.dtype != DTYPES[dtype] or array.shape != shape:
                raise ValueError(f"{name}: {array.dtype}{array.shape} is not {dtype}{shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
