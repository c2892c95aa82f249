"""The attention kernels that the vTensor paper compares (arXiv 2407.15309, figures 7 and 8), on any device.

They were measured on an A100; here each is a share of a device's bandwidth, matrix peak or general-core peak. Names:

* `vllm-0.4.2`: paged decode on the general cores, one query head at a time; prompts with a cached prefix by Triton's
  prefix prefill, which reads the prefix at another rate than the new tokens; others by FlashAttention.
* `fa-paged`: FlashAttention 2.5.8 over a block table; its decode does not split a row.
* `fa-contiguous`: the same over contiguous KV.
* `flexinfer`: the same over virtual memory, the paper's system.

Only attention differs: the constants for everything else are the stack's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config import ModelConfig
from engine.costmodel.attention import LinearDecode, PairwisePrefill, kv_token_bytes, layer_windows, pair_flops
from engine.costmodel.device import DeviceProfile
from engine.costmodel.roofline import Shard
from engine.costmodel.sourced import Provenance, check_ranges, provenance_table, read_object, read_sourced
from engine.errors import ConfigError

FILE = Path(__file__).with_name("paper_kernels.json")
NAMES = ("vllm-0.4.2", "fa-paged", "fa-contiguous", "flexinfer")
Attention = tuple[LinearDecode, PairwisePrefill]


@dataclass(frozen=True, kw_only=True)
class PaperKernels:
    """Decode and prefill attention as the figures have them."""

    t0_decode_us: float
    eff_decode_bw: float  # of memory_gbs
    eff_decode_cores: float | None = None  # of fp32_tflops: products on the general cores; None: on the matrix units
    serial_decode_us: float = 0.0  # per token of the longest row: one chain, the same on every device
    t0_prefill_us: float
    eff_prefill: float  # of the matrix peak
    eff_prefix: float | None = None  # pairs with a cached prefix; None: as others
    eff_new: float | None = None  # pairs among the new tokens of a prompt that has one

    def __post_init__(self):
        shares = ("eff_decode_bw", "eff_decode_cores", "eff_prefill", "eff_prefix", "eff_new")
        check_ranges(self, shares=shares)


def load_kernels(name: str) -> tuple[PaperKernels, dict[str, Provenance]]:
    """The constants of one of `NAMES`, and where each comes from.

    Raises:
      ConfigError: an unknown name (lists the known ones).
    """
    if name not in NAMES:
        raise ConfigError(f"kernels {name!r} are unknown; known: {', '.join(NAMES)}")
    return read_sourced(PaperKernels, read_object(FILE, "kernels"), name, FILE)


def describe_kernels(name: str) -> str:
    """A table of every constant with its kind and source."""
    kernels, provenance = load_kernels(name)
    return "\n".join([f"kernels {name}", provenance_table(vars(kernels), provenance)])


def find_kernels(name: str) -> Callable[[ModelConfig, DeviceProfile, Shard], Attention]:
    """What makes the attention of a model on a device from the kernels of that name.

    Raises:
      ConfigError: as `load_kernels`.
    """
    kernels, _ = load_kernels(name)

    def make(model: ModelConfig, profile: DeviceProfile, shard: Shard) -> Attention:
        hardware = profile.hardware
        per_token = kv_token_bytes(model, shard) / (hardware.memory_gbs * 1e9 * kernels.eff_decode_bw)
        if kernels.eff_decode_cores is not None:
            if hardware.fp32_tflops is None:
                raise ConfigError(f"kernels {name} run on general cores; device {profile.name} has no fp32_tflops")
            cores = hardware.fp32_tflops * 1e12 * kernels.eff_decode_cores
            per_token = max(per_token, pair_flops(model, shard) / cores)
        peak, alpha = profile.peak_flops(model.dtype), profile.constants.skew_alpha
        plain = kernels.eff_prefill
        shares = (plain, kernels.eff_prefix or plain, kernels.eff_new or plain)
        per_pair, per_prefix, per_new = (pair_flops(model, shard) / (peak * share) for share in shares)
        chain = kernels.serial_decode_us * 1e-6
        t0_decode, t0_prefill, windows = kernels.t0_decode_us * 1e-6, kernels.t0_prefill_us * 1e-6, layer_windows(model)
        return (
            LinearDecode(t0_decode, per_token, skew_alpha=alpha, serial_per_token=chain),
            PairwisePrefill(t0_prefill, per_pair, per_prefix, per_new, windows=windows),
        )

    return make
