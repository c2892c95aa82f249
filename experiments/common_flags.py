"""Flags that all programs share, their way into an EngineConfig, and the wrapper every program's main runs in.

A program's `--help` shows them because it calls `flags.adopt_module_key_flags(common_flags)`. Imports no JAX.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from absl import app, flags

from engine.config import DTYPES, CacheConfig, EngineConfig, SchedulerConfig
from engine.errors import ConfigError, FolioError

if TYPE_CHECKING:
    from engine import Engine

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
BYTE_UNITS = {"": 1, "B": 1} | {
    f"{p}{s}": b**i for i, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("iB", 1024))
}
DEFAULTS = EngineConfig()


def parse_bytes(text: str) -> int:
    """Bytes from `512MiB`, `2GiB`, `1.5GB` or a plain number.

    Raises:
      ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2] not in BYTE_UNITS:
        raise ValueError(f"expected bytes such as 536870912, 512MiB or 2GiB, got {text!r}")
    return int(float(match[1]) * BYTE_UNITS[match[2]])


class _BytesParser(flags.ArgumentParser):
    """An absl flag that takes a number of bytes."""

    def parse(self, argument: str | int) -> int:
        return argument if isinstance(argument, int) else parse_bytes(argument)

    def flag_type(self) -> str:
        return "bytes, such as 512MiB or 2GiB"


MODEL = flags.DEFINE_string("model", None, "A Hugging Face directory, or a preset name (random weights from --seed).")
OUT = flags.DEFINE_string("out", None, "Directory for results. Default: results/ and the program's name.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Write into --out even when an earlier run's results are there.")

POLICY = flags.DEFINE_string("policy", DEFAULTS.scheduler.policy, "Scheduling policy.")
MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", DEFAULTS.scheduler.max_num_seqs, "Sequences that hold device KV at once."
)
MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", None, "Tokens in one step. Default: max(context, 2048)."
)
WATERMARK = flags.DEFINE_float("watermark", DEFAULTS.scheduler.watermark, "Share of pages kept free at admission.")

PAGE_SIZE = flags.DEFINE_integer("page_size", DEFAULTS.cache.page_size, "Tokens of one layer in a page.")
PAGES_PER_CHUNK = flags.DEFINE_integer(
    "pages_per_chunk", None, "Pages in a chunk. Default: about 2 MiB on GPU and TPU, one page on CPU."
)
NUM_PAGES = flags.DEFINE_integer("num_pages", None, "Size of the device tier in pages over all layers.")
DEVICE_BYTES = flags.DEFINE(
    _BytesParser(),
    "device_bytes",
    None,
    "Size of the device tier on each device, in bytes such as 512MiB.",
    serializer=flags.ArgumentSerializer(),
)
DEVICE_FRACTION = flags.DEFINE_float(
    "device_fraction",
    None,
    "Size of the device tier as a share of the device's memory, weights and activations included.",
)

MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Longest prompt plus output in tokens. Default: the model's.")
TENSOR = flags.DEFINE_integer(
    "tensor", DEFAULTS.tensor, "Devices that share the heads of weights and KV; on CPU, virtual ones."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of this process when others lend it their devices (experiments/follow.py)."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 2, "Processes that share the model, with --coordinator.")
DTYPE = flags.DEFINE_enum("dtype", None, sorted(DTYPES), "Of weights, activations and KV. Default: the model's.")
SEED = flags.DEFINE_integer("seed", DEFAULTS.seed, "Of random weights and of requests without a seed.")
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", DEFAULTS.deterministic, "One shape for everything: logits do not depend on the batch, to the bit."
)
ASYNC_DEPTH = flags.DEFINE_integer(
    "async_depth", DEFAULTS.async_depth, "Steps submitted ahead of the one waited for: 0 or 1."
)
ATTENTION_BACKEND = flags.DEFINE_string(
    "attention_backend", None, "Obeyed or refused, never replaced. Default: one that works here."
)
PRECOMPILE = flags.DEFINE_bool("precompile", DEFAULTS.precompile, "Compile every bucket at start-up; prints the table.")
COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir", DEFAULTS.compilation_cache_dir, "Of compiled programs, kept between runs; empty: off."
)
DEBUG_CHECKS = flags.DEFINE_bool(
    "debug_checks", DEFAULTS.debug_checks, "Check invariants and page tables on the host at every step."
)


def engine_config_from_flags() -> EngineConfig:
    """The EngineConfig that the flags describe.

    Raises:
      ConfigError: a value that does not validate, or two that contradict.
    """
    cache = CacheConfig(
        page_size=PAGE_SIZE.value,
        pages_per_chunk=PAGES_PER_CHUNK.value,
        num_pages=NUM_PAGES.value,
        device_bytes=DEVICE_BYTES.value,
        device_fraction=DEVICE_FRACTION.value,
    )
    scheduler = SchedulerConfig(
        policy=POLICY.value,
        max_num_seqs=MAX_NUM_SEQS.value,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS.value,
        watermark=WATERMARK.value,
    )
    return EngineConfig(
        cache=cache,
        scheduler=scheduler,
        max_context=MAX_CONTEXT.value,
        dtype=DTYPE.value,
        seed=SEED.value,
        tensor=TENSOR.value,
        async_depth=ASYNC_DEPTH.value,
        deterministic=DETERMINISTIC.value,
        attention_backend=ATTENTION_BACKEND.value,
        precompile=PRECOMPILE.value,
        compilation_cache_dir=COMPILATION_CACHE_DIR.value or None,
        debug_checks=DEBUG_CHECKS.value,
    )


def required_model() -> str:
    """--model, which has no default.

    Raises:
      ConfigError: it was not given.
    """
    if not MODEL.value:
        raise ConfigError("--model is missing: a Hugging Face directory, or a preset such as base-124m")
    return MODEL.value


def out_directory(program: str) -> Path:
    """--out, or results/<program>."""
    return Path(OUT.value or f"results/{program}")


def load_engine(model: str, config: EngineConfig) -> Engine:
    """`Engine.from_pretrained`; imports JAX here, after the flags were found to be good."""
    from engine import Engine

    if COORDINATOR.value:
        from engine.executor import distributed

        distributed.start(COORDINATOR.value, NUM_PROCESSES.value, process_id=0)
    return Engine.from_pretrained(model, config)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Parses flags, runs `main()` and exits with what it returns.

    Bad input (a flag, a file, a request: any FolioError) is one line on stderr and exit code 2. Ctrl-C is one line
    and exit code 130; what a program wrote before stays.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}: options are written --name=value")
            return main() or 0
        except FolioError as e:
            return _complain(str(e), EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            return _complain("interrupted", EXIT_INTERRUPTED)

    app.run(guarded, flags_parser=_parse_flags)
    raise AssertionError("app.run always exits")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as e:
        sys.exit(_complain(f"{' '.join(str(e).split())} (--help lists the flags)", EXIT_BAD_INPUT))


def _complain(line: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr, flush=True)
    return code
