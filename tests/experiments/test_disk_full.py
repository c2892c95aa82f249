"""A disk that fills up: one line that names the file, exit code 2, whole rows kept, nothing half-written left."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from engine.errors import OutputError
from engine.files import RowFile, write_whole
from engine.models.safetensors import write_file
from engine.models.weights import export_hf, init_params
from engine.presets import preset
from experiments import plots
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


SIMULATED = ("--model_spec=tiny-1m", "--executor=sim", "--device=h100", "--num_pages=64")
OVER_A_FILE = {  # the program's arguments, and the file that it writes over
    "workload": ("--workload=burst:num=9,context=8", "--out={0}/w.jsonl", "w.jsonl"),
    "bench_policies": (
        *SIMULATED,
        "--workload=burst:num=2,context=8,output=2",
        "--repeats=1",
        "--out={0}",
        "policies.json",
    ),
}


@pytest.mark.parametrize("program", OVER_A_FILE)
def test_what_was_there_stays(tmp_path, program):
    """A program that may overwrite, and cannot."""
    *arguments, name = OVER_A_FILE[program]
    (tmp_path / name).write_text("before")
    given = [argument.format(tmp_path) for argument in arguments]
    code, _, stderr = programs.run(program, *given, "--overwrite", max_file_bytes=200)
    check_one_line(code, stderr.splitlines(keepends=True)[-1], name)  # the device's estimates are said before
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "before"


def test_a_timeline_that_was_there_stays(tmp_path):
    """It is written from a run's other files."""
    run = {"id": "0", "status": "refused", "error": "too long", "arrival_s": 0.0}
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(run | {"id": str(i)}) + "\n" for i in range(99)))
    (tmp_path / "steps.jsonl").write_text("")
    (tmp_path / "timeline.json.gz").write_text("before")
    code, _, stderr = programs.run("timeline", str(tmp_path), max_file_bytes=200)
    check_one_line(code, stderr, "timeline.json.gz")
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "timeline.json.gz").read_text() == "before"


def test_a_figure_that_was_there_stays(tmp_path):
    """Each of its two files."""
    pytest.importorskip("matplotlib")
    (tmp_path / "ttft.png.partial").symlink_to("/dev/full")
    (tmp_path / "ttft.png").write_text("before")
    with pytest.raises(OutputError, match=r"ttft\.png cannot be written: No space left on device"):
        plots.ttft_figure([plots.TtftBar("1", 0.1, 0.2)], tmp_path / "ttft", "x", "y")
    assert [p.name for p in tmp_path.iterdir()] == ["ttft.png"] and (tmp_path / "ttft.png").read_text() == "before"


def test_weights_that_were_there_stay(tmp_path):
    """A safetensors file by itself, as `export_hf` writes it."""
    layout, arrays = {"w": ("F32", (2,))}, [np.ones(2, np.float32)]
    (tmp_path / "m.safetensors.partial").symlink_to("/dev/full")
    (tmp_path / "m.safetensors").write_text("before")
    with pytest.raises(OutputError, match=r"m\.safetensors cannot be written: No space left on device"):
        write_file(tmp_path / "m.safetensors", layout, arrays)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    """A link leads to the new content, and nothing takes the place of a device."""
    (tmp_path / "elsewhere").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere").read_text() == "new"
    (tmp_path / "null").symlink_to("/dev/null")
    write_whole(tmp_path / "null", "gone")
    assert Path("/dev/null").is_char_device() and sorted(p.name for p in tmp_path.iterdir()) == [
        "elsewhere",
        "link",
        "null",
    ]
    with pytest.raises(OutputError, match="elsewhere/x cannot be written: Not a directory"):
        write_whole(tmp_path / "elsewhere/x", "")


def test_every_file_goes_through_engine_files():
    """No module of the engine or the programs opens a file for writing by itself."""
    ours = [p for room in ("engine", "experiments") for p in (programs.ROOT / room).rglob("*.py")]
    by_hand = re.compile(
        r"\.write_(text|bytes)\(|\bopen\([^)]*[\"'][rwxa]?[wxa+][bt+]*[\"']|savefig\((?!drawn)|np\.savez?\b"
    )
    allowed = {"engine/files.py", "engine/models/safetensors.py"}  # the second opens what `whole_file` names
    found = {str(p.relative_to(programs.ROOT)) for p in ours if by_hand.search(p.read_text(encoding="utf-8"))}
    assert found == allowed


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
