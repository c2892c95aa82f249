"""What the figures of vTensor share: the paper's points, its device, its kernels in our terms, and how they look."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from engine.costmodel.device import load_device
from engine.costmodel.paper_kernels import Attention, find_kernels
from engine.costmodel.roofline import Shard
from engine.presets import preset

PUBLISHED = Path(__file__).parents[2] / "published" / "vtensor.json"
PAPER = "vTensor (arXiv 2407.15309)"
MODEL = "yi-6b-200k"  # 32 query heads and 4 KV heads of 128; the kernels' figures use its heads
DEVICE = "a100", "vllm-0.14"  # the stack gives FlashAttention's launch time, nothing else
GIB = 2**30
VLLM, FA_PAGED, FLEXINFER, FA_NATIVE = "vllm-0.4.2", "fa-paged", "flexinfer", "fa-contiguous"
LABELS = {
    VLLM: "vLLM 0.4.2",
    FA_PAGED: "FlashAttention, paged",
    FLEXINFER: "FlexInfer",
    FA_NATIVE: "FlashAttention, contiguous",
}
# Okabe and Ito's palette, with markers that differ in print.
STYLES: dict[str, dict[str, Any]] = {
    VLLM: {"color": "#D55E00", "marker": "s"},
    FA_PAGED: {"color": "#E69F00", "marker": "v"},
    FA_NATIVE: {"color": "#009E73", "marker": "D", "markersize": 6.5},
    FLEXINFER: {"color": "#0072B2", "marker": "o"},
}


@cache
def figures() -> dict[str, Any]:
    """What the file of the paper's points has, by figure."""
    return json.loads(PUBLISHED.read_bytes())["figures"]


def published(figure: str, panel: str) -> dict[str, list[list[float]]]:
    """Points [x, y] of a panel, by series."""
    return {name: list(points) for name, points in figures()[figure]["panels"][panel]["series"].items()}


@cache
def attention(kernels: str, kv_heads: int) -> Attention:
    """Decode and prefill attention of one layer of 32 query heads on the paper's device."""
    model = preset(MODEL).replace(num_kv_heads=kv_heads)
    return find_kernels(kernels)(model, load_device(*DEVICE), Shard.of(model, 1))


def decode_us(kernels: str, batch: int, tokens: int, kv_heads: int) -> float:
    """Microseconds of `batch` rows that attend to `tokens` each."""
    return 1e6 * attention(kernels, kv_heads)[0].seconds(batch, batch * tokens, tokens)


def prefill_us(kernels: str, batch: int, cached: int, new: int, kv_heads: int = 4) -> float:
    """Microseconds of `batch` prompts of `new` tokens behind `cached` ones."""
    return 1e6 * attention(kernels, kv_heads)[1].seconds(((cached, new),) * batch)
