"""Names from outside the tree, and what is said of wrong ones."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine import extension
from engine.config import SchedulerConfig
from engine.errors import ConfigError
from engine.scheduler.policy import token_budget
from experiments import workloads
from tests.conformance.loads import Arrival, run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests/conformance/example_policy.py"
WORKLOAD = """
from experiments.workloads import WorkloadRequest

def two(file, options, window):
    n = options.integer("tokens", 5)
    return [WorkloadRequest(str(i), float(i), n, 2) for i in range(window.end(2))]
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A directory that is not ours, with the example policy, a workload and two files that cannot be used."""
    (tmp_path / "mine.py").write_text(EXAMPLE.read_text())
    (tmp_path / "load.py").write_text(WORKLOAD)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "folio_test_package").mkdir()
    (tmp_path / "folio_test_package/policies.py").write_text(EXAMPLE.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["mine.py:StaticBatching", "folio_test_package.policies:StaticBatching"])
def test_a_policy_outside_the_tree_serves(outside, name):
    """By file and by module."""
    run(name, [Arrival(20, 5), Arrival(30, 9), Arrival(3, 2, gap=4)], num_pages=8)


@pytest.mark.parametrize(
    "name, message",
    [
        ("vllm", "policy 'vllm' is unknown; known: chunked, vllm_v0, vllm_v1, or package.module:Name or path"),
        ("nowhere.py:P", "policy 'nowhere.py:P': there is no file nowhere.py"),
        ("mine.py:Dynamic", "policy 'mine.py:Dynamic': mine.py has no Dynamic; it has NOBODY, StaticBatching"),
        ("no.such.module:P", "no.such.module cannot be loaded: ModuleNotFoundError: No module named 'no'"),
        ("broken.py:P", "broken.py cannot be loaded: SyntaxError: invalid syntax"),
        ("mine.py:NOBODY", "policy 'mine.py:NOBODY' is not a policy: it needs a class with `plan(now)` and `mixes`"),
        ("load.py:two", "policy 'load.py:two' is not a policy"),
    ],
)  # fmt: skip
def test_wrong_names_are_one_line(outside, name, message):
    """They say what is wrong and where."""
    with pytest.raises(ConfigError) as error:
        token_budget(SchedulerConfig(policy=name), 100)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_file_is_loaded_once(outside):
    """The same class, whoever asks."""
    assert extension.load("mine.py:StaticBatching", "policy") is extension.load("./mine.py:StaticBatching", "policy")


def test_a_workload_outside_the_tree(outside):
    """Options common to all workloads apply to it, and its own are checked."""
    requests = workloads.build("load.py:two,num=3,tokens=7,time_scale=2")
    assert [(r.id, r.arrival_s, r.prompt_len) for r in requests] == [("0", 0.0, 7), ("1", 2.0, 7), ("2", 4.0, 7)]
    with pytest.raises(ConfigError, match=r"load\.py has no three"):
        workloads.build("load.py:three")
    with pytest.raises(workloads.WorkloadError, match=r"unknown option token; known: .*tokens"):
        workloads.build("load.py:two,token=7")


def test_the_suite_judges_a_policy_by_name(outside):
    """What `make conformance` runs, on a policy that never admits: it fails and says so."""
    (outside / "lazy.py").write_text("from mine import *\nclass Lazy(StaticBatching):\n    def admit(self): return []")
    suite = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/conformance/test_schedules.py"]
    done = subprocess.run(
        [sys.executable, *suite, "-k", "test_any_load", f"--policy={outside}/lazy.py:Lazy"],
        cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{outside}", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "requests are not served" in done.stdout


def test_the_example_is_short():
    """At most 40 lines, docstrings included."""
    assert len(EXAMPLE.read_text().splitlines()) <= 40
