"""Configuration: frozen dataclasses, validated at construction, dumped beside results as JSON.

`ModelConfig` describes a model, `CacheConfig` the KV memory, `SchedulerConfig` the policy, `EngineConfig` everything
a run needs besides the weights. Nothing here imports JAX.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError
from engine.scheduler.layerkv.config import LayerKVConfig

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes per element
PREEMPTIONS = ("recompute", "swap")
ORDERS = ("fcfs", "sjf", "priority")
STORES = ("paged", "native")
MAX_SLOTS = 4096
EXECUTORS = ("jax", "sim")
LINK_SHARING = ("ps", "fifo")
ROPE_SCALINGS = ("default", "linear", "llama3")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ConfigError(what)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as `rope_theta` / `rope_scaling` (or `rope_parameters`) of a Hugging Face config."""

    theta: float = 10_000.0
    scaling: str = "default"  # default | linear | llama3
    factor: float = 1.0  # linear, llama3
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    original_max_position: int = 8192  # llama3

    def __post_init__(self):
        _require(
            self.scaling in ROPE_SCALINGS,
            f"rope scaling {self.scaling!r} is not supported; known: {', '.join(ROPE_SCALINGS)}",
        )
        _require(self.theta > 0, f"rope theta must be > 0, got {self.theta}")
        ordered = self.scaling != "llama3" or self.low_freq_factor < self.high_freq_factor
        _require(ordered, f"rope low_freq_factor {self.low_freq_factor} must be < high_freq_factor")
        _require(self.factor >= 1, f"rope factor must be >= 1, got {self.factor}")


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder of the Llama family. Shape letters: L layers, M width, H query heads, K kv heads, D head dim,
    F ffn width, V vocabulary."""

    name: str
    num_layers: int  # L
    hidden_size: int  # M
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # D
    ffn_size: int  # F
    vocab_size: int  # V
    max_context: int
    architecture: str = "LlamaForCausalLM"
    dtype: str = "float32"  # of weights and activations
    rope: RopeConfig = field(default_factory=RopeConfig)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    windows: tuple[int | None, ...] = ()  # sliding window in tokens per layer; () = none anywhere
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self):
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "ffn_size",
            "vocab_size",
            "max_context",
        ):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, f"model {name} must be an integer > 0, got {value!r}")
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"model num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"model head_dim must be even, got {self.head_dim}")
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is not supported; known: {', '.join(DTYPES)}")
        _require(
            len(self.windows) in (0, self.num_layers),
            f"model windows has {len(self.windows)} entries for {self.num_layers} layers",
        )
        odd = [w for w in self.windows if w is not None and (type(w) is not int or w < 1)]
        _require(not odd, f"a sliding window must be an integer >= 1, got {odd[:1]}")
        bad = [t for t in self.eos_token_ids if not 0 <= t < self.vocab_size]
        _require(not bad, f"model eos_token_ids {bad} are outside the vocabulary of {self.vocab_size}")

    @property
    def group_size(self) -> int:
        """G: query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_bytes_per_token_per_layer(self) -> int:
        """Bytes of K and V of one token in one layer, in the model's dtype."""
        return 2 * self.num_kv_heads * self.head_dim * DTYPES[self.dtype]

    @property
    def num_parameters(self) -> int:
        """Number of weights, embeddings included (tied ones once)."""
        m, h, k, d, f = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.ffn_size
        layer = m * (h + 2 * k) * d + h * d * m + 3 * m * f + 2 * m
        layer += (h + 2 * k) * d * self.qkv_bias + 2 * d * self.qk_norm
        return self.num_layers * layer + self.vocab_size * m * (1 if self.tie_embeddings else 2) + m

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with fields changed, validated again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class CacheConfig:
    """KV memory. The device tier is sized by exactly one of `num_pages`, `device_bytes`, `device_fraction`; by none
    of them it takes what can be spared (on CPU at most 1 GiB, on GPU/TPU 0.9 of the device)."""

    store: str = "paged"  # paged: pages as tokens come | native: the whole context at once, contiguous
    page_size: int = 16  # S: tokens of one layer in a page
    pages_per_chunk: int | None = None  # None: about 2 MiB on GPU/TPU, one page on CPU
    num_pages: int | None = None  # usable pages over all layers, the reserved ones not counted
    device_bytes: int | None = None  # of each device
    device_fraction: float | None = None  # of each device's memory, weights and activations included
    host_bytes: int = 0  # the host tier's cap; 0: no host tier
    staging_bytes: int = 256 << 20  # blocks on their way, per direction
    # To stream one parked layer of all rows of a step through, beside the pool; 0: no layer is ever parked. None: 0 or,
    # under a policy that parks layers, one layer of the longest context, out of the pool.
    transient_pages: int | None = None

    def __post_init__(self):
        _require(
            self.page_size >= 1 and self.page_size & (self.page_size - 1) == 0,
            f"page_size must be a power of two, got {self.page_size}",
        )
        _require(self.page_size <= 1024, f"page_size must be <= 1024 tokens, got {self.page_size}")
        _require(self.store in STORES, f"store {self.store!r}; known: {', '.join(STORES)}")
        c = self.pages_per_chunk
        _require(c is None or self.store == "paged", f"pages_per_chunk={c} is for store=paged: a run has no chunks")
        _require(c is None or 1 <= c <= 4096, f"pages_per_chunk must be in [1, 4096], got {c}")
        sizes = [n for n in ("num_pages", "device_bytes", "device_fraction") if getattr(self, n) is not None]
        _require(len(sizes) <= 1, f"the device tier is sized twice, by {' and by '.join(sizes)}; give one of them")
        _require(self.num_pages is None or self.num_pages > 0, f"num_pages must be > 0, got {self.num_pages}")
        _require(
            self.device_bytes is None or self.device_bytes > 0,
            f"device_bytes must be > 0, got {self.device_bytes}",
        )
        f = self.device_fraction
        _require(f is None or 0 < f <= 1, f"device_fraction must be in (0, 1], got {f}")
        _require(self.host_bytes >= 0, f"host_bytes must be >= 0, got {self.host_bytes}")
        t = self.transient_pages
        _require(t is None or t >= 0, f"transient_pages must be >= 0, got {t}")
        _require(not self.transient_pages or self.host_bytes > 0, "transient_pages need a host tier: set host_bytes")
        _require(not self.transient_pages or self.store == "paged", "transient_pages are for store=paged")
        _require(self.staging_bytes > 0, f"staging_bytes must be > 0, got {self.staging_bytes}")

    @property
    def num_transient(self) -> int:
        """`transient_pages`, once they are settled."""
        return self.transient_pages or 0


@dataclass(frozen=True)
class SchedulerConfig:
    """The policy and the limits every policy obeys."""

    policy: str = "vllm_v0"  # a registered name, package.module:Name or path/to/file.py:Name
    order: str = "fcfs"  # fcfs | sjf | priority: whose turn it is, and who is preempted (`scheduler/queue.py`)
    max_num_seqs: int = 256  # sequences that hold device KV at once (slots)
    max_num_batched_tokens: int | None = None  # per step; None: the policy's default
    watermark: float = 0.01  # share of pages kept free at admission
    preemption: str = "recompute"  # recompute | swap: what becomes of the KV of a preempted sequence
    layerkv: LayerKVConfig = field(default_factory=LayerKVConfig)  # of policy=layerkv

    def __post_init__(self):
        _require(
            1 <= self.max_num_seqs <= MAX_SLOTS, f"max_num_seqs must be in [1, {MAX_SLOTS}], got {self.max_num_seqs}"
        )
        t = self.max_num_batched_tokens
        _require(t is None or t >= 1, f"max_num_batched_tokens must be >= 1, got {t}")
        _require(0 <= self.watermark < 1, f"watermark must be in [0, 1), got {self.watermark}")
        _require(self.order in ORDERS, f"order {self.order!r}; known: {', '.join(ORDERS)}")
        _require(self.preemption in PREEMPTIONS, f"preemption {self.preemption!r}; known: {', '.join(PREEMPTIONS)}")


@dataclass(frozen=True)
class SimConfig:
    """What `executor=sim` stands in for: a device, its software, and how copies share the link to the host."""

    device: str = (
        "h100"  # a device of `engine/costmodel/devices`, FILE.json, package.module:Name or path/to/file.py:Name
    )
    stack: str | None = None  # kernel stack whose constants are used; None: the device's default
    kernels: str | None = None  # attention kernels (`costmodel/attention.py`); None: the stack's own
    pipeline: int = 1  # stages that share the layers, each with a KV pool of its own
    link_sharing: str = "ps"  # ps: copies of a direction share the link; fifo: one after the other, as on a device
    link_aware: bool = True  # copies yield to all-reduces on the link, between two units; False: these wait for all

    def __post_init__(self):
        _require(1 <= self.pipeline <= 64, f"pipeline must be in [1, 64] stages, got {self.pipeline}")
        known = ", ".join(LINK_SHARING)
        _require(self.link_sharing in LINK_SHARING, f"link_sharing {self.link_sharing!r}; known: {known}")


def _changed(sim: SimConfig) -> str:
    """The first setting that is not the default, as name=value."""
    return next((f"{k}={v}" for k, v in vars(sim).items() if v != getattr(SimConfig, k)), "")


@dataclass(frozen=True)
class EngineConfig:
    """Everything a run needs besides the weights. `EngineConfig()` works on any machine."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    executor: str = "jax"  # jax: the device; sim: the same engine on a virtual clock, timed by a cost model
    sim: SimConfig = field(default_factory=SimConfig)
    max_context: int | None = None  # None: the model's, capped by what fits, and said so
    dtype: str | None = None  # None: the model's
    seed: int = 0  # random weights and unseeded requests
    tensor: int = 1  # devices that share heads, ffn and vocabulary: the mesh axis `tensor`
    async_depth: int = 1  # steps submitted ahead of the one whose tokens are waited for; 0: none
    deterministic: bool = False  # one shape for everything: logits bit-identical (DESIGN invariant 4 a)
    prefetch_depth: int = 1  # layers that read pages from the host, however far ahead, fetched while one is computed
    link_gbs: float | None = None  # pace copies to and from the host to so many 1e9 bytes/s each way; None: unpaced
    # In which copies move over each device's link, not interrupted; 0 or None: whole. Simulated, collectives wait for
    # one of them; on a device, no more is dispatched in one piece.
    link_unit_bytes: int | None = 4 << 20
    attention_backend: str | None = None  # None: the default, which always works; a name is obeyed or fails
    query_tile: int = 64  # TQ: tokens in one prefill query tile
    max_tiles: int = 16  # NT: query tiles in one device program; longer prefills loop over it inside each layer
    precompile: bool = False  # compile every bucket at start-up and print the table
    compilation_cache_dir: str | None = "~/.cache/folio/jax"  # None: off
    debug_checks: bool = False  # check invariants and page tables on the host at every step
    poison: bool = False  # fill unwritten KV with NaN (tests)
    capture_logits: bool = False  # keep the float32 logits of every sampled token (tests, scoring)

    def __post_init__(self):
        _require(
            self.max_context is None or self.max_context >= 2,
            f"max_context must be >= 2, got {self.max_context}",
        )
        _require(self.executor in EXECUTORS, f"executor {self.executor!r}; known: {', '.join(EXECUTORS)}")
        _require(
            self.executor == "sim" or self.sim == SimConfig(),
            f"{_changed(self.sim)} is simulated only: set executor=sim, or leave it out",
        )
        _require(self.dtype is None or self.dtype in DTYPES, f"dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        _require(1 <= self.tensor <= 1024, f"tensor must be in [1, 1024] devices, got {self.tensor}")
        _require(self.async_depth in (0, 1), f"async_depth must be 0 or 1, got {self.async_depth}")
        _require(self.prefetch_depth >= 0, f"prefetch_depth must be >= 0, got {self.prefetch_depth}")
        _require(self.link_gbs is None or self.link_gbs > 0, f"link_gbs must be > 0, got {self.link_gbs}")
        u = self.link_unit_bytes
        _require(u is None or u >= 0, f"link_unit_bytes must be >= 0 (0: whole copies), got {u}")
        _require(
            self.scheduler.preemption == "recompute" or self.cache.host_bytes > 0,
            "preemption=swap needs a host tier: set host_bytes",
        )
        _require(
            self.query_tile >= 8 and self.query_tile & (self.query_tile - 1) == 0,
            f"query_tile must be a power of two >= 8, got {self.query_tile}",
        )
        _require(
            self.max_tiles >= 1 and self.max_tiles & (self.max_tiles - 1) == 0,
            f"max_tiles must be a power of two, got {self.max_tiles}",
        )
        _require(
            not self.deterministic or self.tensor == 1,
            f"deterministic needs tensor=1, got {self.tensor}: devices add partial sums in another order",
        )
        _require(
            not self.deterministic or self.query_tile * self.max_tiles >= 64,
            "deterministic needs query_tile * max_tiles >= 64 tokens in a program",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any], where: str = "config") -> Any:
    """Builds a configuration from plain JSON types.

    Raises:
      ConfigError: an unknown field (the known ones are listed), or a value of the wrong type or out of range.
    """
    fields = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(fields))
    _require(not unknown, f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(fields)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(fields[name]) and isinstance(value, dict):
            value = from_dict(fields[name], value, f"{where}.{name}")
        value = tuple(value) if isinstance(value, list) else value
        _require(_fits(value, fields[name]), f"{where}.{name} must be {_type_name(fields[name])}, got {value!r}")
        built[name] = value
    return cls(**built)


def _fits(value: Any, hint: Any) -> bool:
    """True when a value may stand for a field of this type: an int for a float, but no bool for a number."""
    kinds = tuple(typing.get_origin(h) or h for h in typing.get_args(hint) or (hint,))
    if typing.get_origin(hint) is tuple:
        kinds = (tuple,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("None", "null")


def cdiv(a: int, b: int) -> int:
    """ceil(a / b) of integers."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, math.ceil(math.log2(max(n, 1))))
