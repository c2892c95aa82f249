"""Our safetensors reader and writer: against the real library, and against broken files (must show 5)."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import WeightsError
from engine.models import safetensors


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=(7,)).astype(jnp.bfloat16),
        "c": rng.normal(size=(2, 2, 2)).astype(np.float16),
        "scalar": np.array(3, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def write_arrays(path, arrays):
    codes = {dtype: code for code, dtype in safetensors.DTYPES.items()}
    safetensors.write_file(path, {n: (codes[a.dtype], a.shape) for n, a in arrays.items()}, arrays.values())


def test_round_trip(tmp_path, arrays):
    write_arrays(tmp_path / "x.safetensors", arrays)
    header = safetensors.read_header(tmp_path / "x.safetensors")
    assert list(header) == list(arrays)
    for name, array in arrays.items():
        back = header[name].read()
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]  # no partial file


def test_the_real_library_reads_what_we_write(tmp_path, arrays):
    library = pytest.importorskip("safetensors")
    write_arrays(tmp_path / "x.safetensors", arrays)
    with library.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_we_read_what_the_real_library_writes(tmp_path, arrays):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(arrays, tmp_path / "x.safetensors", metadata={"who": "wrote it"})
    header = safetensors.read_header(tmp_path / "x.safetensors")
    assert set(header) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(header[name].read(), array)


def test_writer_refuses_arrays_that_are_not_as_announced(tmp_path):
    layout = {"a": ("F32", (2,))}
    for array in (np.zeros(2, np.float64), np.zeros(3, np.float32)):
        with pytest.raises(ValueError, match="a: float"):
            safetensors.write_file(tmp_path / "x.safetensors", layout, [array])
    assert not (tmp_path / "x.safetensors").exists()


BROKEN = {
    "truncated length": (None, b"\x01\x02", r"truncated or not a safetensors file: 2 bytes"),
    "header beyond the file": ({}, b"", r"truncated or not a safetensors file", 1 << 40),
    "not JSON": (b"{oops", b"", r"corrupt header"),
    "not UTF-8": (b'{"\xff": 1}', b"", r"corrupt header"),
    "a list": (b"[]", b"", r"corrupt header: a JSON object is expected, not list"),
    "a name twice": (b'{"a": 1, "a": 1}', b"", r"corrupt header: a name occurs twice"),
    "no dtype": ({"t": {"shape": [], "data_offsets": [0, 4]}}, b"1234", r"tensor t: needs dtype, shape"),
    "three offsets": ({"t": {"dtype": "F32", "shape": [], "data_offsets": [0, 1, 4]}}, b"1234", r"tensor t: needs"),
    "unknown dtype": ({"t": entry(0, 8, dtype="F8_E4M3")}, b"12345678", r"tensor t: dtype 'F8_E4M3' .*known: F32"),
    "negative offset": ({"t": entry(-8, 0)}, b"12345678", r"tensor t: .*integers >= 0"),
    "fractional shape": ({"t": entry(0, 8, [2.0])}, b"12345678", r"tensor t: .*integers >= 0"),
    "beyond the data": ({"t": entry(0, 8)}, b"1234", r"tensor t: data_offsets \[0, 8\] .* is the file truncated"),
    "backwards": ({"t": entry(8, 0)}, b"12345678", r"tensor t: data_offsets"),
    "size of another shape": ({"t": entry(0, 8, [3])}, b"12345678", r"tensor t: 8 bytes do not hold F32 \[3\]"),
    "overlap": ({"t": entry(0, 8), "u": entry(4, 12)}, b"123456789012", r"tensor u: overlaps another tensor"),
    "hole": ({"t": entry(4, 12)}, b"123456789012", r"tensor t: leaves a hole"),
    "bytes of no tensor": ({"t": entry(0, 8)}, b"123456789", r"1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_name(tmp_path, case):
    header, data, message, *length = BROKEN[case]
    path = tmp_path / "x.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        write(path, header, data, *length)
    with pytest.raises(WeightsError, match=message) as caught:
        safetensors.read_header(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors: cannot be read: No such file"):
        safetensors.read_header("nowhere.safetensors")


def test_file_that_shrinks_after_its_header_was_read(tmp_path, arrays):
    path = tmp_path / "x.safetensors"
    write_arrays(path, arrays)
    header = safetensors.read_header(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="the file ends before byte"):
        header["scalar"].read()
    path.unlink()
    with pytest.raises(WeightsError, match="tensor a: cannot be read: No such file"):
        header["a"].read()


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=4),
    cut=st.integers(0, 40),
)
def test_any_damage_is_a_weights_error_or_harmless(tmp_path_factory, flips, cut):
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float16)}
    write_arrays(path, arrays)
    data = bytearray(path.read_bytes())
    for at, mask in flips:
        data[at % len(data)] ^= mask
    path.write_bytes(data[: len(data) - cut])
    try:
        for info in safetensors.read_header(path).values():
            info.read()
    except WeightsError:
        return
