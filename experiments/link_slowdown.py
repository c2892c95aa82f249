"""How much copies to the host slow decode steps whose all-reduces travel over the same link, on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from engine.config import EngineConfig
from engine.costmodel.roofline import ALL_REDUCES
from engine.costmodel.step_model import StepModel, StepWork
from engine.executor.overlap import STEP_START, Payload, StepCopies, run_layers
from engine.simulation import make_link

BACKGROUNDS = ("swap", "park")  # copies leave when a step begins | each layer's when it has computed


@dataclass(frozen=True)
class Slowdown:
    """What copies do to decode steps. Mean seconds."""

    alone: float  # a step without copies
    step: float
    wait: float  # of the all-reduces of a layer
    worst_wait: float  # the longest of them
    bound: float  # of each of them, where copies yield

    @property
    def slowdown(self) -> float:
        """How much longer a step is than without copies, as a share."""
        return self.step / self.alone - 1


def slowdown(
    cost: StepModel, config: EngineConfig, works: Sequence[StepWork], background: str, load: float
) -> Slowdown:
    """Runs steps one after the other. With each, `load` times the bytes leave that the links carry during a step that
    has no copies.

    Args:
      config: units, whether copies yield and how they share the links, whose all-reduces take them.
      background: swap or park.
    """
    links = make_link(config, cost.profile), make_link(config, cost.profile)
    rate, now, waits = links[0].bytes_per_second, 0.0, list[float]()
    times = [cost.step(work) for work in works]
    for time in times:
        num = time.num_layers
        block = [Payload(n)] if (n := int(load * time.device * rate / num)) else []
        sends = {STEP_START: block * num} if background == "swap" else dict.fromkeys(range(num), block)
        layers, copies = [time.layer] * num, StepCopies(sends=sends)
        ran = run_layers(now + time.embed, layers, copies, *links, 1, time.collective, ALL_REDUCES)
        now = ran.ends[-1] + time.tail
        waits += ran.waits
    alone, bound = mean(time.device for time in times), ALL_REDUCES * links[0].unit_bytes / rate
    return Slowdown(alone, now / len(works), mean(waits), max(waits), bound)


def decodes(rows: int, context: int, steps: int) -> list[StepWork]:
    """Decode steps of `rows` that attend to a half to one and a half of `context` tokens."""
    contexts = [context // 2 + context * i // max(1, steps - 1) for i in range(steps)]
    return [StepWork(rows, rows * tokens, tokens, (), rows) for tokens in contexts]
