"""Measured op times: what is between, before and beyond them, and lines that cannot be used."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.costmodel.device import load_device
from engine.costmodel.step_model import StepModel, StepWork
from engine.costmodel.tables import OpTables
from engine.errors import ConfigError
from tests.engine.costmodel.device_files import MODEL, device_file, profile, write

LINE = "op,tokens,kv,seconds\nqkv,1,,0.001\nqkv,11,,0.003\nqkv,21,,0.004\n"
GRID = "decode_attention,2,100,0.010\ndecode_attention,2,300,0.030\ndecode_attention,4,100,0.020\n"
PREFILL = "prefill_attention,100,0,0.5\nprefill_attention,200,0,1.0\nprefill_attention,100,400,2.5\n"


@pytest.fixture
def tables(tmp_path):
    (tmp_path / "times.csv").write_text(LINE + GRID + PREFILL)
    return OpTables.read(tmp_path / "times.csv")


def test_between_before_and_beyond(tables):
    """Linear; constant before the first point; beyond the last along the last segment."""
    found = [tables.seconds("qkv", tokens) for tokens in (1, 6, 11, 16, 21, 41, 0.5)]
    assert found == pytest.approx([0.001, 0.002, 0.003, 0.0035, 0.004, 0.006, 0.001])


def test_two_dimensions(tables):
    """Along kv first, where each number of rows may have points of its own; then between the numbers of rows."""
    decode = [
        float(tables.grid_seconds("decode_attention", n, np.array(kv))) for n, kv in ((2, 200), (3, 100), (6, 100))
    ]
    assert decode == pytest.approx([0.020, 0.015, 0.030])
    assert float(tables.grid_seconds("prefill_attention", 100, np.array(200))) == pytest.approx(1.5)


def test_they_win_over_the_roofline(tables, tmp_path):
    """Only for the ops they have; the step model says which."""
    plain, measured = (StepModel(MODEL, profile(tmp_path), tables=t) for t in (None, tables))
    work = StepWork(num_decode=11, decode_kv=11, max_kv=1, num_sampled=11)
    bare = StepModel(MODEL, profile(tmp_path), tables=OpTables({"qkv": {11: [(0, 0.0)]}})).step(work)
    only_qkv = StepModel(MODEL, profile(tmp_path), tables=OpTables({"qkv": {1: [(0, 0.001)], 21: [(0, 0.005)]}}))
    assert only_qkv.step(work).layer - bare.layer == pytest.approx(0.003)
    assert (
        plain.step(work).tail == measured.step(work).tail
        and "qkv, decode_attention, prefill_attention" in measured.describe()
    )
    prefill = measured.step(StepWork(prefills=((0, 100), (400, 100))))
    assert prefill.layer == pytest.approx(0.5 + 2.5, rel=0.05)


def test_decode_of_unequal_rows(tables, tmp_path):
    """t(mean) + alpha (t(longest) - t(mean)): rows of 100 and 300 are 20 ms, and half of the way to 30."""
    model = StepModel(MODEL, profile(tmp_path, skew_alpha=0.5), tables=tables)
    alone = StepModel(MODEL, profile(tmp_path, skew_alpha=0.0), tables=tables)
    skewed, mean = (m.step(StepWork(num_decode=2, decode_kv=400, max_kv=300)).layer for m in (model, alone))
    assert skewed - mean == pytest.approx(0.005)


@given(st.integers(1, 8), st.integers(1, 3000), st.integers(0, 500), st.integers(1, 30))
def test_several_steps_are_the_steps(num, mean, more, repeat):
    """Bit for bit, with tables too."""
    rows = {"decode_attention": {n: [(kv, n * kv * 1e-6) for kv in (1, 64, 500)] for n in (1, 4)}}
    model = StepModel(MODEL, load_device("h100"), tables=OpTables(rows))
    kv, longest = num * mean, mean + more * (num > 1)
    found = model.decode_seconds(num, kv, longest, repeat)
    works = [StepWork(num, kv + num * i, longest + i, (), num) for i in range(repeat)]
    assert found.tolist() == [model.step(work).device for work in works]


def test_a_constants_file_names_them(tmp_path):
    """Beside itself; what the caller gives wins."""
    (tmp_path / "times.csv").write_text(LINE)
    path = write(tmp_path / "mine.json", device_file() | {"tables": "times.csv"})
    assert StepModel(MODEL, load_device(path)).tables.names == ["qkv"]
    (tmp_path / "own.csv").write_text("op,tokens,seconds\no,1,0.5\n")
    assert StepModel(MODEL, load_device(path), tables=tmp_path / "own.csv").tables.names == ["o"]


def test_kernels_and_measured_attention_exclude_each_other(tables, tmp_path):
    """Neither is dropped silently."""
    with pytest.raises(
        ConfigError, match=r"kernels=fa-paged and measured times of decode_attention exclude each other"
    ):
        StepModel(MODEL, profile(tmp_path), kernels="fa-paged", tables=tables)


@pytest.mark.parametrize(
    "text, message",
    [
        ("op,seconds\n", r"must have the columns op,tokens,seconds or op,tokens,kv,seconds"),
        (LINE + "qvk,1,,0.1\n", r"line 5: unknown op 'qvk'; known: embed, input_norm, qkv"),
        (LINE + "o,one,,0.1\n", r"line 5: tokens and kv must be integers and seconds a number"),
        (LINE + "decode_attention,1,,0.1\n", r"line 5: tokens and kv must be integers"),
        (LINE + "o,0,,0.1\n", r"line 5: needs tokens >= 1, kv >= 0 and seconds >= 0"),
        (LINE + "qkv,11,,0.1\n", r"line 5: a second time for qkv of tokens=11"),
        ("op,tokens,seconds\ndecode_attention,1,0.1\n", r"line 2: tokens and kv must be integers"),
    ],
)  # fmt: skip
def test_lines_that_cannot_be_used(tmp_path, text, message):
    """One line that names the file and the line."""
    (tmp_path / "times.csv").write_text(text)
    with pytest.raises(ConfigError, match=rf"table .*times.csv.*{message}"):
        OpTables.read(tmp_path / "times.csv")
    with pytest.raises(ConfigError, match=r"table .*nowhere.csv cannot be read: No such file"):
        OpTables.read(tmp_path / "nowhere.csv")
