"""`serve --executor=sim`: the same program on a virtual clock, devices and models of one's own, and what is refused."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from engine.costmodel.device import HERE
from tests.experiments.programs import run

SIM = ("--executor=sim", "--model=llama2-7b", "--device=l20", "--max_context=4096")
LOAD = "synthetic:num=40,rate=1.5,prompt=lognormal:900:1800,output=lognormal:200:400,max_prompt=2500,max_output=1000"
DEVICE = """
import dataclasses
from engine.costmodel.device import load_device

def doubled():
    l20 = load_device("l20")
    return dataclasses.replace(l20, name="l20x2", hardware=dataclasses.replace(l20.hardware, memory_gbs=1728))
"""
MODEL = 'from engine.config import ModelConfig\nMINE = ModelConfig("mine", 16, 2048, 16, 8, 128, 8192, 32000, 8192)\n'


def serve(out: Path, *flags: str):
    code, _, err = run("serve", *flags, f"--workload={LOAD}", f"--out={out}")
    assert code == 0, err
    return json.loads((out / "summary.json").read_text())


def test_the_same_run_writes_the_same_files(tmp_path):
    """Invariant 6, with preemption, swap and copies; only config.json knows where and when it ran."""
    flags = (*SIM, "--num_pages=12000", "--preemption=swap", "--host_bytes=20GiB")
    first, second = (serve(tmp_path / name, *flags) for name in ("a", "b"))
    assert first == second and first["completed"] == 40 and first["total_preemptions"] > 0
    assert first["link_bytes_out"] == first["link_bytes_in"] > 0
    assert 0 < first["link_gbs_out"] <= 26 and 0 < first["link_gbs_in"] <= 26  # of the L20's link
    for name in ("requests.jsonl", "steps.jsonl", "copies.jsonl", "flags.txt"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    rows = [json.loads(line) for line in (tmp_path / "a/steps.jsonl").read_text().splitlines()]
    ends = [row["end"] for row in rows]
    assert ends == sorted(ends) and all(a["end"] <= b["start"] + 1e-6 for a, b in pairwise(rows))
    assert sum(row["num_tokens"] for row in rows) == first["total_output_tokens"]


def test_a_device_and_a_model_of_ones_own_are_one_file_each(tmp_path):
    (tmp_path / "mine.py").write_text(DEVICE)
    (tmp_path / "shapes.py").write_text(MODEL)
    flags = ("--executor=sim", f"--model_spec={tmp_path}/shapes.py:MINE")
    slow = serve(tmp_path / "slow", *flags, "--device=l20")
    fast = serve(tmp_path / "fast", *flags, f"--device={tmp_path}/mine.py:doubled")
    assert fast["mean_tpot_ms"] < 0.75 * slow["mean_tpot_ms"]  # decode is bound by memory
    assert fast["mean_prefill_ms"] == pytest.approx(slow["mean_prefill_ms"], rel=0.2)  # prefill is not
    copied = tmp_path / "copy.json"
    device = json.loads((HERE / "devices/l20.json").read_text())
    copied.write_text(json.dumps(device))
    same = serve(tmp_path / "same", *flags, f"--device={copied}")
    assert same["mean_ttft_ms"] == slow["mean_ttft_ms"]


REFUSED = {
    "--device=h1000": "device 'h1000' is unknown; known: a10, a100,",
    "--stack=tgi": "device l20 has no constants 'tgi'; known:",
    "--kernels=flash": "kernels 'flash' are unknown; known: vllm-0.4.2,",
    "--model=llama3.1-70b": "the model does not fit: ",
    "--num_pages=140000": "the model does not fit: 1.74 GiB too little on each l20",
    "--executor=jax": "--device=l20 is for --executor=sim",
    "--pipeline=33": "pipeline=33 stages for the 32 layers of llama2-7b",
    "--tensor=3": "do not divide over tensor=3 devices",
    "--device=nowhere.json": "device file nowhere.json cannot be read",
    "--coordinator=localhost:1": "--coordinator=localhost:1 shares real devices",
    "--link_sharing=lifo": "value should be one of <ps|fifo>",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_cannot_be_simulated_is_one_line(flag, tmp_path):
    code, _, err = run("serve", *SIM, flag, f"--out={tmp_path}")
    assert code == 2 and REFUSED[flag] in err.splitlines()[-1], err


def test_estimates_say_so_and_jax_stays_out(tmp_path):
    _, _, err = run("serve", *SIM, f"--workload={LOAD}", f"--out={tmp_path}")
    assert "are estimates" in err and "link_latency_us" in err
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["device"] is None and config["weights_hash"] is None
    assert config["engine"]["sim"]["device"] == "l20"
