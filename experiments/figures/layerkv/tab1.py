"""Table 1: models, the devices that share them, and the tokens that their pools hold."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.costmodel.device import load_hardware
from engine.errors import ConfigError
from engine.executor.memory_plan import DEVICE_FRACTION, MemoryPlan
from engine.models.source import resolve
from experiments.figures.base import ARITHMETIC, Band, Figure, Result, Table, Verdict
from experiments.figures.layerkv.setting import (
    LAYERKV,
    LLAMA2_7B,
    LLAMA3_70B,
    OUTPUT,
    VLLM,
    YI_34B,
    Setup,
    engine_of,
    kilo,
)
from experiments.plots import figure
from experiments.seeded import Cell

SETUPS = (LLAMA2_7B, YI_34B, LLAMA3_70B)
CONTEXTS, DEGREES = (2048, 16384), (1, 2, 4, 8)
# By hand, from the models' shapes (research note): GB of weights, KV bytes of a token, fewest L20s that hold them.
HAND = {LLAMA2_7B: (13.5, 524_288, 1), YI_34B: (68.8, 245_760, 2), LLAMA3_70B: (141.0, 327_680, 4)}
L20_BYTES = 46_068 * 2**20  # nvidia-smi
FIG1_POOL = Band(53, 56)  # thousand tokens of Llama2-7B's pool that fit figure 1 (research note)
HEADER = (
    "setup", "context", "weights GB", "KV B/token", "set aside GB", "pool tokens", "pool tokens, layerkv",
    "weights GB by hand", "KV B/token by hand", "pool tokens by hand",
)  # fmt: skip
PARTS = {"weights": "#999999", "activations": "#E69F00", "context, graphs": "#F0E442", "KV pool": "#0072B2"}
Plans = dict[tuple[Setup, int, str], MemoryPlan]  # by setup, context, policy


def plan(setup: Setup, context: int, policy: str) -> MemoryPlan:
    """What the planner makes of a place.

    Raises:
      ConfigError: the model, or not one request of that context, does not fit.
    """
    return engine_of(setup.fixed(policy, context, 1.0)).memory


def fewest_devices(setup: Setup, context: int) -> int:
    """The least of `DEGREES` whose devices hold the model and one request.

    Raises:
      ConfigError: none does.
    """
    for tensor in DEGREES:
        try:
            plan(replace(setup, tensor=tensor), context, VLLM)
        except ConfigError:
            continue
        return tensor
    raise ConfigError(f"{setup.model} does not fit {DEGREES[-1]} L20s")


class Tab1(Figure):
    """Settings of the evaluation."""

    title = "Models, tensor degrees, and tokens in the pool"
    source = "LayerKV (arXiv 2410.00428), table 1 (recalled to exist; its numbers are not known)"
    about = (
        f"What the memory planner leaves for KV in {DEVICE_FRACTION:g} of each L20, for windows of a context and "
        f"{OUTPUT} output tokens, against arithmetic by hand from the models' shapes."
    )

    def evaluate(self, cells: Mapping[Hashable, Cell], executor: str) -> Result:
        """See `Figure`."""
        plans = {(s, c, p): plan(s, c, p) for s in SETUPS for c in CONTEXTS for p in (VLLM, LAYERKV)}
        table = Table(HEADER, [_row(setup, context, plans) for setup in SETUPS for context in CONTEXTS])
        fewest = {setup: fewest_devices(setup, CONTEXTS[0]) for setup in SETUPS}
        notes = [
            "set aside: the planner's estimate of activations, and of the driver's context and graphs; the arithmetic "
            "by hand takes it over, and what nvidia-smi shows of an L20, 48.3 GB",
            "layerkv: the pages through which parked layers are streamed come out of the pool",
        ]
        return Result(table, verdicts(table, fewest), notes, plans)

    def draw(self, result: Result, stem: Path) -> None:
        """GiB of each device, and for what."""
        places = [(setup, context) for setup in SETUPS for context in CONTEXTS]
        parts = np.array([_parts(result.extra[setup, context, VLLM]) for setup, context in places]).T / 2**30
        tokens, at = result.table.column("pool tokens"), np.arange(len(places))
        ends = parts.cumsum(0)
        with figure(stem, 2.7) as ax:
            for (name, color), width, end in zip(PARTS.items(), parts, ends, strict=True):
                ax.barh(at, width, 0.7, left=end - width, color=color, edgecolor="black", linewidth=0.4, label=name)
            for y, end, count in zip(at, ends[-1], tokens, strict=True):
                text = {"text": f"{count / 1e3:.0f}K", "size": 7, "ha": "right", "va": "center"}
                ax.annotate(xy=(end, y), xytext=(-3, 0), textcoords="offset points", color="white", **text)
            total = L20_BYTES / 2**30
            ax.axvline(total * DEVICE_FRACTION, color="black", linewidth=0.6, linestyle="--")
            ax.set_xlim(0, total)
            ax.set_yticks(at, [f"{s.name.split(',')[0]}\n{s.tensor} x L20, {kilo(c)}" for s, c in places], size=6)
            ax.invert_yaxis()
            ax.set_xlabel(f"GiB of each L20 (dashed: {DEVICE_FRACTION:g}); numbers: tokens")
            ax.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.4, 1.0))


def verdicts(table: Table, fewest: Mapping[Setup, int]) -> list[Verdict]:
    """Of the table's numbers, and of the fewest devices by setup."""
    rows = [dict(zip(table.header, row, strict=True)) for row in table.rows]

    def over_hand(name: str) -> dict[str, float]:
        return {f"{r['setup']}, {kilo(r['context'])}": r[name] / r[f"{name} by hand"] for r in rows}

    short, long = (table.column("pool tokens", context=context) for context in CONTEXTS)
    shrunk = {setup.name: b / a for setup, a, b in zip(SETUPS, short, long, strict=True)}
    (known,) = table.column("pool tokens", setup=LLAMA2_7B.name, context=CONTEXTS[0])
    more = {setup.name: found - HAND[setup][2] for setup, found in fewest.items()}
    every = Verdict.every
    return [
        every("KV bytes of a token, over those by hand", ARITHMETIC, Band(1, 1), over_hand("KV B/token"), "x"),
        every("weights, over those by hand", ARITHMETIC, Band(0.99, 1.01), over_hand("weights GB"), "x"),
        every("tokens in the pool, over those by hand", ARITHMETIC, Band(0.98, 1.02), over_hand("pool tokens"), "x"),
        every("fewest L20s, less those by hand", ARITHMETIC, Band(0, 0), more),
        Verdict.within("Llama2-7B's pool, beside what fits figure 1", ARITHMETIC, FIG1_POOL, known / 1e3, "K tokens"),
        every(
            f"pool for windows of {kilo(CONTEXTS[1])} over that for {kilo(CONTEXTS[0])}", ARITHMETIC,
            Band(high=1 - 1e-9), shrunk, "x",
        ),
    ]  # fmt: skip


def _row(setup: Setup, context: int, plans: Plans) -> list[Any]:
    point, memory = setup.fixed(VLLM, context, 1.0), plans[setup, context, VLLM]
    size, layers = point.config.cache.page_size, resolve(point.model, point.config)[0].num_layers
    tokens, left = (plans[setup, context, policy].num_pages // layers * size for policy in (VLLM, LAYERKV))
    _, activations, reserved, _ = _parts(memory)
    aside = setup.tensor * (activations + reserved)
    weights, kv, _ = HAND[setup]
    ours = [setup.tensor * memory.weights / 1e9, setup.tensor * memory.page_bytes // size * layers, aside / 1e9]
    by_hand = (setup.tensor * DEVICE_FRACTION * L20_BYTES - 1e9 * weights - aside) / kv
    return [setup.name, context, *ours, tokens, left, weights, kv, by_hand]


def _parts(memory: MemoryPlan) -> list[float]:
    """Bytes of a device, by `PARTS`."""
    reserved = load_hardware("l20").reserved_gib * 2**30
    return [memory.weights, memory.activation_peak, reserved, memory.num_pages * memory.page_bytes]
