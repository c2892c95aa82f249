"""Figures 8 and 9 of LayerKV on cells made by hand."""

import pytest

from experiments.figures.layerkv.fig8 import Fig8
from experiments.figures.layerkv.fig9 import VARIED_AT, Fig9
from experiments.figures.layerkv.setting import LAYERKV, NO_RULE, VLLM
from experiments.figures.layerkv.sharegpt import RATES, VARIANTS
from tests.experiments.figures.layerkv_cells import cell, cells_of, failed, judged

CAPACITY = 2.55  # requests/s: 2.25 and less are at most 0.88 of it, 2.8 is 1.1, 3.1 is 1.22, 3.8 is 1.5


def past_the_knee(figure, ours, first, no_rule=None) -> dict:
    """All policies are equal up to capacity; beyond it they are what is said."""
    cells = cells_of(figure, CAPACITY)
    for rate in RATES:
        if rate > CAPACITY:
            cells |= {(rate, LAYERKV): ours, (rate, VLLM): first, (rate, NO_RULE): no_rule or ours}
    return cells


def test_figure_8_as_the_paper_says():
    cells = past_the_knee(Fig8(), cell(500.0), cell(5000.0))
    assert failed(Fig8(), cells) == []
    assert failed(Fig8(), past_the_knee(Fig8(), cell([500.0, 600.0]), cell(5000.0))) == [
        "P99 TTFT, times lower, loads 1 to 1.25, where most (the paper's: 45)"
    ]
    slow = past_the_knee(Fig8(), cell(500.0, output_throughput=96.9), cell(5000.0))
    assert failed(Fig8(), slow) == ["tok/s over vLLM's"]
    cells[RATES[0], LAYERKV] = cell(1000.0, p99_ttft_ms=1200.0)
    assert failed(Fig8(), cells) == ["P99 TTFT over vLLM's up to a load of 0.9"]


def test_far_beyond_capacity_is_not_just_past_the_knee():
    cells = past_the_knee(Fig8(), cell(500.0), cell(1000.0))
    cells[RATES[-1], VLLM] = cell(50_000.0)
    assert [name for name in failed(Fig8(), cells) if name.startswith("P99 TTFT, times lower")]


def test_figure_9_as_the_paper_says():
    ours, first, no_rule = (cell(slo_attainment=met) for met in (0.9, 0.7, [0.6, 0.65]))
    cells = past_the_knee(Fig9(), ours, first, no_rule)
    assert failed(Fig9(), cells) == []
    cells[RATES[0], LAYERKV] = cell(slo_attainment=[1.0, 0.99])
    assert failed(Fig9(), cells) == ["vLLM's violations less LayerKV's"]
    narrow = past_the_knee(Fig9(), cell(slo_attainment=[0.9, 0.84]), first, ours)
    assert failed(Fig9(), narrow) == [
        "largest difference (the paper's: .177 to .287)",
        "violations without the SLO rule, less vLLM's",
    ]


def test_figure_9_adds_variants_to_the_runs_of_figure_8():
    own, other = Fig8().points("sim"), Fig9().points("sim")
    assert {key: other[key] for key in own} == own
    more = {key: point for key, point in other.items() if key not in own}
    assert set(more) == {(rate, name) for rate in VARIED_AT for name in VARIANTS}
    lengths = {point.config.scheduler.layerkv.lengths for point in more.values()}
    assert (
        lengths == {"oracle", "bucket", "mean", "quantile"}
        and own[RATES[0], LAYERKV].config.scheduler.layerkv.lengths == "quantile"
    )


def test_a_variants_rows_are_where_it_was_run():
    table = Fig9().evaluate(cells_of(Fig9(), CAPACITY), "sim").table
    assert table.column("rate", policy=next(iter(VARIANTS))) == [*VARIED_AT]
    assert table.column("rate", policy=LAYERKV) == [*RATES]
    assert judged(Fig8(), cells_of(Fig8(), CAPACITY))


@pytest.mark.parametrize("figure", [Fig8(), Fig9()])
def test_they_can_be_drawn(figure, tmp_path):
    figure.draw(figure.evaluate(cells_of(figure, CAPACITY), "sim"), tmp_path / "figure")
    assert all((tmp_path / f"figure.{kind}").stat().st_size > 10_000 for kind in ("png", "pdf"))
