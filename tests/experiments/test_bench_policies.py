"""Protects the comparison of policies: settings are written as flags are, and what was measured is kept as it comes."""

import json

import pytest

from engine.config import CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError
from experiments.common_flags import laid_over
from tests.experiments import programs

SIMULATED = ("--model_spec=tiny-1m", "--executor=sim", "--num_pages=256", "--workload=burst:num=4,context=40,output=8")


def test_settings_are_written_as_flags_are():
    """Floats, bytes with units, booleans; a size of the pool replaces the one it is laid over."""
    base = EngineConfig(CacheConfig(num_pages=9, transient_pages=3, host_bytes=1), SchedulerConfig(max_num_seqs=7))
    got = laid_over(base, "watermark=0.05,host_bytes=2MiB,preemption=swap,deterministic=true,device_bytes=1GiB", "--e")
    assert got == EngineConfig(
        CacheConfig(device_bytes=1 << 30, transient_pages=3, host_bytes=2 << 20),
        SchedulerConfig(max_num_seqs=7, watermark=0.05, preemption="swap"),
        deterministic=True,
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("watermark=lots", "--e=watermark=lots: watermark: could not convert string to float"),
        ("host_bytes=2Mi", "host_bytes: expected bytes such as 536870912, 512MiB or 2GiB, got '2Mi'"),
        ("store=disk", "store: value should be one of <paged|native>"),
        ("pages=3", "'pages=3' is not name=value of a flag of the engine"),
        ("order", "'order' is not name=value"),
        ("num_pages=3,device_bytes=1MiB", "sized twice, by num_pages and by device_bytes"),
        ("policy=lru", "policy 'lru' is unknown"),
    ],
)
def test_what_no_flag_would_take_is_refused(text, message):
    with pytest.raises(ConfigError) as e:
        laid_over(EngineConfig(), text, "--e")
    assert message in str(e.value) and "\n" not in str(e.value)


def test_every_repeat_is_kept_from_then_on(tmp_path):
    """Whatever ends the program. A second one does not write over what it left, unless it is told to."""
    process = programs.start("bench_policies", *SIMULATED, f"--out={tmp_path}", "--repeats=100000")
    for line in process.stdout:
        if line.startswith("repeat 3 of"):
            break
    process.kill()
    process.communicate()
    (run,) = json.loads((tmp_path / "policies.json").read_text())["runs"]
    assert len(run["summaries"]) >= 3 and run["summaries"][0]["completed"] == 4
    code, _, stderr = programs.run("bench_policies", *SIMULATED, f"--out={tmp_path}")
    assert code == 2 and "holds an earlier run (policies.json); name another, or --overwrite" in stderr
    code, stdout, stderr = programs.run("bench_policies", *SIMULATED, f"--out={tmp_path}", "--overwrite", "--repeats=2")
    assert code == 0 and json.loads(stdout.splitlines()[-1])["repeats"] == 2, stderr
    (run,) = json.loads((tmp_path / "policies.json").read_text())["runs"]
    assert len(run["summaries"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--out=/dev/null/x",), "--out=/dev/null/x cannot be made: Not a directory"),
        (("--workload=burst:num=2,context=4000",), "none of 2 requests completed: the prompt has 4000 tokens"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, message):
    arguments = (f"--out={tmp_path}", *SIMULATED[:-1], SIMULATED[-1], "--max_context=1024", *arguments)
    if "workload" in arguments[-1]:
        arguments = [a for a in arguments if a != SIMULATED[-1]]
    code, _, stderr = programs.run("bench_policies", *arguments)
    assert code == 2 and message in stderr.splitlines()[-1] and "Traceback" not in stderr
