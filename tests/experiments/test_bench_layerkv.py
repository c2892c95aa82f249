"""The sweep over the load, on the virtual clock: what is measured first sets the rest, and an interruption loses no
repeat that was whole."""

import importlib.util
import json

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.presets import PRESETS
from experiments.common_flags import laid_over
from experiments.scaled_point import Machine, ScaledPoint
from tests.experiments import programs

SIMULATED = (
    "--model=tiny-1m", "--executor=sim", "--device=l20", "--patience=0", "--prompt=64", "--output=16",
    "--pool_prompts=4", "--num=12", "--loads=0.5,2",
)  # fmt: skip
MODEL, POINT = PRESETS["small-20m"], ScaledPoint(prompt=250, output=50, pool_prompts=2.5, num=40)


def test_the_point_sizes_the_pool_and_what_is_measured_the_link_and_the_objective():
    """2.5 prompts of 16 pages in 8 layers; 250 tokens of 8 x 1,024 bytes in 0.107 of 0.1 s; 3 times 20 ms."""
    base = POINT.config(EngineConfig(), MODEL)
    assert base.cache.num_pages == 320 and base.max_context == 300 and base.cache.host_bytes > 0
    machine = Machine(prefill_s=0.1, capacity=5.0, tpot_s=0.02)
    settled = machine.settled(base, POINT, MODEL)
    assert settled.link_gbs == pytest.approx(250 * 8 * 1024 / 0.0107 / 1e9)
    assert settled.scheduler.layerkv.tpot_slo == pytest.approx(0.06)


@pytest.mark.parametrize("text", ["num_pages=9", "device_bytes=1MiB", "link_gbs=1", "layerkv_tpot_slo=0.1"])
def test_what_the_point_sets_is_refused(text):
    with pytest.raises(ConfigError, match="leave"):
        POINT.config(laid_over(EngineConfig(), text), MODEL)


def test_a_seed_has_the_same_arrivals_at_every_load_and_fewer_below_capacity():
    calm, busy = POINT.arrivals(0.5, 4.0, 3), POINT.arrivals(2.0, 4.0, 3)
    assert (len(calm), len(busy)) == (20, 40)
    assert [r.arrival_s / 4 for r in calm] == pytest.approx([r.arrival_s for r in busy[:20]], rel=1e-4)
    assert {(r.prompt_len, r.output_len) for r in calm + busy + POINT.burst(3)} == {(250, 50)}
    assert len(POINT.burst(3)) == 40 and {r.arrival_s for r in POINT.burst(3)} == {0.0}
    assert POINT.arrivals(1.0, 4.0, 4)[0].arrival_s != POINT.arrivals(1.0, 4.0, 3)[0].arrival_s


def record(path):
    """What a sweep wrote, and its runs by (load, policy)."""
    kept = json.loads((path / "layerkv.json").read_text())
    return kept, {(c["load"], c["policy"]): c["runs"] for c in kept["cells"]}


def test_an_interrupted_sweep_goes_on_with_what_it_had(tmp_path):
    """Killed after its first repeat; --resume serves two more at the rates that had been measured."""
    process = programs.start("bench_layerkv", *SIMULATED, f"--out={tmp_path}", "--repeats=100000")
    for line in process.stdout:
        if line.startswith("repeat 1 of"):
            break
    process.kill()
    process.communicate()
    before, first = record(tmp_path)
    whole = len(first[2.0, "layerkv"])
    assert whole >= 1 and {len(runs) for runs in first.values()} == {whole}
    more = (f"--out={tmp_path}", "--resume", f"--repeats={whole + 2}")
    code, stdout, stderr = programs.run("bench_layerkv", *SIMULATED, *more)
    assert code == 0, stderr
    after, runs = record(tmp_path)
    assert after["machine"] == before["machine"] and runs.keys() == first.keys() and len(runs) == 2 * 4
    for pair, done in runs.items():
        assert done[:whole] == first[pair] and len(done) == whole + 2
        assert {run["completed"] for run in done} == {12 if pair[0] > 1 else 6}
    assert any(run["link_bytes_out"] for run in runs[2.0, "layerkv"]), "layers leave"
    line = json.loads(stdout.splitlines()[-1])
    assert line["bench"] == "layerkv" and line["repeats"] == whole + 2 and len(line["gates"]) == 5
    assert (tmp_path / "load.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    code, _, stderr = programs.run("bench_layerkv", *SIMULATED, *more, "--num=13")
    assert code == 2 and "has another point; give the flags it was made with" in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--loads=1,x",), "--loads=1,x: expected numbers > 0, each once"),
        (("--loads=1,1",), "--loads=1,1: expected numbers > 0, each once"),
        (("--resume",), "layerkv.json cannot be read as a sweep"),
        (("--num_pages=100",), "leave num_pages, device_bytes and device_fraction out"),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, message):
    code, _, stderr = programs.run("bench_layerkv", *SIMULATED, f"--out={tmp_path}", *flags)
    assert code == 2 and message in stderr and stderr.count("\n") == 1
