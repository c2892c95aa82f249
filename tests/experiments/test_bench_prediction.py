"""The comparison against runs that are foreseen exactly: the simulator stands in for the real engine."""

import dataclasses
from pathlib import Path

import pytest

from engine import Engine
from engine.config import CacheConfig, EngineConfig, SchedulerConfig, SimConfig
from experiments import bench_prediction, common_flags, workloads
from experiments.common_flags import laid_over
from experiments.quiet import Others
from experiments.replay import StopFlag

CONFIG = EngineConfig(
    cache=CacheConfig(num_pages=4 * 100), scheduler=SchedulerConfig(max_num_seqs=4), sim=SimConfig("h100")
)
CALM, BURST = "synthetic:num=6,rate=300,prompt=uniform:10:90,output=fixed:9", "burst:num=8,context=100,output=40"


@pytest.fixture
def one_engine(monkeypatch):
    """Every engine is a simulated one; `slower` stretches the steps of those that should be real."""

    def install(slower: float = 1.0):
        def load(model: str, config: EngineConfig) -> Engine:
            engine = Engine.from_pretrained(model, dataclasses.replace(config, executor="sim"))
            if config.executor == "jax":
                engine._fast_forward = None
                step = engine.executor.cost.step
                engine.executor.cost.step = lambda work: stretched(step(work))
            return engine

        def stretched(time):
            return time._replace(**{part: slower * getattr(time, part) for part in ("embed", "layer", "tail")})

        monkeypatch.setattr(common_flags, "load_engine", load)

    return install


def compare(*policies: str, loads=(CALM, BURST), repeats=2):
    configs = {f"policy={p}": laid_over(CONFIG, f"policy={p}") for p in policies}
    others = Others(1.0, 0.0)
    simulator = bench_prediction.Simulator("tiny-1m", CONFIG, Path("unused"), None, others)
    built = {source: workloads.build(source) for source in loads}
    return bench_prediction.compare(simulator, configs, built, repeats, 0, others, StopFlag())


def test_what_is_foreseen_exactly_passes_every_gate(one_engine):
    one_engine()
    rows, gates, overall = compare("vllm_v0", "chunked")
    assert [(r["workload"], r["engine"]) for r in rows] == [
        (w, f"policy={p}") for w in (CALM, BURST) for p in ("vllm_v0", "chunked")
    ]
    for row in rows:
        assert [row[m]["ratio"] for m in bench_prediction.METRICS] == pytest.approx([1, 1, 1])
        assert row["step_mape"] < 1e-6 and row["repeat_mape"] < 1e-6 and row["steps"] >= 2 * 9
        assert row["preemptions"]["measured"] == [row["preemptions"]["predicted"]] * 2
    assert {g.name for g in gates if g.passed is not True} <= {"same winner"}
    assert overall["repeats"] == 2 and overall["steps_by"] == ["StepModel"]
    table = bench_prediction.table_of(rows) + bench_prediction.gate_table(gates)
    assert table.count("= 1.00") == 12 and "burst" in table and "passed" in table and "missed" not in table


def test_an_engine_that_is_a_quarter_slower(one_engine):
    """A burst keeps the device busy: throughput is overestimated by a quarter, steps are 1 / 1.25 of what they are."""
    one_engine(slower=1.25)
    (row,), gates, overall = compare("vllm_v0", loads=(BURST,))
    assert row["step_mape"] == pytest.approx(0.2, rel=1e-3) and row["step_bias"] == pytest.approx(-0.2, rel=1e-3)
    assert row["output_throughput"]["ratio"] == pytest.approx(1.25, rel=1e-2)
    assert row["mean_ttft_ms"]["ratio"] == pytest.approx(0.8, rel=1e-2)
    assert {g.name: g.passed for g in gates} == {
        "step MAPE": False, "throughput": False, "TTFT at >= 1.5x capacity": True, "policy ratios": None,
        "same winner": None,
    }  # fmt: skip
    assert overall["repeat_mape"] < 1e-6


def test_an_interrupted_first_repeat_compares_nothing(one_engine, monkeypatch):
    one_engine()
    monkeypatch.setattr(bench_prediction, "run_all", lambda *args: {("w", "e"): []})
    assert compare("vllm_v0", loads=(BURST,)) is None
