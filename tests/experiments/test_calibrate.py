"""Calibration, end to end on a tiny model: the file drives a simulated run."""

import json

import pytest

from engine.config import EngineConfig
from engine.costmodel.device import load_device
from engine.costmodel.measured_steps import MeasuredSteps, step_settings
from engine.executor.packing import Packer
from engine.presets import PRESETS
from tests.experiments import programs

ENGINE = (
    "--model=tiny-1m", "--num_pages=200", "--max_context=192", "--max_num_seqs=2", '--config={"max_tiles": 1}',
    "--compilation_cache_dir=",
)  # fmt: skip
WORKLOAD = "--workload=burst:num=3,context=40,output=5"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """The device file of a calibration without a time budget, and what was printed."""
    path = tmp_path_factory.mktemp("calibrated") / "cpu-here.json"
    code, out, err = programs.run("calibrate", *ENGINE, "--seconds=0.1", "--patience=0", f"--out={path}")
    assert code == 0, err
    return path, out


def test_the_file_holds_what_was_measured(calibrated):
    """A table for every bucket, each number with its count and spread, the machine, the commit and the settings."""
    path, out = calibrated
    raw, profile = json.loads(path.read_text()), load_device(str(path))
    packer = Packer(2, 64, 1, False)
    assert [(b["rows"], b["tiles"]) for b in raw["steps"]["buckets"]] == [(1, 0), (2, 0), (0, 1), (2, 1)]
    assert profile.steps.settings == step_settings(PRESETS["tiny-1m"], EngineConfig(max_tiles=1), packer)
    for bucket in raw["steps"]["buckets"]:
        curve = profile.steps.curves[bucket["rows"], bucket["tiles"]]
        assert [p["seconds"] for p in bucket["points"]] == curve.seconds.tolist()
    numbers = [p for b in raw["steps"]["buckets"] for p in b["points"]] + raw["measurements"]["ops"]
    assert all(n["seconds"] > 0 and n["count"] >= 2 and n["spread"] >= 0 for n in numbers)
    assert not profile.estimated
    about = raw["measurements"]["made_by"]
    assert about["packages"]["jax"] and about["host"]["cpus"] and "commit" in about
    assert raw["measurements"]["engine"]["cache"]["num_pages"] == 200
    assert json.loads(out.splitlines()[-1])["file"] == str(path)
    assert MeasuredSteps(PRESETS["tiny-1m"], profile, profile.steps, packer, 1).host == profile.steps.host


def test_it_drives_a_simulated_run(calibrated, tmp_path):
    """Three prompts for two slots; the run takes the file's times and nothing is said, or the roofline's and it is."""
    path, _ = calibrated
    sim = (*ENGINE, "--executor=sim", f"--device={path}", WORKLOAD)
    code, out, err = programs.run("serve", *sim, f"--out={tmp_path}/same")
    assert (code, "roofline" in err) == (0, False), err
    summary = json.loads(out.splitlines()[-1])
    assert summary["completed"] == 3 and summary["duration"] > 0
    code, _, err = programs.run("serve", *sim, "--page_size=32", f"--out={tmp_path}/other")
    said = [line for line in err.splitlines() if "roofline" in line]
    assert code == 0 and len(said) == 1
    assert "its measured steps are of page_size=16 (here 32), so the roofline times the steps" in said[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--out=here.txt"], "--out=here.txt must name a .json file in a folder that is there"),
        (["--out=no/such/here.json"], "--out=no/such/here.json must name a .json file in a folder that is there"),
        (["--out=pyproject.toml.json", "--executor=sim"], "--executor=jax and --max_num_seqs of at least 2"),
        (["--out=x.json", "--config={}", "--max_context=256"], "16 query tiles of 64 tokens do not fit"),
    ],
)
def test_bad_input_is_one_line(flags, message):
    code, _, err = programs.run("calibrate", *ENGINE, *flags)
    lines = [line for line in err.splitlines() if line.startswith("calibrate:")]
    assert code == 2 and len(lines) == 1 and message in lines[0], err
