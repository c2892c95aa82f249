"""A grid of points, by hand: what is laid over what, in which order, and what is refused."""

import pytest

from engine.errors import ConfigError
from experiments import workloads
from experiments.grid import SETTINGS, Axis, Grid
from experiments.points import Point

ENGINE, LOAD, SLO = "policy=vllm_v0,page_size=8", "synthetic:num=6,rate=300", "ttft:9"


def grid(*params: str, engine=ENGINE, workload=LOAD) -> Grid:
    return Grid([Axis.parse(text) for text in params], "tiny-1m", engine, workload, SLO)


def test_every_combination_of_values_is_a_point():
    """The last parameter varies fastest; a value that is varied replaces the one under it."""
    points = grid("page_size=16,32", "workload.rate=1,2.5", "model=small-20m").points()
    assert [*points] == [(size, rate, "small-20m") for size in ("16", "32") for rate in ("1", "2.5")]
    settings, load = f"{ENGINE},page_size=32", "synthetic:num=6,rate=2.5"
    assert points["32", "2.5", "small-20m"] == Point("small-20m", settings, load, slo=SLO)
    assert [p.config.cache.page_size for p in points.values()] == [16, 16, 32, 32]
    slow, fast = (workloads.build(f"{LOAD.replace('300', rate)},seed=0") for rate in ("1", "2.5"))
    assert [p.requests() for p in points.values()] == [slow, fast] * 2 and slow != fast


def test_what_is_not_varied_stays_as_it_is_written():
    (point,) = grid("policy=chunked", workload="azure-like").points().values()
    assert (point.model, point.workload) == ("tiny-1m", "azure-like")
    assert (point.config.scheduler.policy, point.config.cache.page_size) == ("chunked", 8)
    assert grid("policy=vllm_v1", engine="").points()[("vllm_v1",)].engine == "policy=vllm_v1"


@pytest.mark.parametrize(
    "spec, given, expected",
    [
        ("azure-like", {}, "azure-like"),
        ("azure-like", {"rate": "2"}, "azure-like:rate=2"),
        ("burst:num=2,output=4", {"output": "5", "context": "8"}, "burst:num=2,output=5,context=8"),
        ("azure:trace.csv,num=3", {"num": "4"}, "azure:trace.csv,num=4"),
        ("w.jsonl", {"rate_scale": "2"}, "frozen:w.jsonl,rate_scale=2"),
        ("path/to/mine.py:Build,a=1", {"a": "2"}, "path/to/mine.py:Build,a=2"),
    ],
)
def test_options_of_a_workload_are_replaced_or_added(spec, given, expected):
    assert workloads.with_options(spec, given) == expected
    assert workloads.with_options(expected, given) == expected


@pytest.mark.parametrize(
    "param, message",
    [
        (
            "pagesize=8",
            r"--param=pagesize=8: 'pagesize' is unknown; known: model, workload.OPTION, async_depth, .*page_size",
        ),
        ("executor=jax", "'executor' is unknown"),
        ("workload=burst", "'workload' is unknown"),
        ("seed=1,2", "--param=seed=1,2: every point runs with each seed of --seeds already"),
        ("workload.seed=1", "each seed of --seeds already"),
        ("page_size", "--param=page_size=: expected name=value,value,..."),
        ("page_size=8,,16", "expected name=value"),
        ("page_size=8,16,8", "--param=page_size=8,16,8: a value is given twice"),
        ("page_size=9", "page_size must be a power of two, got 9"),
        ("page_size=few", "page_size: .*'few'"),
    ],
)
def test_what_cannot_be_varied_is_one_line(param, message):
    with pytest.raises(ConfigError, match=message) as e:
        grid(param).points()
    assert "\n" not in str(e.value)


def test_parameters_are_given_once():
    with pytest.raises(ConfigError, match="--param=page_size is given twice: write its values into one"):
        grid("page_size=8", "policy=chunked", "page_size=16")
    with pytest.raises(ConfigError, match="--param is missing"):
        grid()


def test_what_is_known_is_what_a_point_takes():
    """Every flag of the engine but those that a point has its own way for."""
    assert {"policy", "device", "page_size", "tensor", "layerkv_slo_rule", "link_gbs"} <= {*SETTINGS}
    assert not {"seed", "executor", "model", "out"} & {*SETTINGS}
