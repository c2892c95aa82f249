"""Decode steps beside copies on a shared link: one worked out by hand, and Llama-3.1-70B on four L20s."""

import json
from types import SimpleNamespace

import pytest

from engine.config import EngineConfig, SimConfig
from engine.costmodel.device import load_device
from engine.costmodel.step_model import StepModel, StepTime, StepWork
from engine.presets import preset
from experiments.link_slowdown import decodes, slowdown
from tests.experiments import programs

L20 = load_device("l20")  # 25e9 bytes/s on each link, the first byte after 10 us


def config(unit: int, aware=True, sharing="ps") -> EngineConfig:
    return EngineConfig(
        executor="sim", sim=SimConfig("l20", link_aware=aware, link_sharing=sharing), tensor=4, link_unit_bytes=unit
    )


@pytest.mark.parametrize(
    "background, sharing, aware, waits",
    [
        # 0.01 ms of latency, then four blocks of 0.25 ms. In turn, each is a unit of 0.16 ms and one of 0.09 ms: the
        # all-reduce of 0.375 ms waits for the end of one at 0.42; until 0.545 it has the link. The second would run
        # from 0.92 (0.795 without the first), and the unit under way ends at 0.92 + 0.125.
        ("swap", "fifo", True, 0.045 + 0.125),
        # Sharing, a unit ends every 0.16 ms from 0.01 on: at 0.49; the second one asks at 0.99 (0.865), until 0.97.
        ("swap", "ps", True, 0.115 + 0.105),
        # All has left at 1.01 ms.
        ("swap", "fifo", False, 0.635),
        ("swap", "ps", False, 0.635),
        # A block leaves from 0.01 to 0.26 ms of the next layer, before any all-reduce.
        ("park", "ps", True, 0),
        ("park", "ps", False, 0),
    ],
)
def test_by_hand(background, sharing, aware, waits):
    """Four layers of 1 ms, two all-reduces of 0.125 ms in each; copies of a quarter of what the links carry in 4 ms."""
    cost = SimpleNamespace(profile=L20, step=lambda work: StepTime(0.0, 0.0, 1e-3, 0.25e-3, 0.0, 4))
    found = slowdown(cost, config(4_000_000, aware, sharing), [StepWork()], background, 0.25)
    assert found.step == pytest.approx(4e-3 + waits * 1e-3) and found.alone == 4e-3
    assert found.worst_wait == pytest.approx(waits * 1e-3) and found.wait == pytest.approx(waits / 4 * 1e-3)
    assert found.bound == pytest.approx(2 * 0.16e-3)


@pytest.mark.parametrize("sharing", ["ps", "fifo"])
def test_small_units_that_yield_hardly_slow_llama_70b_and_others_do(sharing):
    """The research note: at most 3% where copies yield in small units; visibly more in large ones, and without. The
    links are busy for a quarter of the time."""
    cost, works = StepModel(preset("llama3.1-70b"), L20, tensor=4), decodes(32, 2048, 10)
    of = lambda unit, aware=True: slowdown(cost, config(unit, aware, sharing), works, "swap", 0.25)  # noqa: E731
    small, large, unaware = of(500_000), of(64_000_000), of(500_000, aware=False)
    assert small.slowdown < 0.03 and large.slowdown > 0.08 and unaware.slowdown > 0.2
    for unit in (500_000, 2_000_000, 8_000_000, 64_000_000):
        found = of(unit)
        assert found.bound == pytest.approx(2 * unit / 25e9) and 0 < found.worst_wait <= found.bound + 1e-9
        assert found.step - found.alone <= cost.model.num_layers * found.bound
    assert of(1).slowdown == pytest.approx(0, abs=1e-6)


def test_the_program_prints_every_case():
    code, out, err = programs.run("link_units", "--unit=2MB", "--unit=0", "--load=0.25", "--steps=2", "--rows=4")
    assert code == 0, err
    line = json.loads(out.splitlines()[-1], parse_constant=pytest.fail)
    cases = [(c["background"], c["yields"], c["unit"], c["bound_us"]) for c in line["cases"]]
    assert cases == [
        (b, *rest) for b in ("swap", "park") for rest in (("yes", "2MB", 160), ("yes", "0", None), ("no", None, None))
    ]
    assert out.startswith("llama3.1-70b on 4 x l20, 4 rows: ")
    code, _, err = programs.run("link_units", "--device=h100")
    assert code == 2 and "--device=h100 --tensor=4: no all-reduces travel over the link to the host" in err
    assert "--unit: expected bytes" in programs.run("link_units", "--unit=2Mx")[2]
