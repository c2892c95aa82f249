"""Figures 6 and 6_count of LayerKV on cells made by hand."""

import pytest

from experiments.figures.layerkv.fig6 import CONTEXTS, RATES, Fig6
from experiments.figures.layerkv.fig6_count import COUNTS, PAPER, STABLE, Fig6Count
from experiments.figures.layerkv.setting import LAYERKV, LLAMA3_70B, NO_RULE, PAGED_PARK, VLLM
from tests.experiments.figures.layerkv_cells import baseline, cell, cells_of, failed, judged

NO_RULES = cell(900.0, slo_attainment=0.2, mean_tpot_ms=400.0)


def as_claimed(capacity: float = 0.3, **ours) -> dict:
    """Overloaded everywhere; LayerKV is what the paper says unless `ours` says otherwise."""
    policies = baseline(30_000.0, slo_attainment=0.3) | {LAYERKV: cell(**{"ttft": 1000.0} | ours), NO_RULE: NO_RULES}
    return cells_of(Fig6(), capacity, policies)


def test_the_papers_claims_pass():
    assert failed(Fig6(), as_claimed()) == []
    assert judged(Fig6(), as_claimed())["mean TTFT over vLLM's up to a load of 0.9"].passed is None
    rows = Fig6().evaluate(as_claimed(), "sim").table
    assert len(rows.rows) == 4 * sum(map(len, CONTEXTS.values()))
    assert set(rows.column("lower by", policy=LAYERKV)) == {30.0}


@pytest.mark.parametrize(
    "ours, missed",
    [
        ({"ttft": [1000.0, 2000.0]}, "largest gain"),  # 30 and 15
        ({"mean_tpot_ms": 210.0}, "TPOT where fewer than half violate"),
        ({"output_throughput": 94.0}, "tok/s over vLLM's"),
    ],
)
def test_a_claim_that_does_not_hold_fails(ours, missed):
    (name,) = failed(Fig6(), as_claimed(**ours))
    assert name.startswith(missed)


def test_below_the_knee_a_gain_is_as_wrong_as_a_loss():
    """Capacity for all: 30 times lower is not what happens without pressure."""
    found = failed(Fig6(), as_claimed(capacity=2.0))
    assert found == ["mean TTFT over vLLM's up to a load of 0.9"]


def test_the_gain_is_that_of_each_models_best_context():
    cells = as_claimed()
    for context in CONTEXTS[LLAMA3_70B]:
        cells[LLAMA3_70B.name, context, LAYERKV] = cell(30_000.0 / (19 if context == 2048 else 2))
    (name,) = (n for n in failed(Fig6(), cells) if n.startswith("largest gain"))
    assert (
        judged(Fig6(), cells)[name].reached
        == "19 (Llama3.1-70B at 2K) to 30x (Llama2-7B at 512); outside at Llama3.1-70B at 2K"
    )


def test_an_ablation_that_is_never_worse_fails():
    cells = as_claimed()
    cells |= {key: cell(slo_attainment=0.3) for key in cells if key[-1] == NO_RULE}
    assert failed(Fig6(), cells) == ["violations without the SLO rule, less vLLM's"]


def test_the_ratio_grows_only_where_the_queue_does():
    cells = cells_of(Fig6Count(), 0.6)
    for num in COUNTS:
        cells[PAPER, num, VLLM] = cell([20.0 * num, 30.0 * num])
    assert failed(Fig6Count(), cells) == []
    verdict = next(v for name, v in judged(Fig6Count(), cells).items() if "twice as many" in name)
    assert verdict.reached == "2 (50 requests, 1/s) to 2x (50 requests, 1/s)"
    cells[PAPER, 400, LAYERKV] = cell([1000.0, 2100.0])  # the second seed's ratio falls
    assert [name for name in failed(Fig6Count(), cells) if "twice as many" in name]
    cells[STABLE, 25, LAYERKV] = cell(1200.0)
    assert f"times lower at {STABLE:g}/s" in failed(Fig6Count(), cells)


@pytest.mark.parametrize("figure, cells", [(Fig6(), as_claimed), (Fig6Count(), lambda: cells_of(Fig6Count(), 0.6))])
def test_they_can_be_drawn(figure, cells, tmp_path):
    figure.draw(figure.evaluate(cells(), "sim"), tmp_path / "figure")
    assert all((tmp_path / f"figure.{kind}").stat().st_size > 10_000 for kind in ("png", "pdf"))


def test_policies_serve_the_same_requests():
    points = Fig6().points("sim")
    for setup in RATES:
        loads = {points[setup.name, 2048, policy].workload for policy in (VLLM, LAYERKV, NO_RULE, PAGED_PARK)}
        assert len(loads) == 1
