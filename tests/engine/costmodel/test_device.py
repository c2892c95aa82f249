"""Devices as data: what is registered, what is said of values nobody measured, and of files that cannot be used."""

import json
import subprocess
import sys

import pytest

from engine.costmodel.device import DeviceProfile, device_names, load_device, load_hardware, stack_names
from engine.costmodel.sourced import KINDS
from engine.errors import ConfigError
from tests.engine.costmodel.device_files import device_file, profile, write

DEVICES = ["a10", "a100", "h100", "h200", "l20", "l40s", "rtx4090", "tpu-v5e", "tpu-v6e"]
STACKS = [(device, stack) for device in DEVICES for stack in stack_names(device)]


def test_the_registered_devices():
    """Nine of them; every one has the stack that its file names."""
    assert device_names() == DEVICES
    assert all(load_device(name).stack in stack_names(name) for name in DEVICES)


@pytest.mark.parametrize("device, stack", STACKS)
def test_every_value_has_a_kind_and_a_source(device, stack):
    """And they are printed beside it; a value that was not given is not printed."""
    found = load_device(device, stack)
    values = vars(found.hardware) | vars(found.constants)
    lines = {line.split()[0]: line for line in found.describe().splitlines()[2:]}
    assert set(lines) == set(found.provenance) <= set(values)
    for name, origin in found.provenance.items():
        assert (
            origin.kind in KINDS
            and origin.source
            and f" {origin.kind} " in lines[name]
            and origin.source in lines[name]
        )


def test_estimates_are_flagged():
    """Nobody published kernels of an L20: all its constants are estimates, and its one-line title says so."""
    l20 = load_device("l20")
    constants = [name for name in l20.provenance if hasattr(l20.constants, name)]
    assert constants and set(constants) <= set(l20.estimated)
    assert "estimated: " in l20.title() and "eff_gemm" in l20.title() and "bf16_tflops" not in l20.title()
    assert "eff_gemm" not in load_device("h100").estimated


def test_all_reduces_over_pcie_are_the_measured_ones():
    """19 / 4 / 2 GB/s between 2 / 4 / 8 devices without NVLink; they cross the host link."""
    for name in ("l20", "l40s"):
        found = load_device(name)
        assert [found.allreduce(n)[0] / 1e9 for n in (2, 4, 8)] == [19, 4, 2] and found.shares_host_link
    assert load_device("l40s").provenance["allreduce_busbw_gbs"].kind == "measured"
    assert not load_device("h100").shares_host_link


def test_one_file_outside_the_tree(tmp_path):
    """Facts and constants in it; a second set of constants in another file."""
    path = write(tmp_path / "mine.json", device_file(eff_gemm=0.75))
    found = load_device(path)
    assert (found.name, found.stack, found.constants.eff_gemm, found.hardware.memory_gbs) == (
        "round",
        "test",
        0.75,
        1000,
    )
    assert found.tables is None and load_hardware(path) == found.hardware and load_device(path, "test") == found
    other = device_file(eff_gemm=0.25) | {"stack": "other", "tables": "times.csv"}
    found = load_device(path, write(tmp_path / "other.json", other))
    assert (found.stack, found.constants.eff_gemm, found.tables) == ("other", 0.25, tmp_path / "times.csv")
    assert load_device("h100", str(tmp_path / "other.json")).constants.eff_gemm == 0.25


def test_an_object_outside_the_tree(tmp_path, monkeypatch):
    """A profile, or a function that returns one; constants for it from a file."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine.json", device_file())
    source = 'from engine.costmodel.device import load_device\nMINE, NUMBER = load_device("mine.json"), 3\n'
    (tmp_path / "mine.py").write_text(source + "def mine():\n    return MINE\n")
    assert load_device("mine.py:MINE") == load_device("mine.py:mine") == load_device("mine.json")
    faster = write(tmp_path / "faster.json", device_file(eff_gemm=1))
    assert load_device("mine.py:MINE", faster).constants.eff_gemm == 1
    with pytest.raises(ConfigError, match=r"'mine.py:NUMBER' is not a DeviceProfile or a function that returns one"):
        load_device("mine.py:NUMBER")


@pytest.mark.parametrize(
    "name, stack, message",
    [
        ("h1000", None, "device 'h1000' is unknown; known: a10, a100, h100, h200, l20, l40s, rtx4090, tpu-v5e, "),
        ("h100", "vllm", "device h100 has no constants 'vllm'; known: vllm-0.24, or a path to a .json"),
        ("nowhere.json", None, "device file nowhere.json cannot be read: No such file or directory"),
        ("h100", "nowhere.json", "constants file nowhere.json cannot be read"),
        ("nowhere.py:X", None, "device 'nowhere.py:X': there is no file nowhere.py"),
    ],
)  # fmt: skip
def test_wrong_names_are_one_line(name, stack, message):
    """They list what is known."""
    with pytest.raises(ConfigError) as error:
        load_device(name, stack)
    assert message in str(error.value) and "\n" not in str(error.value)


def changed(section: str, field: str, **entry) -> dict:
    """The round device with parts of one entry replaced."""
    content = device_file()
    content[section][field] = content[section][field] | entry
    return content


@pytest.mark.parametrize(
    "content, message",
    [
        (device_file(memory_gbs=None), "hardware has no memory_gbs"),
        (device_file(t0_host_us=None, eff_gemm=None), "constants has no eff_gemm, t0_host_us"),
        (device_file(memory_gbs="fast"), "hardware.memory_gbs must be float, got 'fast'"),
        (device_file(memory_gbs=0), "memory_gbs must be > 0, got 0"),
        (device_file(bf16_tflops=True), "hardware.bf16_tflops must be float, got True"),
        (device_file(link_latency_us=-1), "link_latency_us must be >= 0, got -1"),
        (device_file(interconnect="rope"), "interconnect 'rope' is unknown; known: none, memory, pcie, nvlink, ici"),
        (device_file(eff_gemm=1.5), "eff_gemm must be in (0, 1], got 1.5"),
        (device_file(allreduce_busbw_gbs={"two": 3}), "allreduce_busbw_gbs must be numbers > 0 by number of devices"),
        (device_file(t0_allreduce_us=None), "allreduce_busbw_gbs and t0_allreduce_us must know the same numbers"),
        (changed("constants", "eff_gemm", kind="guessed"), "constants.eff_gemm: kind 'guessed' is unknown; known:"),
        (changed("constants", "eff_gemm", source=""), "constants.eff_gemm: source must say where the value comes from"),
        (changed("constants", "eff_gemm", note="x"), "constants.eff_gemm must be an object of value, kind and source"),
        (device_file() | {"name": 3}, "name must be a string, got 3"),
        (device_file() | {"hardware": []}, "hardware must be an object of bf16_tflops"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, content, message):
    """One line that names the file and the field."""
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ConfigError) as error:
        load_device(path)
    assert message in str(error.value) and path in str(error.value) and "\n" not in str(error.value)


def test_unknown_fields_and_broken_json(tmp_path):
    """The known fields are listed; the place of the mistake is named."""
    content = device_file()
    content["hardware"]["tflops"] = content["hardware"]["memory_gbs"]
    with pytest.raises(ConfigError, match=r"hardware: unknown field tflops; known: bf16_tflops, memory_gib"):
        load_device(write(tmp_path / "bad.json", content))
    (tmp_path / "bad.json").write_text(json.dumps(device_file())[:-3])
    with pytest.raises(ConfigError, match=r"bad.json is not JSON: .* line 1 column"):
        load_device(str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"bad.json must hold an object, got list"):
        load_device(str(tmp_path / "bad.json"))


def test_what_a_device_lacks_is_named(tmp_path):
    """Float32 without a rate for it, and more devices than anybody timed."""
    found = profile(tmp_path, fp32_tflops=None)
    with pytest.raises(ConfigError, match=r"device round has no fp32_tflops: run the model in bfloat16"):
        found.peak_flops("float32")
    with pytest.raises(ConfigError, match=r"round \(test\) has no allreduce_busbw_gbs between 8 devices; known: 2, 4"):
        found.allreduce(8)
    with pytest.raises(ConfigError, match="known: none"):
        profile(tmp_path, allreduce_busbw_gbs=None, t0_allreduce_us=None).allreduce(2)


def test_no_jax():
    """The cost model runs where JAX is not."""
    script = "import engine.costmodel.step_model, sys; print({'jax', 'engine.executor'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_profiles_are_values():
    """Equal when they say the same."""
    assert load_device("l20") == load_device("l20") != load_device("l20", "vllm-0.5")
    assert isinstance(load_device("l20"), DeviceProfile)
