"""Protects the command line: help without JAX, absurd flags as one line and exit code 2, flags reaching the config."""

import sys

import pytest
from absl import flags

from engine.config import EngineConfig
from experiments import common_flags
from tests.experiments import programs

PROGRAMS = ("serve", "generate", "bench_engine", "demo")


@pytest.fixture
def parsed():
    """Parses flags into the global values and puts the defaults back."""
    with_defaults = {n: flags.FLAGS[n].value for n in flags.FLAGS}
    yield lambda *args: flags.FLAGS(["test", *args])
    for name, value in with_defaults.items():
        flags.FLAGS[name].value = value


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_imports_no_jax(program):
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['x', '--help']\n"
        "try:\n"
        f"    runpy.run_module('experiments.{program}', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    heavy = {'jax', 'torch', 'transformers', 'matplotlib', 'tokenizers'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    process = programs.subprocess.run(
        [sys.executable, "-c", code], cwd=programs.ROOT, capture_output=True, text=True, timeout=60
    )
    assert "--model" in process.stdout and "--page_size" in process.stdout, process.stderr
    assert "HEAVY []" in process.stdout


def test_defaults_are_the_engines_own(parsed):
    parsed()
    assert common_flags.engine_config_from_flags() == EngineConfig()


def test_flags_reach_the_configuration(parsed):
    parsed(
        "--policy=vllm_v1", "--page_size=32", "--device_bytes=1.5GiB", "--max_num_seqs=7", "--max_context=99",
        "--max_num_batched_tokens=512", "--dtype=bfloat16", "--seed=3", "--deterministic", "--watermark=0.2",
        "--attention_backend=reference", "--compilation_cache_dir=", "--pages_per_chunk=4", "--precompile",
    )  # fmt: skip
    config = common_flags.engine_config_from_flags()
    assert config.scheduler.policy == "vllm_v1" and config.scheduler.max_num_seqs == 7
    assert config.scheduler.max_num_batched_tokens == 512 and config.scheduler.watermark == 0.2
    assert config.cache.page_size == 32 and config.cache.device_bytes == 3 << 29 and config.cache.pages_per_chunk == 4
    assert (config.max_context, config.dtype, config.seed) == (99, "bfloat16", 3)
    assert config.deterministic and config.precompile and config.compilation_cache_dir is None
    assert config.attention_backend == "reference"
    parsed("--tensor=8", "--nodeterministic")
    assert common_flags.engine_config_from_flags().tensor == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("4096", 4096),
        ("2KiB", 2048),
        ("3kB", None),
        ("1.5MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("1 TiB", 1 << 40),
    ],
)
def test_bytes(text, value):
    if value is None:
        with pytest.raises(ValueError, match="expected bytes such as"):
            common_flags.parse_bytes(text)
    else:
        assert common_flags.parse_bytes(text) == value


ABSURD = {
    "--page_size=many": "page_size",
    "--page_size=3": "page_size must be a power of two, got 3",
    "--device_bytes=2Gx": "expected bytes such as",
    "--device_fraction=1.5": "device_fraction must be in (0, 1], got 1.5",
    "--num_pages=5 --device_bytes=1GiB": "sized twice, by num_pages and by device_bytes",
    "--max_num_seqs=0": "max_num_seqs must be in [1, 4096], got 0",
    "--max_context=1": "max_context must be >= 2",
    "--tensor=0": "tensor must be in [1, 1024] devices, got 0",
    "--tensor=2 --deterministic": "deterministic needs tensor=1, got 2",
    "--watermark=2": "watermark must be in [0, 1)",
    "--dtype=int4": "value should be one of <bfloat16|float32>",
    "--no_such_flag": "Unknown command line flag 'no_such_flag'",
    "--model=": "--model is missing",
    "--workload=azur:x": "unknown name 'azur'",
    "--goodput=itl:3": "goodput 'itl:3'",
    "extra": "unexpected argument 'extra'",
}


def test_programs_that_serve_nothing_answer_in_one_line():
    assert programs.run("follow")[::2] == (2, "follow: --coordinator is missing: host:port of process 0\n")
    convert = "convert_checkpoint"
    one = f"{convert}: give what to read by exactly one of --hf and --orbax\n"
    assert programs.run(convert, "--out=x")[::2] == programs.run(convert, "--hf=x", "--orbax=y")[::2] == (2, one)
    assert programs.run(convert, "--hf=x")[::2] == (2, f"{convert}: --out is missing: the directory to write\n")
    assert programs.run(convert, "--hf=x", "--out=y")[2].startswith(f"{convert}: x: no such directory")
    assert programs.run(convert, "--orbax=x", "--out=y")[::2] == (2, f"{convert}: x: not an Orbax checkpoint\n")


@pytest.mark.parametrize("arguments", ABSURD)
def test_absurd_flags_are_one_line_and_exit_code_2(arguments, tmp_path):
    code, stdout, stderr = programs.run("serve", "--model=nowhere", *arguments.split(), cwd=tmp_path)
    assert (code, stdout) == (2, "")
    assert ABSURD[arguments] in stderr and stderr.count("\n") == 1 and "Traceback" not in stderr
    assert not list(tmp_path.glob("**/*.json*"))
