"""How much copies to the host slow a decode step whose all-reduces travel over the same link, on the virtual clock.

    python -m experiments.link_units                 Llama-3.1-70B on four L20s, which have no other link
    python -m experiments.link_units --load=0.1 --load=1 --unit=4MiB --link_sharing=fifo

Every step, copies leave with a share of the bytes that the links could carry during a step without copies:
    swap  from the beginning of the step, a block of each layer
    park  a block of each layer when it has computed
They move in units (`--unit`) between which they yield to all-reduces; `yields=no`: they do not, and units mean nothing.
Prints the step, how much longer it is than without copies, and what the all-reduces of a layer wait, on average and at
most; two units' time is the bound (`Link.turn`). Nothing else slows a step here: gathers on the device are left out.
From step to step the context grows from a half to one and a half of `--context`: units that fit the time between two
all-reduces by chance would hold nobody up. Ends with one JSON line.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from absl import flags

from engine.config import EngineConfig, SimConfig
from engine.costmodel.device import load_device
from engine.costmodel.step_model import StepModel
from engine.errors import ConfigError
from engine.models.source import resolve
from experiments import common_flags
from experiments.flag_parsers import parse_bytes
from experiments.link_slowdown import BACKGROUNDS, Slowdown, decodes, slowdown
from experiments.tables import format_table, rounded

for name in ("model", "device", "tensor", "link_sharing"):
    flags.declare_key_flag(name)
ROWS = flags.DEFINE_integer("rows", 32, "Sequences that decode.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 2048, "Tokens that each attends to, on average.", lower_bound=2)
LOADS = flags.DEFINE_multi_float("load", [0.1, 0.25, 0.5], "Shares of the links that copies ask for.", lower_bound=0.0)
UNITS = flags.DEFINE_multi_string(
    "unit", ["0.5MB", "2MB", "4MiB", "8MB", "64MB"], "Bytes on each device's link; 0: whole."
)
STEPS = flags.DEFINE_integer("steps", 50, "Steps, one after the other.", lower_bound=1)


def table_row(background: str, load: float, unit: str | None, found: Slowdown) -> dict[str, Any]:
    """One case; `unit` None: copies do not yield, and nothing bounds the wait; nor is it where they are whole."""
    bound = found.bound * 1e6 if unit and found.bound < math.inf else None
    return {
        "background": background, "load": load, "yields": "yes" if unit else "no", "unit": unit,
        "step_ms": found.step * 1e3, "slower_%": round(found.slowdown * 100, 6), "wait_us": found.wait * 1e6,
        "worst_us": found.worst_wait * 1e6, "bound_us": bound,
    }  # fmt: skip


def main() -> int:
    """The program."""
    tensor = common_flags.TENSOR.value if flags.FLAGS["tensor"].present else 4
    sim = SimConfig(common_flags.DEVICE.value or "l20", link_sharing=common_flags.LINK_SHARING.value or "ps")
    yielding = EngineConfig(executor="sim", sim=sim, tensor=tensor)
    model, *_ = resolve(common_flags.given_model() or "llama3.1-70b", yielding)
    cost = StepModel(model, load_device(sim.device), tensor=tensor)
    if not cost.shares_host_link:
        raise ConfigError(f"--device={sim.device} --tensor={tensor}: no all-reduces travel over the link to the host")
    cases: list[tuple[str | None, EngineConfig]] = []
    for text in UNITS.value:
        try:
            cases.append((text, replace(yielding, link_unit_bytes=parse_bytes(text))))
        except ValueError as e:
            raise ConfigError(f"--unit: {e}") from None
    cases.append((None, replace(yielding, sim=replace(sim, link_aware=False))))
    works = decodes(ROWS.value, CONTEXT.value, STEPS.value)
    alone = slowdown(cost, yielding, works, "park", 0.0).alone
    held = cost.step(works[0]).collective * model.num_layers
    print(f"{model.name} on {tensor} x {sim.device}, {ROWS.value} rows: {alone * 1e3:.1f} ms a step without copies, of "
          f"which all-reduces hold the links {held * 1e3:.1f} ms")  # fmt: skip
    rows = [
        table_row(background, load, unit, slowdown(cost, config, works, background, load))
        for background in BACKGROUNDS
        for load in LOADS.value
        for unit, config in cases
    ]
    print(format_table(list(rows[0]), [list(row.values()) for row in rows]))
    print(json.dumps({"bench": "link_units", "model": model.name, "device": sim.device, "tensor": tensor,
                      "cases": [{k: rounded(v) for k, v in row.items()} for row in rows]}))  # fmt: skip
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
