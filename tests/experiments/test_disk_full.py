"""A disk that fills up: one line that names the file, exit code 2, whole rows kept, nothing half-written left."""

import json

import pytest

from engine.errors import OutputError
from engine.files import RowFile, write_whole
from engine.models.weights import export_hf, init_params
from engine.presets import preset
from experiments.convert_checkpoint import convert_hf
from tests.experiments import programs

WORKLOAD = "synthetic:rate=100,num=40,prompt=uniform:5:40,output=uniform:1:6"


def check_one_line(code: int, stderr: str, name: str) -> None:
    assert code == 2 and stderr.count("\n") == 1
    assert name in stderr and "cannot be written" in stderr and "File too large" in stderr


def test_serve_keeps_the_rows_it_wrote(tmp_path):
    """steps.jsonl is the first to reach the limit, in the middle of a row."""
    out = tmp_path / "run"
    arguments = ("--model=timed", f"--workload={WORKLOAD}", f"--out={out}")
    code, _, stderr = programs.run("serve", *arguments, timed=True, max_file_bytes=9_000)
    check_one_line(code, stderr, "steps.jsonl")
    steps = (out / "steps.jsonl").read_text()
    assert 8_000 < len(steps) <= 9_000 and steps.endswith("}\n")
    assert [json.loads(line)["step"] for line in steps.splitlines()] == list(range(1, steps.count("\n") + 1))
    assert all(json.loads(line)["id"] for line in (out / "requests.jsonl").read_text().splitlines())
    assert json.loads((out / "config.json").read_text())["model"] == "timed"
    assert not (out / "summary.json").exists() and not list(out.glob("*.partial"))


def test_serve_that_cannot_write_its_settings(tmp_path):
    """config.json is written before anything is served."""
    out = tmp_path / "run"
    arguments = ("--model=timed", f"--workload={WORKLOAD}", f"--out={out}")
    code, _, stderr = programs.run("serve", *arguments, timed=True, max_file_bytes=100)
    check_one_line(code, stderr, "config.json")
    assert all(not p.stat().st_size for p in out.iterdir())


@pytest.mark.parametrize("source", ["hf", "orbax"])
def test_a_conversion_leaves_nothing(tmp_path, source):
    model = preset("tiny-1m").replace(num_layers=1)
    export_hf(init_params(model), model, tmp_path / "hf")
    convert_hf(tmp_path / "hf", tmp_path / "orbax", None)
    before = sorted(tmp_path.iterdir())
    code, _, stderr = programs.run(
        "convert_checkpoint", f"--{source}={tmp_path / source}", f"--out={tmp_path / 'new'}", max_file_bytes=300_000
    )
    check_one_line(code, stderr, "new")
    assert stderr.endswith(" cannot be written: File too large\n")  # and nothing of tensorstore's report
    assert sorted(tmp_path.iterdir()) == before


def test_a_device_that_is_always_full(tmp_path):
    """/dev/full takes nothing; what a file held before stays."""
    (tmp_path / "rows").symlink_to("/dev/full")
    rows = RowFile(tmp_path / "rows")
    with pytest.raises(OutputError, match="rows cannot be written: No space left on device"):
        rows.add("x")
    (tmp_path / "settings.partial").symlink_to("/dev/full")
    (tmp_path / "settings").write_text("old")
    with pytest.raises(OutputError, match="settings cannot be written: No space left on device"):
        write_whole(tmp_path / "settings", "new")
    assert (tmp_path / "settings").read_text() == "old"
