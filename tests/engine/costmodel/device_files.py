"""A device with round numbers, as a file: 100 TFLOP/s, 1,000 GB/s, constants that are easy to multiply."""

import json
from pathlib import Path

from engine.config import ModelConfig
from engine.costmodel.device import DeviceProfile, load_device

HARDWARE = {
    "bf16_tflops": 100,
    "memory_gib": 16,
    "memory_gbs": 1000,
    "link_gbs_spec": 32,
    "link_gbs": 25,
    "link_latency_us": 10,
    "reserved_gib": 1,
    "interconnect": "pcie",
    "fp32_tflops": 10,
}
CONSTANTS = {
    "eff_gemm": 0.5,
    "eff_gemm_bw": 0.8,
    "t0_gemm_us": 3,
    "eff_attn_prefill": 0.25,
    "eff_attn_decode_bw": 0.5,
    "t0_attn_us": 7,
    "eff_elementwise_bw": 0.8,
    "t0_elementwise_us": 2,
    "allreduce_busbw_gbs": {"2": 20, "4": 10},
    "t0_allreduce_us": {"2": 5, "4": 9},
    "t0_host_us": 100,
}
MODEL = ModelConfig("round", 3, 1024, 8, 4, 128, 2048, 10_000, 32768, dtype="bfloat16")  # L, M, H, K, D, F, V


def device_file(**changes) -> dict:
    """The content of a device file; `changes` are values of fields of either section, None takes a field out."""
    sections = {}
    for name, values in (("hardware", HARDWARE), ("constants", CONSTANTS)):
        known = values | {k: v for k, v in changes.items() if (k in HARDWARE) == (name == "hardware")}
        entries = {k: {"value": v, "kind": "estimated", "source": "round"} for k, v in known.items() if v is not None}
        sections[name] = entries
    return {"name": "round", "description": "a round device", "stack": "test", **sections}


def write(path: Path, content: dict) -> str:
    """Writes a device file; its path as text."""
    path.write_text(json.dumps(content))
    return str(path)


def profile(tmp_path: Path, **changes) -> DeviceProfile:
    """The round device with changed values."""
    return load_device(write(tmp_path / "round.json", device_file(**changes)))
