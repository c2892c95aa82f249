"""Protects hashes: equal for equal things wherever they lie, different for any difference."""

import hashlib
import json
import os
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest

from engine import extension
from engine.costmodel.device import load_device
from engine.scheduler.policy import find_policy
from experiments.environment import commit
from experiments.provenance import digest, weights_hash
from tests.engine.costmodel.device_files import device_file, write
from tests.experiments import programs


def params(**changes):
    tree = {"embed": jnp.arange(12.0).reshape(3, 4), "layers": [{"w": jnp.ones((2, 2), jnp.bfloat16)}]}
    return tree | changes


def test_equal_weights_hash_equally_in_any_order_and_in_any_home():
    tree = params()
    same = {"layers": [{"w": np.ones((2, 2), jnp.bfloat16)}], "embed": np.arange(12, dtype=np.float32).reshape(3, 4)}
    assert weights_hash(tree) == weights_hash(same)


@pytest.mark.parametrize(
    "changes",
    [
        {"embed": jnp.arange(12.0).reshape(3, 4).at[2, 3].set(np.nextafter(np.float32(11), np.float32(12)))},
        {"embed": jnp.arange(12.0).reshape(4, 3)},
        {"embed": jnp.arange(12, dtype=jnp.int32).reshape(3, 4)},
        {"layers": [{"v": jnp.ones((2, 2), jnp.bfloat16)}]},
        {"layers": []},
    ],
    ids=["one bit", "shape", "dtype", "name", "missing"],
)
def test_any_difference_shows(changes):
    assert weights_hash(params()) != weights_hash(params(**changes))


def test_digest_ignores_the_order_of_keys_only():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})


def test_the_commit_is_read_without_touching_the_repository(tmp_path):
    """A run on a full disk would leave the lock of the index behind."""
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "code.py").write_text("1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    os.utime(tmp_path / "code.py", (1, 1))  # the index does not know this time
    before = (tmp_path / ".git/index").read_bytes()
    found = commit(tmp_path)
    assert found is not None and found["dirty"] is False and (tmp_path / ".git/index").read_bytes() == before
    (tmp_path / "code.py").write_text("2\n")
    assert commit(tmp_path) == found | {"dirty": True}


# ---------------------------------------------------------------------------------------------- names from outside

SHAPE = 'from engine.presets import preset\nMINE = preset("tiny-1m").replace(name="mine")\n'
LOAD = """
from experiments.workloads import WorkloadRequest

def few(file, options, window):
    return [WorkloadRequest(str(i), float(i), 5, 2) for i in range(window.end(2))]
"""
POLICY = "from engine.scheduler.vllm_v1 import VllmV1\nclass Mine(VllmV1): pass\n"
NAMES = ("policy.py:Mine", "load.py:few", "shape.py:MINE", "device.json", "constants.json")


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """Files that no commit of ours holds, and config.json of a run that used them all."""
    here = tmp_path_factory.mktemp("outside")
    (here / "policy.py").write_text(POLICY)
    (here / "load.py").write_text(LOAD)
    (here / "shape.py").write_text(SHAPE)
    write(here / "device.json", device_file())
    write(here / "constants.json", device_file() | {"tables": "times.csv"})
    (here / "times.csv").write_text("op,tokens,kv,seconds\nqkv,1,,0.001\nqkv,11,,0.003\n")
    return here, served(here, "first")


def served(here, out):
    """config.json of a run that uses all the files."""
    flags = ["--model_spec=shape.py:MINE", "--policy=policy.py:Mine", "--workload=load.py:few,num=2", "--nowarmup"]
    simulated = ["--executor=sim", "--device=device.json", "--stack=constants.json", "--num_pages=64"]
    code, _, stderr = programs.run("serve", *flags, *simulated, f"--out={out}", cwd=here)
    assert code == 0, stderr
    return json.loads((here / out / "config.json").read_text())


def digests(here):
    """What each name stands for, read by somebody else."""
    files = {name: here / name.partition(":")[0] for name in NAMES} | {"times.csv": here / "times.csv"}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def test_what_comes_from_outside_the_tree_is_in_the_record(outside):
    """Every file that a name led to, and nothing else."""
    here, first = outside
    assert first["sources"] == digests(here)


@pytest.mark.parametrize("name", [*NAMES[:4], "times.csv"])
def test_an_edited_file_is_another_setting(outside, name):
    """Flags and commit stay as they were: only the hashes can tell."""
    here, first = outside
    file = here / name.partition(":")[0]
    text = file.read_text()
    file.write_text(text + "\n")
    try:
        edited = served(here, f"edited-{file.name}")
        assert edited["sources"] == digests(here)
    finally:
        file.write_text(text)
    assert [n for n in edited["sources"] if edited["sources"][n] != first["sources"][n]] == [name]
    assert edited["settings_hash"] != first["settings_hash"]
    same = ("commit", "model_hash", "workload_hash", "engine")
    assert [edited[n] for n in same] == [first[n] for n in same]


def test_a_module_is_recorded_as_it_was_loaded(tmp_path, monkeypatch):
    """A later edit does not change what runs; names of this tree are not recorded."""
    (tmp_path / "folio_test_sources.py").write_text("ONE = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(extension, "_sources", {})
    assert extension.load("folio_test_sources:ONE", "policy") == 1
    (tmp_path / "folio_test_sources.py").write_text("ONE = 2\n")
    assert extension.load("folio_test_sources:ONE", "policy") == 1
    find_policy("vllm_v1")
    load_device("h100")
    assert extension.sources() == {"folio_test_sources:ONE": hashlib.sha256(b"ONE = 1\n").hexdigest()}
