"""Figures 7 and 7_link of LayerKV on cells made by hand, and decode steps beside copies."""

import pytest

from experiments.figures.layerkv import fig7, fig7_link
from experiments.figures.layerkv.fig7 import SETUPS, Fig7
from experiments.figures.layerkv.fig7_link import UNITS, WORDS, Fig7Link
from experiments.figures.layerkv.setting import LAYERKV, VLLM
from tests.experiments.figures.layerkv_cells import cell, cells_of, failed

HALF = "times lower TTFT, over that on half as many"
ONE = "times lower TTFT, over that on one L20"


def tensor_cells(*gains: float) -> dict:
    """LayerKV's TTFT so many times lower on 1, 2, 4, 8 devices."""
    cells = cells_of(Fig7(), 0.6)
    for setup, gain in zip(SETUPS, gains, strict=True):
        cells |= {(setup.name, VLLM): cell(1000.0 * gain), (setup.name, LAYERKV): cell(1000.0)}
    return cells


@pytest.mark.parametrize(
    "gains, missed",
    [((30, 4, 1, 1.05), []), ((30, 16, 1, 1), [ONE]), ((30, 4, 8, 1), [HALF]), ((1, 1, 1, 1), [ONE])],
)
def test_the_gain_must_fall_with_devices(gains, missed):
    assert failed(Fig7(), tensor_cells(*gains)) == missed


def test_the_pool_grows_by_more_than_the_devices():
    """Weights are there once, whatever the number of devices: 13.5 GB of 0.9 x 45 GiB on one; 0.5 MiB a token."""
    pools = [fig7.pool_tokens(setup) for setup in SETUPS]
    assert 45_000 < pools[0] < 60_000 and pools[1] > 2.3 * pools[0] and pools[3] > 2 * pools[2] > 4 * pools[1]


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(fig7_link, "STEPS", 3)


def test_copies_that_yield_late_or_never_slow_more(few_steps):
    slower = fig7_link.slower_steps()
    for copies in WORDS.values():
        assert slower[copies, 0.1, "2 MB"] <= slower[copies, 0.5, "2 MB"]
    burst = [slower[WORDS["swap"], 0.25, unit] for unit in UNITS]
    assert burst == sorted(burst) and burst[0] > 0


def link_cells(tpot: dict[str, float]) -> dict:
    """By unit; 100 ms where it is not said."""
    return cells_of(Fig7Link(), 1.0, {unit: cell(mean_tpot_ms=tpot.get(unit, 100.0)) for unit in ("none", *UNITS)})


def test_runs_are_held_against_one_that_never_waits(few_steps):
    missed = lambda tpot: [name for name in failed(Fig7Link(), link_cells(tpot)) if "runs" in name]  # noqa: E731
    few, many = "TPOT of runs, 4 MiB", "TPOT of runs, 64 MB or never"
    assert missed({"64 MB": 104.0, "never": 110.0}) == []
    assert missed({"64 MB": 104.0, "never": 110.0, "4 MiB": 103.5}) == [few]
    assert missed({"64 MB": 102.0, "never": 110.0}) == [many]
    assert missed({"64 MB": 104.0, "never": 110.0, "none": 90.0}) == [few]


def test_they_can_be_drawn(few_steps, tmp_path):
    for figure, cells in ((Fig7(), tensor_cells(30, 4, 1, 1)), (Fig7Link(), link_cells({}))):
        figure.draw(figure.evaluate(cells, "sim"), tmp_path / "figure")
        assert all((tmp_path / f"figure.{kind}").stat().st_size > 10_000 for kind in ("png", "pdf"))
