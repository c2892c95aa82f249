"""How far the cost model is from measured operators and steps.

    python -m experiments.fidelity --profiles=../shared/profiles

Steps are those of `published/step_times.json`. Operator tables are read from `--profiles` where that folder is there;
those in parquet need pyarrow, and only `fit_device` looks at them. Prints a Markdown table: number of points, mean and
largest absolute relative error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ModelConfig
from engine.costmodel.device import load_device
from engine.costmodel.roofline import DenseOps
from engine.costmodel.step_model import StepModel, StepWork
from engine.costmodel.tables import OpTables
from engine.presets import preset
from experiments import common_flags
from experiments.operator_tables import PROFILES, Floats, vidur_products

PUBLISHED = Path(__file__).parent / "published" / "step_times.json"
VIDUR_MODELS = {
    "codellama-34b": ModelConfig("codellama-34b", 48, 8192, 64, 8, 128, 22016, 32000, 16384, dtype="bfloat16"),
    "llama2-70b": ModelConfig("llama2-70b", 80, 8192, 64, 8, 128, 28672, 32000, 4096, dtype="bfloat16"),
}


def published(name: str) -> dict[str, Any]:
    """A section of the published step times."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))[name]


def composed_errors(device: str) -> Floats:
    """Relative errors of whole steps of Llama-3.1-8B against sums of measured kernels."""
    model, steps = StepModel(preset("llama3.1-8b"), load_device(device)), published("composed")["devices"][device]
    works = [(StepWork(prefills=((0, tokens),), num_sampled=1), ms) for tokens, ms in steps["prefill"]]
    works += [(StepWork(rows, rows * (kv + 1), kv + 1, (), rows), ms) for rows, kv, ms in steps["decode"]]
    return np.array([model.step(work).total * 1e3 / ms - 1 for work, ms in works])


def vidur_step_errors(name: str) -> Floats:
    """Relative errors of the layers of a step on two A100s against vidur's predictions."""
    model = StepModel(VIDUR_MODELS[name], load_device("a100", "vidur-2024"), tensor=2)
    errors = []
    for prefills, rows, kv, ms in published("vidur")["models"][name]:
        step = model.step(StepWork(rows, rows * kv, kv, tuple(map(tuple, prefills))))
        errors.append(step.num_layers * step.layer * 1e3 / ms - 1)
    return np.array(errors)


def vidur_product_errors(root: Path) -> tuple[Floats, Floats]:
    """Relative errors of every product in vidur's A100 tables, and of the sum of the four of a layer."""
    ops = DenseOps(preset("llama2-7b"), load_device("a100", "vidur-2024"), 1, OpTables())
    tables = vidur_products(root)
    ours = [np.array([ops.product(*shape) for shape in zip(t.m, t.n, t.k, strict=True)]) for t in tables]
    measured = [t.seconds for t in tables]
    return np.concatenate(ours) / np.concatenate(measured) - 1, sum(ours) / sum(measured) - 1


def main() -> int:
    """The program."""
    rows = []
    if not (root := Path(PROFILES.value)).is_dir():
        print(f"left out: products and layers against vidur's tables, {root} is not there")
    else:
        products, layers = vidur_product_errors(root)
        rows += [("products, A100, against vidur's tables", products), ("the four of a layer together", layers)]
    for device in published("composed")["devices"]:
        rows.append((f"steps of Llama-3.1-8B, {device.upper()}, against summed kernels", composed_errors(device)))
    for name in VIDUR_MODELS:
        rows.append((f"layers of {name}, 2 x A100, against vidur's predictions", vidur_step_errors(name)))
    print("| | points | MAPE | largest error |\n|---|---|---|---|")
    for what, e in rows:
        print(f"| {what} | {len(e):,} | {np.abs(e).mean():.1%} | {np.abs(e).max():.1%} |")
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
