"""Names from outside the tree, and what is said of wrong ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine import CacheConfig, Engine, EngineConfig, SamplingParams, extension
from engine.config import SchedulerConfig
from engine.errors import ConfigError
from engine.presets import PRESETS, find_model
from engine.scheduler.policy import token_budget
from experiments import workloads
from tests.conformance.loads import Arrival, run
from tests.experiments import programs

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "tests/conformance/example_policy.py"
WORKLOAD = """
from experiments.workloads import WorkloadRequest

def two(file, options, window):
    n = options.integer("tokens", 5)
    return [WorkloadRequest(str(i), float(i), n, 2) for i in range(window.end(2))]
"""
MODEL = """
from engine.config import ModelConfig
from engine.presets import preset

SMALL = ModelConfig("mine", 1, 32, 2, 1, 16, 64, 100, 256)
NUMBER = 3

def same():
    return preset("tiny-1m").replace(name="same")

def fails():
    return SMALL.replace(head_dim=3)
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A directory that is not ours, with the example policy, a workload, models and a file that cannot be used."""
    (tmp_path / "mine.py").write_text(EXAMPLE.read_text())
    (tmp_path / "load.py").write_text(WORKLOAD)
    (tmp_path / "shapes.py").write_text(MODEL)
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
        ("vllm", "policy 'vllm' is unknown; known: chunked, layerkv, paged_park, vllm_v0, vllm_v1, or package.module:"),
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


def test_a_model_outside_the_tree(outside):
    """By file, by module, as a function; with weights from the seed as for a preset of the same shape."""
    assert find_model("tiny-1m") is PRESETS["tiny-1m"]
    assert find_model("shapes.py:SMALL").name == find_model(f"{outside}/shapes.py:SMALL").name == "mine"
    assert find_model("shapes:same").replace(name="tiny-1m") == PRESETS["tiny-1m"]
    config = EngineConfig(
        CacheConfig(num_pages=64), max_context=64, compilation_cache_dir=None, seed=5, deterministic=True
    )
    prompts, params = [[1, 2, 3], [4]], SamplingParams(max_tokens=5)
    mine, preset = (Engine.from_pretrained(m, config).generate(prompts, params) for m in ("shapes.py:same", "tiny-1m"))
    assert [o.token_ids for o in mine] == [o.token_ids for o in preset]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("llama9", "model_spec 'llama9' is unknown; known: llama2-7b, llama3.1-8b,"),
        ("nowhere.py:M", "model_spec 'nowhere.py:M': there is no file nowhere.py"),
        ("shapes.py:BIG", "shapes.py has no BIG; it has ModelConfig, preset, SMALL, NUMBER, same, fails"),
        ("shapes.py:NUMBER", "model_spec 'shapes.py:NUMBER' is not a model: it needs a ModelConfig, or a function"),
        ("shapes.py:preset", "fails when it is called without arguments: TypeError: preset() missing 1 required"),
        ("shapes.py:fails", "fails when it is called without arguments: ConfigError: model head_dim must be even"),
    ],
)  # fmt: skip
def test_wrong_models_are_one_line(outside, spec, message):
    """Unknown names list the presets."""
    with pytest.raises(ConfigError) as error:
        find_model(spec)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_directory_named_like_a_model_outside_is_a_directory(outside):
    """What exists is meant."""
    (outside / "weights:v1").mkdir()
    with pytest.raises(ConfigError, match=r"weights:v1.*config\.json"):
        Engine.from_pretrained("weights:v1")


def test_programs_take_a_model_outside_the_tree_and_repeat_it(outside):
    """--model_spec is recorded, and a run is repeated from its flags.txt with the same model and weights."""
    common = ["--workload=synthetic:rate=50,num=2,prompt=fixed:4,output=fixed:3", "--num_pages=32", "--deterministic"]
    first = programs.run(
        "serve", "--model_spec=shapes.py:SMALL", *common, "--out=first", f"--compilation_cache_dir={outside}/cache",
        cwd=outside,
    )  # fmt: skip
    again = programs.run("serve", "--flagfile=first/flags.txt", "--out=again", cwd=outside)
    assert first[0] == again[0] == 0, first[2] + again[2]
    one, two = (json.loads((outside / run / "config.json").read_text()) for run in ("first", "again"))
    assert one["model"] == one["flags"]["model_spec"] == "shapes.py:SMALL" and one["model_config"]["name"] == "mine"
    assert all(one[name] == two[name] for name in ("model_hash", "weights_hash", "settings_hash", "workload_hash"))
    assert one["weights_hash"] == f"random:seed=0,model={one['model_hash']}"


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        ("serve", "--model_spec=llama9", "model_spec 'llama9' is unknown; known: "),
        ("serve", "--model_spec=tiny-1m --model=DIR", "--model=DIR and --model_spec=tiny-1m: give one of them"),
        ("generate", "--model_spec=broken.py:M --prompt_ids=1", "broken.py cannot be loaded: SyntaxError"),
        ("bench_async", "--model_spec=load.py:M", "load.py has no M; it has "),
    ],
)
def test_programs_answer_wrong_models_in_one_line(outside, program, arguments, message):
    """And exit code 2."""
    code, stdout, stderr = programs.run(program, *arguments.split(), cwd=outside)
    assert (code, stdout) == (2, "") and message in stderr and stderr.count("\n") == 1


def test_the_suite_judges_a_policy_by_name(outside):
    """What `make conformance` runs, on a policy that never admits: it fails and says so."""
    (outside / "lazy.py").write_text("from mine import *\nclass Lazy(StaticBatching):\n    def admit(self): return []")
    suite = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "tests/conformance/test_schedules.py"]
    done = subprocess.run(
        [sys.executable, *suite, "-k", "test_any_load", f"--policy={outside}/lazy.py:Lazy"],
        cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{outside}", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "lazy.py:Lazy' schedules none of" in done.stdout


def test_the_readme_shows_the_example():
    """Which the suites run: every line of it, and nothing else."""
    section = (ROOT / "README.md").read_text().partition("\n## A policy of your own\n")[2]
    assert section.partition("```python\n")[2].partition("```\n")[0] == EXAMPLE.read_text()


def test_the_example_is_short():
    """At most 40 lines, docstrings included."""
    assert len(EXAMPLE.read_text().splitlines()) <= 40
