"""The scheduler of vLLM's V1 engine as a peer: the real one, out of an unpacked wheel, on any machine.

    pip download --no-deps vllm==0.33.0
    unzip -q vllm-0.33.0-*.whl 'vllm/*.py' 'vllm-*.dist-info/METADATA' -d DIR

What decides runs as it was published: the modules in `REAL`, which are the scheduler, its queues, the KV cache manager
with its block pool, and requests. Every other module of vLLM, and what of its dependencies these import, is a stub: it
can be named, called and derived from, and raises when a decision asks it for a truth value. Settings not given here are
None: a part that is off, and a TypeError where a number is wanted. Async scheduling, prefix caching, speculation,
connectors and the watermark are off.
"""

from __future__ import annotations

import importlib
import re
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from engine.errors import ConfigError
from experiments.schedules import PAGE_SIZE, Arrival, Load, Step

REAL = re.compile(
    r"vllm\.v1\.(core(\..*)?|request|kv_cache_interface|kv_cache_spec_registry|kv_cache_layout|engine|outputs|utils"
    r"|metrics\.stats|structured_output\.request)|vllm\.utils(\.math_utils)?"
)
STUBBED = ("vllm", "torch", "msgspec", "typing_extensions")  # top-level packages
OFF = ("VLLM_CUSTOM_SCOPES_FOR_PROFILING", "VLLM_NVTX_SCOPES_FOR_PROFILING", "VLLM_USE_V2_MODEL_RUNNER")


class _StubClass(type):
    """The class of stubs that stand for classes, functions and constants."""

    def __getattr__(cls, name: str) -> Any:
        return _stub(name)

    def __bool__(cls) -> bool:
        raise TypeError(f"vLLM's scheduler asks whether {cls.__name__} is true, but it is a stub")

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__  # annotations such as `str | Stub`


class _Stub(metaclass=_StubClass):
    """Keeps what it is constructed with by keyword."""

    def __init_subclass__(cls, **options: Any): ...

    def __init__(self, *args: Any, **fields: Any):
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        return _stub(name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


def _stub(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _StubClass(name, (_Stub,), {})


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _stub(name)


class _Finder(MetaPathFinder, Loader):
    """Finds stubs for all that is `STUBBED` and not `REAL`; what is real is found in the package's folder."""

    def __init__(self, path: Path):
        self._path = path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in STUBBED or REAL.fullmatch(name):
            return None
        spec = ModuleSpec(name, self, is_package=True)
        spec.submodule_search_locations = [str(self._path.joinpath(*name.split(".")))]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """A stub has no body."""


class _Settings(SimpleNamespace):
    """What is not given is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def version(path: Path) -> str:
    """The version of vLLM that was unpacked into `path`.

    Raises:
      ConfigError: there is none.
    """
    found = sorted(path.glob("vllm-*.dist-info/METADATA"))
    if len(found) != 1 or not (path / "vllm" / "v1" / "core" / "sched" / "scheduler.py").is_file():
        raise ConfigError(
            f"--vllm_path={path}: no unpacked vLLM wheel (expected vllm/ and vllm-VERSION.dist-info/METADATA; "
            "`pip download --no-deps vllm`, then unzip the wheel there)"
        )
    return found[0].parent.name.removeprefix("vllm-").removesuffix(".dist-info")


def load_modules(path: Path) -> SimpleNamespace:
    """The modules of the vLLM in `path` that this file uses. Once per process, in which they and stubs then stay.

    Raises:
      ConfigError: they import what is neither there nor a stub; names it.
    """
    sys.meta_path.insert(0, _Finder(path))  # not taken out again: some imports come when the scheduler is built
    try:
        importlib.import_module("vllm.envs").__dict__.update(dict.fromkeys(OFF, False))
        names = ("core.sched.scheduler", "kv_cache_interface", "outputs", "request")
        modules = {name.rpartition(".")[2]: importlib.import_module(f"vllm.v1.{name}") for name in names}
    except ImportError as e:
        raise ConfigError(f"--vllm_path={path}: version {version(path)} cannot be imported: {e}") from e
    return SimpleNamespace(**modules)


class VllmScheduler:
    """vLLM's scheduler under a load: a `schedules.Scheduler`."""

    def __init__(self, vllm: SimpleNamespace, load: Load, reserve_full_isl: bool = True):
        """`vllm`: from `load_modules`. `reserve_full_isl`: its `scheduler_reserve_full_isl`, on by default as there."""
        kv = vllm.kv_cache_interface
        num_blocks = load.num_blocks + 1  # vLLM keeps the first for itself: the null block
        spec = kv.FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=1, head_size=1, dtype=None)
        config = _Settings(
            scheduler_config=_Settings(
                policy=load.order,
                max_num_seqs=load.max_num_seqs,
                max_num_batched_tokens=load.max_num_batched_tokens,
                long_prefill_token_threshold=0,
                prefill_schedule_interval=1,
                enable_chunked_prefill=True,
                scheduler_reserve_full_isl=reserve_full_isl,
                watermark=0.0,
            ),
            cache_config=_Settings(num_gpu_blocks=num_blocks, block_size=PAGE_SIZE, enable_prefix_caching=False),
            model_config=_Settings(max_model_len=load.max_context),
            parallel_config=_Settings(
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
                pipeline_parallel_size=1,
                data_parallel_size=1,
            ),
            observability_config=_Settings(),
            aux_output_config=_Settings(),
            ec_manager_config=_Settings(get_encoder_cache_manager_obj=lambda: None),
            num_speculative_tokens=0,
            num_lookahead_tokens=0,
            num_prefill_lookahead_tokens=0,
        )
        no_grammar = SimpleNamespace(should_advance=lambda request: False, accept_tokens=lambda request, tokens: True)
        self._vllm = vllm
        self._scheduler = vllm.scheduler.Scheduler(
            config,
            kv.KVCacheConfig(num_blocks, [], [kv.KVCacheGroupSpec(["layer"], spec)]),
            no_grammar,
            PAGE_SIZE,
            mm_registry=SimpleNamespace(supports_multimodal_inputs=lambda model: False),
        )

    def add(self, number: int, arrival: Arrival) -> None:
        """See `schedules.Scheduler`."""
        sampling = _Settings(max_tokens=arrival.output_len, min_tokens=0)
        request = self._vllm.request.Request(
            str(number), [1] * arrival.prompt_len, sampling, None, arrival_time=number, priority=arrival.priority
        )
        self._scheduler.add_request(request)

    def unfinished(self) -> bool:
        """See `schedules.Scheduler`."""
        return self._scheduler.has_unfinished_requests()

    def step(self) -> Step:
        """See `schedules.Scheduler`."""
        before = self._running()
        output = self._scheduler.schedule()
        tokens = {int(request_id): count for request_id, count in output.num_scheduled_tokens.items()}
        free = self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        step = Step.between(before, self._running(), tokens.items(), free)
        if tokens:
            self._scheduler.update_from_output(output, self._sampled(list(output.num_scheduled_tokens)))
        return step

    def _sampled(self, request_ids: list[str]) -> Any:
        """A token for each request whose tokens have all been computed."""
        requests = (self._scheduler.requests[request_id] for request_id in request_ids)
        tokens = [[1] * (request.num_computed_tokens == request.num_tokens) for request in requests]
        index = {request_id: i for i, request_id in enumerate(request_ids)}
        return self._vllm.outputs.ModelRunnerOutput(request_ids, index, tokens)

    def _running(self) -> list[int]:
        return [int(request.request_id) for request in self._scheduler.running]
