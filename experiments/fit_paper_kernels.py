"""Fits the attention kernels of the vTensor paper to its figures, and says how they predict the points left out.

    python -m experiments.fit_paper_kernels

Decode is fitted to figure 7's batch sweep, prefill to figure 8's; lengths, kv heads and prefix ratios are predictions.
The launch time of FlashAttention is not in the figures: it is that of the A100's constants. Triton's kernel reads the
prefix and the new tokens in two loops at two rates, so it is fitted to two prefix ratios; the third is a prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from engine.costmodel.device import DeviceProfile, load_device
from engine.costmodel.paper_kernels import NAMES, find_kernels
from engine.costmodel.roofline import Shard
from engine.errors import ConfigError
from engine.presets import preset
from experiments import common_flags
from experiments.fit_device import minimize, rounded
from experiments.operator_tables import Floats
from experiments.tables import format_table

PUBLISHED = flags.DEFINE_string(
    "vtensor_points", str(Path(__file__).parent / "published" / "vtensor.json"), "The points of the paper's figures."
)

DECODE = dict(zip(NAMES, ("vllm_paged", "fa_paged", "fa_native", "flexinfer"), strict=True))  # series of figure 7
PREFILL = DECODE | {"vllm-0.4.2": "triton_prefill"}  # of figure 8
HEADS, DIM, WIDTH, LENGTH = 32, 128, 2, 16384
Points = list[tuple[int, int, int, float]]


def decode_points(figures: dict[str, Any], kernels: str, panel: str) -> Points:
    """(batch, tokens per row, kv heads, seconds) of a panel of figure 7: `batch`, `length` or `kv_heads`."""
    series = figures["fig7"]["panels"][panel]["series"][DECODE[kernels]]
    place = {
        "batch": (lambda x: (x, LENGTH, 4)),
        "length": (lambda x: (16, x, 4)),
        "kv_heads": (lambda x: (16, LENGTH, x)),
    }
    return [(*place[panel](int(x)), us * 1e-6) for x, us in series]


def prefill_points(figures: dict[str, Any], kernels: str, panel: str) -> Points:
    """(batch, cached, new tokens, seconds) of a panel of figure 8: `batch` or `prefix_ratio`."""
    series = figures["fig8"]["panels"][panel]["series"][PREFILL[kernels]]
    shapes = [(x, 0.5, us) if panel == "batch" else (8, x, us) for x, us in series]
    return [(int(b), int(ratio * LENGTH), int((1 - ratio) * LENGTH), us * 1e-6) for b, ratio, us in shapes]


def errors(figures: dict[str, Any], kernels: str, profile: DeviceProfile) -> dict[str, Floats]:
    """Relative errors of the kernels in `engine/costmodel` at every point of every panel."""
    model, make = preset("yi-6b-200k"), find_kernels(kernels)
    found = {}
    for panel in ("batch", "length", "kv_heads"):
        points, e = decode_points(figures, kernels, panel), []
        for batch, tokens, kv_heads, seconds in points:
            shaped = model.replace(num_kv_heads=kv_heads)
            decode, _ = make(shaped, profile, Shard.of(shaped, 1))
            e.append(decode.seconds(batch, batch * tokens, tokens) / seconds - 1)
        found[f"decode {panel}"] = np.array(e)
    _, prefill = make(model, profile, Shard.of(model, 1))
    for panel in ("batch", "prefix_ratio"):
        points = prefill_points(figures, kernels, panel)
        found[f"prefill {panel}"] = np.array([prefill.seconds(((s, n),) * b) / t - 1 for b, s, n, t in points])
    return found


def fit(figures: dict[str, Any], profile: DeviceProfile) -> dict[str, dict[str, float]]:
    """The constants of every kernel."""
    t0, hardware = profile.constants.t0_attn_us * 1e-6, profile.hardware
    fitted = {}
    for kernels in NAMES:
        points = decode_points(figures, kernels, "batch")
        if kernels == "fa-paged":
            points = points[1:]  # at batch 1 it takes 0.62 of what its chain takes everywhere else
        batch, tokens, kv_heads, seconds = np.array(points).T
        flops = 4 * batch * HEADS * DIM * tokens / (hardware.fp32_tflops or 1) / 1e12
        read = 2 * batch * tokens * kv_heads * DIM * WIDTH / (hardware.memory_gbs * 1e9)
        if kernels == "vllm-0.4.2":
            x, _ = minimize(lambda x, f=flops: x[0] * 1e-6 + f / x[1], [50.0, 0.2], seconds, power=2)
            values = {"t0_decode_us": x[0], "eff_decode_cores": x[1]}
        else:
            chain = [0.03 if kernels == "fa-paged" else 0.005]
            x, _ = minimize(
                lambda x, r=read, t=tokens: t0 + np.maximum(r / x[0], x[1] * 1e-6 * t), [0.8, *chain], seconds, power=2
            )
            values = {"eff_decode_bw": x[0], "serial_decode_us": x[1]}
        fitted[kernels] = {
            name: rounded(value) for name, value in (values | fit_prefill(figures, kernels, profile)).items()
        }
    return fitted


def fit_prefill(figures: dict[str, Any], kernels: str, profile: DeviceProfile) -> dict[str, float]:
    """Shares of the matrix peak: one for all pairs, or Triton's two."""
    t0, peak = profile.constants.t0_attn_us * 1e-6, profile.hardware.bf16_tflops * 1e12
    two = kernels == "vllm-0.4.2"
    points = prefill_points(figures, kernels, "prefix_ratio")[:2] if two else prefill_points(figures, kernels, "batch")
    batch, start, new, seconds = np.array(points).T
    prefix, among = (4 * batch * HEADS * DIM * pairs / peak for pairs in (new * start, new * (new + 1) / 2))
    if two:
        rates = np.linalg.solve(np.stack([prefix, among], 1), seconds - t0)
        return {"eff_prefix": 1 / rates[0], "eff_new": 1 / rates[1]}
    x, _ = minimize(lambda x: t0 + (prefix + among) / x[0], [0.6], seconds, power=2)
    return {"eff_prefill": x[0]}


def main() -> int:
    """The program."""
    path, profile = Path(PUBLISHED.value), load_device("a100", "vllm-0.14")
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
    except OSError as e:
        raise ConfigError(f"--vtensor_points={path} cannot be read: {e.strerror}") from None
    rows = [
        (kernels, panel, f"{np.abs(e).mean():.1%}", " ".join(f"{x:+.1%}" for x in e))
        for kernels in NAMES
        for panel, e in errors(figures, kernels, profile).items()
    ]
    print(format_table(("kernels", "panel", "MAPE", "errors of the packaged constants"), rows))
    print(json.dumps(fit(figures, profile)))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
