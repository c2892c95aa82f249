"""Measured steps: what a file holds is what a simulated step takes, cut as the executor cuts it. All by hand: seconds
are binary fractions, curves have two or three points."""

import copy
import dataclasses

import numpy as np
import pytest
from absl import logging
from hypothesis import given
from hypothesis import strategies as st

from engine import Engine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from engine.costmodel.device import load_device
from engine.costmodel.measured_steps import MeasuredSteps, step_settings, with_measured_steps
from engine.costmodel.step_model import StepModel, StepWork
from engine.costmodel.step_tables import StepTables
from engine.errors import ConfigError
from engine.executor.packing import Packer
from engine.presets import PRESETS
from tests.engine.costmodel.device_files import device_file, write

MODEL = PRESETS["tiny-1m"]
TILE, SLOTS = 8, 4
UNIT = 1 / 1024


def packer(deterministic=False) -> Packer:
    return Packer(SLOTS, TILE, 2, deterministic)


def curve(rows: int, tiles: int, *points: tuple[int, int], uneven: tuple[tuple[int, int, int], ...] = ()) -> dict:
    """A bucket's entry; seconds in units."""
    entries = [{"attended": x, "seconds": y * UNIT, "count": 5, "spread": 0.1} for x, y in points]
    more = [{"excess": e, "attended": x, "seconds": y * UNIT, "count": 5, "spread": 0.1} for e, x, y in uneven]
    return {"rows": rows, "tiles": tiles, "points": entries, "uneven": more}


CURVES = [
    curve(1, 0, (16, 4), (64, 10)),
    curve(2, 0, (32, 5), (128, 11)),
    # A row of 80 among three of 16, one of 176: 4 and 10 more than as many equal rows, 16 and 22, would take.
    curve(4, 0, (64, 8), (128, 16), (256, 24), uneven=((48, 128, 20), (120, 224, 32))),
    curve(0, 1, (8, 20), (40, 36)),
    curve(0, 2, (16, 30), (64, 54)),
    curve(4, 1, (8, 26), (40, 42)),
    curve(4, 2, (16, 40), (64, 64)),
]
STEPS = {"settings": {"tensor": 1}, "host_us": {"0": 2e6 * UNIT, "1": 1e6 * UNIT}, "buckets": CURVES}


def measured(tmp_path, depth=0, deterministic=False, **changes) -> MeasuredSteps:
    path = write(tmp_path / "here.json", device_file() | {"steps": STEPS | changes})
    profile = load_device(path)
    assert profile.steps is not None
    return MeasuredSteps(MODEL, profile, profile.steps, packer(deterministic), depth)


def units(model: StepModel, *work) -> float:
    return model.step(StepWork(*work)).device / UNIT


@pytest.mark.parametrize("rows, context, expected", [(1, 16, 4), (1, 64, 10), (2, 64, 11), (4, 16, 8), (4, 64, 24)])
def test_exact_at_measured_points(tmp_path, rows, context, expected):
    assert units(measured(tmp_path), rows, rows * context, context, (), rows) == pytest.approx(expected, rel=1e-15)


def test_between_beyond_and_before(tmp_path):
    """Linear between points and beyond the last, constant before the first."""
    model = measured(tmp_path)
    assert units(model, 1, 40, 40) == pytest.approx(7)
    assert units(model, 1, 112, 112) == pytest.approx(16)
    assert units(model, 1, 3, 3) == pytest.approx(4)


def test_unequal_rows(tmp_path):
    """What the longest row has above the mean costs extra. Four rows of 128 tokens in all take 16; with 80 in one of
    them, 48 above the mean, 4 more; with 56 in it half of that; between the points and beyond them 6 for 72."""
    model = measured(tmp_path)
    assert units(model, 4, 128, 80) == pytest.approx(16 + 4)
    assert units(model, 4, 128, 56) == pytest.approx(16 + 2)
    assert units(model, 4, 256, 64 + 84) == pytest.approx(24 + 4 + 6 * 36 / 72)
    assert units(model, 4, 256, 64 + 132) == pytest.approx(24 + 10 + 6 * 12 / 72)


def test_rows_round_up_to_their_bucket(tmp_path):
    """Three rows of 32 are a bucket of four whose padding row attends to nothing: 96 tokens take 12, and the longest is
    8 above the mean of 24."""
    assert units(measured(tmp_path), 3, 96, 32) == pytest.approx(12 + 4 * 8 / 48)


def test_prompts_are_cut_into_tiles(tmp_path):
    """20 tokens after 10 others end at 18, 26 and 30: two tiles together (44 attended), then one. A second prompt of
    5 fills up the second sub-batch instead (30 + 5)."""
    model = measured(tmp_path)
    assert units(model, 0, 0, 0, ((10, 20),)) == pytest.approx((30 + 24 * 28 / 48) + (20 + 16 * 22 / 32))
    assert units(model, 0, 0, 0, ((10, 20), (0, 5))) == pytest.approx((30 + 24 * 28 / 48) + (30 + 24 * 19 / 48))


def test_a_mixed_step(tmp_path):
    """Decode rows go with the first sub-batch, at the largest row bucket: its curve has rows of 16, these two rows of
    64 cost 16 - 8 more (128 attended), and 4 * 32 / 48 since they are 32 above the mean of four."""
    model, more = measured(tmp_path), 16 - 8 + 4 * 32 / 48
    assert units(model, 2, 128, 64, ((0, 8),)) == pytest.approx(26 + more)
    assert units(model, 2, 128, 64, ((0, 24),)) == pytest.approx((40 + 24 * 8 / 48) + more + (20 + 16 * 16 / 32))


def test_deterministic_rows_are_tiles(tmp_path):
    """Three rows of 20 in buckets of two tiles; of one tile there is no bucket then."""
    model = measured(tmp_path, deterministic=True, buckets=[curve(0, 2, (16, 30), (64, 54))])
    assert units(model, 3, 60, 20) == pytest.approx((30 + 24 * 24 / 48) + (30 + 24 * 4 / 48))


def test_host_time_is_serial_at_depth_0_and_what_remains_at_depth_1(tmp_path):
    alone, ahead = measured(tmp_path, 0), measured(tmp_path, 1)
    work = StepWork(1, 16, 16, (), 1)
    assert alone.step(work).device == pytest.approx(4 * UNIT) and alone.host == pytest.approx(2 * UNIT)
    assert ahead.step(work).device == pytest.approx(5 * UNIT) and ahead.host == pytest.approx(2 * UNIT)
    assert ahead.step(StepWork()).device == 0


@given(st.data(), st.integers(1, SLOTS), st.booleans(), st.integers(0, 1))
def test_decode_seconds_are_those_of_step(tmp_path_factory, data, num, deterministic, depth):
    model = measured(tmp_path_factory.mktemp("d"), depth, deterministic)
    lengths = data.draw(st.lists(st.integers(1, 300), min_size=num, max_size=num))
    kv, longest = sum(lengths), max(lengths)
    each = [model.step(StepWork(num, kv + num * i, longest + i, (), num)).device for i in range(20)]
    assert model.decode_seconds(num, kv, longest, 20).tolist() == each


def test_a_bucket_that_was_not_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"device round has no step times of rows=4 tiles=2: calibrate again"):
        measured(tmp_path, buckets=CURVES[:-1])


def broken(path: str, value) -> dict:
    """STEPS with one thing changed, `a.0.b`; None takes it out."""
    steps = copy.deepcopy(STEPS)
    *way, last = [int(part) if part.isdecimal() and part not in steps["host_us"] else part for part in path.split(".")]
    at = steps
    for part in way:
        at = at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return steps


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("settings", None, "steps has no settings"),
        ("host_us.1", None, "steps.host_us has no 1"),
        ("host_us.0", -1, "steps.host_us.0 must be a number >= 0, got -1"),
        ("buckets", {}, "steps.buckets must be a list, got {}"),
        ("buckets.2.points", [], r"buckets\[2\].points must be a list of at least one"),
        ("buckets.2.tiles", True, r"buckets\[2\].tiles must be a number >= 0, got True"),
        ("buckets.3.rows", 4, r"buckets\[5\]: rows=4 tiles=1 a second time"),
        ("buckets.2", {"rows": 1, "tiles": 0}, r"buckets\[2\] has no points"),
        ("buckets.2.uneven", [{"excess": 0, "attended": 64, "seconds": 1}], r"uneven\[0\].excess must be > 0"),
        ("buckets.2.uneven", [{"excess": 4, "attended": 64, "seconds": 1}] * 2, r"must have increasing excess"),
        ("buckets.2.uneven", [{"excess": 4, "seconds": 1}], r"uneven\[0\] has no attended"),
        ("buckets.2.points", [{"attended": 2, "seconds": 1}] * 2, r"points must have increasing attended"),
        ("buckets.2.points", [{"attended": 2, "seconds": "1"}], r"points\[0\].seconds must be a number >= 0, got '1'"),
    ],
)
def test_bad_tables_are_one_line(tmp_path, path, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_device(write(tmp_path / "bad.json", device_file() | {"steps": broken(path, value)}))
    assert str(error.value).startswith(str(tmp_path / "bad.json")) and "\n" not in str(error.value)


def config(**changes) -> EngineConfig:
    cache = CacheConfig(num_pages=400, page_size=changes.pop("page_size", 16))
    scheduler = SchedulerConfig(max_num_seqs=changes.pop("max_num_seqs", SLOTS))
    defaults = {"query_tile": TILE, "max_tiles": 2, "max_context": 256}
    return EngineConfig(cache=cache, scheduler=scheduler, executor="sim", **defaults | changes)


@pytest.fixture
def here(tmp_path) -> str:
    """A device file that holds for `config()`."""
    steps = STEPS | {"settings": step_settings(MODEL, config(), packer())}
    return write(tmp_path / "here.json", device_file() | {"steps": steps})


def test_a_simulated_run_takes_measured_steps(here):
    """A prompt of 8 tokens, then three decode steps at 9, 10 and 11: 20 units, then 4 each, and one of the host's that
    remains in each."""
    engine = Engine.from_pretrained("tiny-1m", dataclasses.replace(config(), sim=SimConfig(here)))
    (output,) = engine.generate([[1] * 8])[:1]
    gaps = np.diff([record.end for record in engine.step_log if record.repeat == 1][:4])
    assert output.metrics.ttft_s == pytest.approx((20 + 1 + 2) * UNIT)
    assert gaps == pytest.approx([5 * UNIT] * 3)


def warnings_of(monkeypatch, file: str, settings: EngineConfig, model=MODEL) -> tuple[StepModel, list[str]]:
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    return with_measured_steps(StepModel(model, load_device(file)), settings, settings.scheduler.max_num_seqs), said


def test_settings_that_hold_need_no_words(monkeypatch, here):
    """The policy, the pool's size and the depth are not part of them; of the slots only the largest batch is."""
    chunked = dataclasses.replace(config(max_num_seqs=3, async_depth=0), cache=CacheConfig(num_pages=999))
    chunked = dataclasses.replace(chunked, scheduler=SchedulerConfig("chunked", max_num_seqs=3))
    cost, said = warnings_of(monkeypatch, here, chunked, MODEL.replace(name="renamed"))
    assert isinstance(cost, MeasuredSteps) and not said


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"page_size": 32}, "page_size=16 (here 32)"),
        ({"max_num_seqs": 16, "query_tile": 16}, "max_rows=4 (here 16), query_tile=8 (here 16)"),
        ({"deterministic": True, "query_tile": 32}, "deterministic=False (here True), query_tile=8 (here 32)"),
    ],
)
def test_settings_that_differ_are_said_in_one_line(monkeypatch, here, changes, words):
    cost, said = warnings_of(monkeypatch, here, config(**changes))
    assert type(cost) is StepModel
    assert said == [f"device round: its measured steps are of {words}, so the roofline times the steps"]


def test_another_model_is_said_in_one_line(monkeypatch, here):
    cost, said = warnings_of(monkeypatch, here, config(), PRESETS["small-20m"])
    assert type(cost) is StepModel and len(said) == 1
    assert "model.ffn_size=128 (here 1152)" in said[0] and "more, so the roofline" in said[0]


def test_tables_without_a_match_are_only_the_roofline(tmp_path):
    """A device without measured steps says nothing."""
    plain = StepModel(MODEL, load_device(write(tmp_path / "plain.json", device_file())))
    assert with_measured_steps(plain, config(), SLOTS) is plain


def test_parsing_keeps_every_number():
    tables = StepTables.parse(STEPS, "here")
    assert (tables.host, tables.remains) == (2 * UNIT, UNIT)
    assert {key: (c.attended.tolist(), c.seconds.tolist()) for key, c in tables.curves.items()} == {
        (b["rows"], b["tiles"]): ([p["attended"] for p in b["points"]], [p["seconds"] for p in b["points"]])
        for b in CURVES
    }
    assert tables.curves[4, 0].excess.tolist() == [0, 48, 120] and tables.curves[2, 0].excess.tolist() == [0]
    assert tables.curves[4, 0].added / UNIT == pytest.approx([0, 4, 10])
