"""Flags that all programs share, their way into an EngineConfig, and the wrapper every program's main runs in.

`run_main` puts those that people use into a program's `--help`; `--helpfull` shows all. Imports no JAX.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags

from engine.config import DTYPES, EXECUTORS, ORDERS, PREEMPTIONS, STORES, EngineConfig, from_dict, to_dict
from engine.config import LINK_SHARING as LINK_DISCIPLINES
from engine.errors import ConfigError, FolioError
from engine.presets import find_model
from engine.scheduler.policy import find_policy
from experiments.flag_parsers import BytesParser, JsonSerializer, OverlayParser
from experiments.layerkv_flags import LAYERKV

if TYPE_CHECKING:
    from engine import Engine

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
DEFAULTS = EngineConfig()


MODEL = flags.DEFINE_string(
    "model",
    None,
    "A Hugging Face directory, or a preset name (random weights from --seed); --model_spec takes a shape of your own.",
)
MODEL_SPEC = flags.DEFINE_string(
    "model_spec",
    None,
    "Instead of --model, random weights from --seed for a preset or your own ModelConfig: package.module:Name, "
    "path/to/file.py:Name.",
)
OUT = flags.DEFINE_string("out", None, "Directory for results. Default: results/ and the program's name.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Write into --out even when an earlier run's results are there.")
CONFIG = flags.DEFINE(
    OverlayParser(),
    "config",
    None,
    "JSON file of EngineConfig fields, nested as in a run's config.json under `engine`; flags given win over it.",
    serializer=JsonSerializer(),
)

POLICY = flags.DEFINE_string(
    "policy", DEFAULTS.scheduler.policy,
    "vllm_v0, vllm_v1, chunked, layerkv, paged_park, or your own: package.module:Name, path/to/file.py:Name.",
)  # fmt: skip
ORDER = flags.DEFINE_enum("order", DEFAULTS.scheduler.order, ORDERS, "Whose turn it is, and who is preempted.")
MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", DEFAULTS.scheduler.max_num_seqs, "Sequences that hold device KV at once."
)
MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", None, "Tokens in one step. Default: the policy's."
)
WATERMARK = flags.DEFINE_float("watermark", DEFAULTS.scheduler.watermark, "Share of pages kept free at admission.")

STORE = flags.DEFINE_enum(
    "store",
    DEFAULTS.cache.store,
    STORES,
    "How KV is kept: in pages as tokens come, or one contiguous run per sequence.",
)
PAGE_SIZE = flags.DEFINE_integer("page_size", DEFAULTS.cache.page_size, "Tokens of one layer in a page.")
PAGES_PER_CHUNK = flags.DEFINE_integer(
    "pages_per_chunk", None, "Pages in a chunk. Default: about 2 MiB on GPU and TPU, one page on CPU."
)
NUM_PAGES = flags.DEFINE_integer("num_pages", None, "Size of the device tier in pages over all layers.")
DEVICE_BYTES = flags.DEFINE(
    BytesParser(),
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

HOST_BYTES = flags.DEFINE(
    BytesParser(),
    "host_bytes",
    DEFAULTS.cache.host_bytes,
    "Cap of the host tier, such as 4GiB; 0: none.",
    serializer=flags.ArgumentSerializer(),
)
STAGING_BYTES = flags.DEFINE(
    BytesParser(),
    "staging_bytes",
    DEFAULTS.cache.staging_bytes,
    "Device memory for copies on their way, per direction.",
    serializer=flags.ArgumentSerializer(),
)
LINK_GBS = flags.DEFINE_float("link_gbs", None, "Pace copies to and from the host to so many 1e9 bytes/s each way.")
LINK_UNIT = flags.DEFINE(
    BytesParser(),
    "link_unit",
    DEFAULTS.link_unit_bytes,
    "In which copies move over a device's link, such as 2MB, yielding to all-reduces in between; 0: whole copies.",
    serializer=flags.ArgumentSerializer(),
)
PREFETCH_DEPTH = flags.DEFINE_integer(
    "prefetch_depth",
    DEFAULTS.prefetch_depth,
    "Layers with pages on the host that are fetched while one is computed: the next that have any.",
)
PREEMPTION = flags.DEFINE_enum(
    "preemption", DEFAULTS.scheduler.preemption, PREEMPTIONS, "What becomes of a preempted sequence's KV."
)

EXECUTOR = flags.DEFINE_enum(
    "executor", DEFAULTS.executor, EXECUTORS, "jax: this machine's devices; sim: a virtual clock and a cost model."
)
DEVICE = flags.DEFINE_string(
    "device", None, "What --executor=sim stands in for: a name (default h100), FILE.json, package.module:Name."
)
STACK = flags.DEFINE_string("stack", None, "Kernel stack whose constants are used. Default: the device's.")
KERNELS = flags.DEFINE_string("kernels", None, "Attention kernels to simulate. Default: the stack's.")
PIPELINE = flags.DEFINE_integer("pipeline", None, "Simulated pipeline stages, each with its own pool. Default: 1.")
LINK_SHARING = flags.DEFINE_enum(
    "link_sharing", None, LINK_DISCIPLINES, "How simulated copies of one direction share the link. Default: ps."
)
LINK_AWARE = flags.DEFINE_bool(
    "link_aware", None, "Whether simulated copies yield to all-reduces on their link. Default: they do."
)

MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Longest prompt plus output in tokens. Default: the model's.")
TENSOR = flags.DEFINE_integer(
    "tensor", DEFAULTS.tensor, "Devices that share the heads of weights and KV; on CPU, virtual ones."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of this process when others lend it their devices (experiments/follow.py)."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes that share the model, with --coordinator. Default: 2."
)
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


# By part of EngineConfig; a flag is named as its field, with the part's name before it where that says more.
ENGINE_FLAGS: dict[str, tuple[flags.FlagHolder, ...]] = {
    "cache": (
        STORE, PAGE_SIZE, PAGES_PER_CHUNK, NUM_PAGES, DEVICE_BYTES, DEVICE_FRACTION, HOST_BYTES, STAGING_BYTES,
    ),
    "scheduler": (POLICY, ORDER, PREEMPTION, MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, WATERMARK),
    "scheduler.layerkv": LAYERKV,
    "sim": (DEVICE, STACK, KERNELS, PIPELINE, LINK_SHARING, LINK_AWARE),
    "": (
        EXECUTOR, MAX_CONTEXT, DTYPE, SEED, TENSOR, ASYNC_DEPTH, DETERMINISTIC, ATTENTION_BACKEND, PRECOMPILE,
        COMPILATION_CACHE_DIR, DEBUG_CHECKS, LINK_GBS, LINK_UNIT, PREFETCH_DEPTH,
    ),
}  # fmt: skip
POOL_SIZES = (NUM_PAGES.name, DEVICE_BYTES.name, DEVICE_FRACTION.name)  # exactly one of them, at most
# What --help shows of them, besides the program's own; --helpfull shows all. In bold in README.md.
KEY_FLAGS = (
    MODEL, CONFIG, EXECUTOR, DEVICE, POLICY, PREEMPTION, STORE, NUM_PAGES, DEVICE_BYTES, HOST_BYTES, PAGE_SIZE,
    MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS, SEED,
)  # fmt: skip


def engine_config_from_flags(**fixed: Any) -> EngineConfig:
    """The EngineConfig that the flags describe: defaults, under --config, under flags that were given, under the fields
    that a program fixes.

    The flags then hold what was resolved, so that flags.txt repeats it.

    Raises:
      ConfigError: a value that does not validate, or two that contradict.
    """
    values = copy.deepcopy(CONFIG.value) or {}
    _lay_over(values, {h.name: h.value for holders in ENGINE_FLAGS.values() for h in holders if h.present})
    values["compilation_cache_dir"] = values.get("compilation_cache_dir", DEFAULTS.compilation_cache_dir) or None
    if NUM_PROCESSES.value is not None and not COORDINATOR.value:
        raise ConfigError(f"--num_processes={NUM_PROCESSES.value} needs --coordinator=HOST:PORT: where they meet")
    values |= fixed
    simulated = [f"--{h.name}={h.value}" for h in ENGINE_FLAGS["sim"] if h.value is not None]
    if simulated and values.get("executor", DEFAULTS.executor) != "sim":
        raise ConfigError(f"{simulated[0]} is for --executor=sim: give both, or leave it out")
    config = from_dict(EngineConfig, values, "--config")
    find_policy(config.scheduler.policy)
    for section, holders in ENGINE_FLAGS.items():
        if section == "sim" and config.executor != "sim":
            continue
        part = operator.attrgetter(section)(config) if section else config
        for holder in holders:
            flags.FLAGS[holder.name].value = getattr(part, field_of(section, holder.name))
    flags.FLAGS[COMPILATION_CACHE_DIR.name].value = config.compilation_cache_dir or ""  # unset would be the default
    flags.FLAGS[LINK_UNIT.name].value = config.link_unit_bytes or 0
    return config


def laid_over(config: EngineConfig, text: str, where: str = "--engine") -> EngineConfig:
    """`config` under the settings in `text`, `name=value,...`, each named and written as its flag.

    Args:
      where: the flag that holds the text, for messages.

    Raises:
      ConfigError: a name that no flag of the engine has, a value that its flag would not take, or one that contradicts.
    """
    known, given = {h.name for holders in ENGINE_FLAGS.values() for h in holders}, {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        if name not in known or not value:
            raise ConfigError(f"{where}={text}: {item!r} is not name=value of a flag of the engine (--helpfull)")
        try:
            given[name] = flags.FLAGS[name].parser.parse(value)
        except ValueError as e:
            raise ConfigError(f"{where}={text}: {name}: {e}") from None
    values = to_dict(config)
    _lay_over(values, given)
    result = from_dict(EngineConfig, values, where)
    find_policy(result.scheduler.policy)
    return result


def _lay_over(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Lays settings by flag name over those of an EngineConfig, nested; a size of the pool replaces another."""
    for section, holders in ENGINE_FLAGS.items():
        fields = values
        for part in section.split(".") if section else ():
            fields = fields.setdefault(part, {})
        names = {h.name for h in holders} & given.keys()
        if names & {*POOL_SIZES}:
            for name in POOL_SIZES:
                fields.pop(name, None)
        fields.update({field_of(section, name): given[name] for name in names})


def field_of(section: str, flag: str) -> str:
    """The field that a flag sets in its part of EngineConfig."""
    if flag == LINK_UNIT.name:
        return "link_unit_bytes"
    return flag.removeprefix(section.rpartition(".")[2] + "_") if section else flag


def own_flags() -> list[flags.Flag]:
    """The flags of this program: its own and those of the modules it imports from here, not absl's; by name."""
    by_module = flags.FLAGS.flags_by_module_dict().items()
    own = [f for module, fs in by_module if module == sys.argv[0] or module.startswith("experiments.") for f in fs]
    return sorted(own, key=lambda f: f.name)


def own_values() -> dict[str, Any]:
    """The values of `own_flags`, plain JSON types."""
    return {f.name: f.value for f in own_flags()}


def given_model() -> str | None:
    """--model or --model_spec, whichever was given.

    Raises:
      ConfigError: both were, or a --model_spec that names no model.
    """
    if MODEL_SPEC.value is None:
        return MODEL.value
    if MODEL.value is not None:
        raise ConfigError(f"--model={MODEL.value} and --model_spec={MODEL_SPEC.value}: give one of them")
    find_model(MODEL_SPEC.value)
    return MODEL_SPEC.value


def required_model() -> str:
    """`given_model`, which has no default.

    Raises:
      ConfigError: neither was given, or as `given_model`.
    """
    model = given_model()
    if not model:
        raise ConfigError(
            "--model is missing: a Hugging Face directory, or a preset such as base-124m; --model_spec takes your own"
        )
    return model


def num_processes() -> int:
    """--num_processes, or its default: unset it is not in flags.txt, where it would ask for a coordinator."""
    return 2 if NUM_PROCESSES.value is None else NUM_PROCESSES.value


def out_directory(program: str) -> Path:
    """--out, or results/<program>."""
    return Path(OUT.value or f"results/{program}")


def load_engine(model: str, config: EngineConfig) -> Engine:
    """`Engine.from_pretrained`; imports JAX here, after the flags were found to be good."""
    from engine import Engine

    if COORDINATOR.value and config.executor == "sim":
        raise ConfigError(f"--coordinator={COORDINATOR.value} shares real devices: leave it out with --executor=sim")
    if COORDINATOR.value:
        from engine.executor import distributed

        distributed.check(config, num_processes())
        distributed.start(COORDINATOR.value, num_processes(), process_id=0)
    return Engine.from_pretrained(model, config)


def run_main(main: Callable[..., int | None], *, takes: str = "", engine: bool = True) -> NoReturn:
    """Parses flags, runs `main()` and exits with what it returns.

    Args:
      main: takes no arguments; with `takes`, the list of positional ones.
      takes: names the positional arguments of a program that has any, such as `RUN ...`.
      engine: whether the program makes an engine of the flags. If not it declares those that it reads
        (`flags.declare_key_flag`), and a flag that it would ignore is refused; `--out` and `--overwrite` in any case.

    Bad input (a flag, a file, a request: any FolioError) is one line on stderr and exit code 2. Ctrl-C is one line
    and exit code 130; what a program wrote before stays.
    """

    def guarded(argv: Sequence[str]) -> int:
        try:
            _refuse_unread(engine)
            if takes:
                return main(list(argv[1:])) or 0
            if len(argv) > 1:
                raise ConfigError(f"unexpected argument {argv[1]!r}: options are written --name=value")
            return main() or 0
        except FolioError as e:
            return _complain(str(e), EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            return _complain("interrupted", EXIT_INTERRUPTED)

    for holder in KEY_FLAGS if engine else ():
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[holder.name])
    app.run(guarded, flags_parser=_parse_flags)
    raise AssertionError("app.run always exits")


def _refuse_unread(engine: bool) -> None:
    """Raises ConfigError for a flag of this file, or a knob, that was given and that the program does not read."""
    read = {f.name for f in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    shared = [*flags.FLAGS.flags_by_module_dict()[__name__], *(flags.FLAGS[h.name] for h in LAYERKV)]
    if engine:
        read |= {f.name for f in shared} - {OUT.name, OVERWRITE.name}
    for flag in shared:
        if flag.present and flag.name not in read:
            raise ConfigError(f"--{flag.name} means nothing to this program (--help lists the flags)")


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except flags.Error as e:
        sys.exit(_complain(f"{' '.join(str(e).split())} (--help lists the flags)", EXIT_BAD_INPUT))


def _complain(line: str, code: int) -> int:
    print(f"{Path(sys.argv[0]).stem}: {line}", file=sys.stderr, flush=True)
    return code
