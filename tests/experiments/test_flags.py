"""Protects the command line: help without JAX, absurd flags as one line and exit code 2, flags reaching the config."""

import dataclasses
import re
import sys

import pytest
from absl import flags

from engine.config import EngineConfig, LayerKVConfig
from experiments import common_flags
from experiments.flag_parsers import parse_bytes
from experiments.run_record import flagfile_text
from tests.experiments import programs

PROGRAMS = ("serve", "generate", "bench_engine", "demo")


@pytest.fixture
def parsed():
    """Parses flags into the global values and puts the defaults back."""
    with_defaults = {n: flags.FLAGS[n].value for n in flags.FLAGS}
    yield lambda *args: flags.FLAGS(["test", *args])
    for name, value in with_defaults.items():
        flags.FLAGS[name].value, flags.FLAGS[name].present = value, 0


@pytest.mark.parametrize("program", [*PROGRAMS, "compare", "timeline"])
def test_help_imports_no_jax_and_shows_what_people_use(program):
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
    assert all((flag in process.stdout) == (program in PROGRAMS) for flag in ("--model", "--page_size")), process.stderr
    assert "--watermark" not in process.stdout and process.stdout.count("\n  --") <= 28
    assert ("\n  --out:" in process.stdout) == (program in ("serve", "bench_engine", "demo"))
    assert "HEAVY []" in process.stdout


def test_readme_says_which_flags_help_shows():
    """Bold in its table are those, no more and no less; the others exist."""
    table = re.findall(r"^\| ([*`][^|]*--[^|]*) \|", (programs.ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    bold = re.findall(r"\*\*`--(\w+)`\*\*", " ".join(table))
    assert sorted(bold) == sorted(holder.name for holder in common_flags.KEY_FLAGS)
    named = re.findall(r"`--(\w+)`", " ".join(table))
    assert len(named) == len({*named}) > 25 and all(name in flags.FLAGS for name in named)


def test_defaults_are_the_engines_own(parsed):
    parsed()
    assert common_flags.engine_config_from_flags() == EngineConfig()


def test_flags_reach_the_configuration(parsed):
    parsed(
        "--policy=vllm_v1", "--page_size=32", "--device_bytes=1.5GiB", "--max_num_seqs=7", "--max_context=99",
        "--max_num_batched_tokens=512", "--dtype=bfloat16", "--seed=3", "--deterministic", "--watermark=0.2",
        "--attention_backend=reference", "--compilation_cache_dir=", "--store=native", "--precompile",
    )  # fmt: skip
    config = common_flags.engine_config_from_flags()
    assert config.scheduler.policy == "vllm_v1" and config.scheduler.max_num_seqs == 7
    assert config.scheduler.max_num_batched_tokens == 512 and config.scheduler.watermark == 0.2
    assert config.cache.page_size == 32 and config.cache.device_bytes == 3 << 29 and config.cache.store == "native"
    assert (config.max_context, config.dtype, config.seed) == (99, "bfloat16", 3)
    assert config.deterministic and config.precompile and config.compilation_cache_dir is None
    assert config.attention_backend == "reference"
    parsed("--tensor=8", "--nodeterministic")
    assert common_flags.engine_config_from_flags().tensor == 8


def test_every_knob_of_layerkv_has_a_flag(parsed):
    """Named as the knob, with its default, and it reaches the configuration."""
    names = [field.name for field in dataclasses.fields(LayerKVConfig)]
    parsed()
    assert [flags.FLAGS[f"layerkv_{name}"].default for name in names] == [*vars(LayerKVConfig()).values()]
    parsed(
        "--policy=layerkv", "--nolayerkv_layerwise", "--layerkv_chunked", "--layerkv_retained_layers=3",
        "--layerkv_pattern=prefix", "--nolayerkv_overlap", "--layerkv_stream=urgent", "--nolayerkv_forecast",
        "--layerkv_tpot_slo=0.05", "--layerkv_high_watermark=0.4",
    )  # fmt: skip
    assert common_flags.engine_config_from_flags().scheduler.layerkv == LayerKVConfig(
        layerwise=False, chunked=True, retained_layers=3, pattern="prefix", overlap=False, stream="urgent",
        forecast=False, tpot_slo=0.05, high_watermark=0.4,
    )  # fmt: skip


def test_a_config_file_lies_under_given_flags_and_over_defaults(parsed, tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"query_tile": 32, "cache": {"page_size": 32, "num_pages": 9}, "scheduler": {"watermark": 0}}')
    parsed(f"--config={file}", "--page_size=8", "--device_bytes=1GiB")
    config = common_flags.engine_config_from_flags()
    assert (config.query_tile, config.cache.page_size, config.scheduler.watermark) == (32, 8, 0)
    assert (config.cache.num_pages, config.cache.device_bytes) == (None, 1 << 30)  # the size given replaces the file's
    assert config.max_tiles == EngineConfig().max_tiles


def test_a_flagfile_repeats_the_configuration_without_the_file(parsed, tmp_path):
    file, flagfile = tmp_path / "config.json", tmp_path / "flags.txt"
    file.write_text(
        '{"query_tile": 32, "cache": {"page_size": 32}, "compilation_cache_dir": null, "deterministic": true}'
    )
    parsed(f"--config={file}", "--max_num_seqs=7", "--out=somewhere")
    first = common_flags.engine_config_from_flags()
    flagfile.write_text(flagfile_text())
    file.unlink()
    parsed(f"--flagfile={flagfile}")
    assert common_flags.engine_config_from_flags() == first
    assert "--out" not in flagfile.read_text()


def test_units_of_the_link(parsed):
    parsed("--link_unit=2MB", "--executor=sim", "--nolink_aware")
    config = common_flags.engine_config_from_flags()
    assert (config.link_unit_bytes, config.sim.link_aware) == (2_000_000, False)
    assert common_flags.laid_over(config, "link_unit=1MiB").link_unit_bytes == 1 << 20


def test_a_flagfile_keeps_that_copies_are_whole(parsed, tmp_path):
    file, flagfile = tmp_path / "config.json", tmp_path / "flags.txt"
    file.write_text('{"link_unit_bytes": null}')
    parsed(f"--config={file}")
    assert common_flags.engine_config_from_flags().link_unit_bytes is None
    flagfile.write_text(flagfile_text())
    file.unlink()
    parsed(f"--flagfile={flagfile}")
    assert common_flags.engine_config_from_flags().link_unit_bytes == 0


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
            parse_bytes(text)
    else:
        assert parse_bytes(text) == value


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
    "--policy=lru": "policy 'lru' is unknown; known: chunked, layerkv, paged_park, vllm_v0, vllm_v1",
    "--layerkv_tpot_slo=0": "layerkv tpot_slo must be > 0 seconds, got 0.0",
    "--layerkv_retained_layers=-1": "layerkv retained_layers must be >= 0, got -1",
    "--layerkv_low_watermark=0.5": "layerkv watermarks must be 0 <= low <= high < 1, got 0.5 and 0.01",
    "--layerkv_pattern=zigzag": "value should be one of <interleave|prefix|suffix|random|interval>",
    '--config={"scheduler":{"layerkv":{"patern":"x"}}}': "--config.scheduler.layerkv: unknown field patern",
    '--config={"scheduler":{"layerkv":{"stream":"x"}}}': "layerkv stream 'x'; known: urgent, hidden, always, never",
    "--policy=layerkv --model=tiny-1m": "policy layerkv moves KV to the host: set host_bytes",
    "--policy=nowhere.py:Mine": "there is no file nowhere.py",
    "--order=lifo": "value should be one of <fcfs|sjf|priority>",
    "--workload=nowhere.py:mine": "there is no file nowhere.py",
    "--watermark=2": "watermark must be in [0, 1)",
    "--dtype=int4": "value should be one of <bfloat16|float16|float32>",
    "--link_unit=4Mbit": "expected bytes such as",
    "--link_aware=false": "--link_aware=False is for --executor=sim",
    "--no_such_flag": "Unknown command line flag 'no_such_flag'",
    "--model=": "--model is missing",
    "--workload=azur:x": "unknown name 'azur'",
    "--goodput=itl:3": "goodput 'itl:3'",
    "--config=nowhere.json": "nowhere.json cannot be read",
    "--config={": "not JSON",
    '--config={"pages":3}': "--config: unknown field pages; known: cache, scheduler",
    '--config={"cache":{"page_sise":3}}': "--config.cache: unknown field page_sise",
    '--config={"cache":{"page_size":3}}': "page_size must be a power of two, got 3",
    '--config={"cache":{"num_pages":"3"}}': "--config.cache.num_pages must be int | null, got '3'",
    '--config={"deterministic":1}': "--config.deterministic must be bool, got 1",
    '--config={"cache":3}': "cache must be a JSON object",
    "--window=5": "--window=5: expected START:END",
    "--window=5:3": "the end must be after the start",
    "--profile_dir=/dev/null/x": "--profile_dir=/dev/null/x cannot be made",
    "extra": "unexpected argument 'extra'",
    "--num_processes=3": "--num_processes=3 needs --coordinator=HOST:PORT",
}


UNREAD = {
    "generate": ("--model=tiny-1m", "--prompt_ids=1", "--out=x"),
    "follow": ("--coordinator=localhost:1", "--policy=vllm_v1"),
    "convert_checkpoint": ("--hf=x", "--out=y", "--overwrite"),
    "compare": ("a", "b", "--seed=1"),
    "timeline": ("a", "--layerkv_stream=never"),
    "bench_engine": ("--overwrite",),
}


@pytest.mark.parametrize("program", UNREAD)
def test_a_flag_that_the_program_would_ignore_is_refused(program):
    unread = UNREAD[program][-1].partition("=")[0]
    line = f"{program}: {unread} means nothing to this program (--help lists the flags)\n"
    assert programs.run(program, *UNREAD[program])[::2] == (2, line)


def test_a_flagfile_repeats_a_run_of_one_process(parsed, tmp_path):
    """The number of processes is in flags.txt only when there was more than one."""
    parsed()
    common_flags.engine_config_from_flags()
    assert "num_processes" not in flagfile_text()
    parsed("--coordinator=localhost:1", "--tensor=2")
    common_flags.engine_config_from_flags()
    assert common_flags.num_processes() == 2


def test_programs_that_serve_nothing_answer_in_one_line():
    assert programs.run("follow")[::2] == (2, "follow: --coordinator is missing: host:port of process 0\n")
    code, _, stderr = programs.run("follow", "--coordinator=foo")  # an IndexError inside JAX
    assert (code, stderr.count("\n")) == (2, 1) and "'foo': expected host:port of process 0" in stderr
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
