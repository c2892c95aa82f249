"""One prefill, or decode steps, beside their copies, with nobody else there: the recursion of the virtual clock
(`run_layers`) with the cost model of a place. What the figures about the pipelines share. No JAX here.

Copies of a direction go one after the other (a CUDA stream). What a copy costs the device is what the simulated
executor charges: the gather behind a layer whose KV leaves, the scatter before one whose KV comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from engine.config import EngineConfig, SimConfig
from engine.costmodel.device import load_device
from engine.costmodel.roofline import ALL_REDUCES
from engine.costmodel.step_model import StepModel, StepTime, StepWork
from engine.executor.link import Job, Link
from engine.executor.overlap import Payload, StepCopies, run_layers
from engine.presets import preset
from engine.scheduler.layerkv.retention import num_retained, parked_layers
from engine.simulation import make_link

FOREVER = float("inf")
SETTLED, STEPS = 2, 6  # steps until each is like the one before; all that are run


@cache
def _cost(model: str, device: str, stack: str | None, tensor: int) -> StepModel:
    return StepModel(preset(model), load_device(device, stack), tensor=tensor)


@dataclass(frozen=True)
class Place:
    """A model on devices, and how much of their links to the host is to be had.

    Raises:
      ConfigError: an unknown model or device, a model that does not divide over the devices, or no share > 0.
    """

    model: str  # a preset
    device: str
    tensor: int = 1
    stack: str | None = None  # None: the device's own choice
    share: float = 1.0  # of the links' bytes/s

    def __post_init__(self):
        _ = self.links()

    @cached_property
    def cost(self) -> StepModel:
        """Times of steps."""
        return _cost(self.model, self.device, self.stack, self.tensor)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.cost.model.num_layers

    @property
    def rate(self) -> float:
        """Bytes/s in one direction, all devices together."""
        return self.share * self.cost.profile.hardware.link_gbs * 1e9 * self.tensor

    def layer_bytes(self, tokens: int) -> int:
        """KV of so many tokens in one layer, all devices together."""
        return self.cost.kv_bytes_per_token // self.num_layers * self.tensor * tokens

    def links(self) -> tuple[Link, Link]:
        """Idle ones: host to device, device to host."""
        sim = SimConfig(self.device, self.stack, link_sharing="fifo")
        config = EngineConfig(executor="sim", sim=sim, tensor=self.tensor, link_gbs=self.rate / 1e9)
        return make_link(config, self.cost.profile), make_link(config, self.cost.profile)

    def retained(self, tokens: int) -> int:
        """x of Eqs 3 and 4 for a prompt, with what a prefill takes here."""
        return num_retained(prefill_time(self, tokens).total, self.layer_bytes(tokens) / self.rate, self.num_layers)


def prefill_time(place: Place, tokens: int) -> StepTime:
    """A prompt prefilled alone, without copies."""
    return place.cost.step(StepWork(prefills=((0, tokens),), num_sampled=1))


@dataclass(frozen=True)
class Prefill:
    """A prompt whose parked layers left behind themselves. Seconds since its step was planned."""

    starts: list[float]  # [L] of the layers
    ends: list[float]  # [L]
    end: float  # the first token
    copies: list[Job]  # in order

    @property
    def copied(self) -> float:
        """When the last copy had landed; 0 without one."""
        return self.copies[-1].end if self.copies else 0.0


def run_prefill(place: Place, tokens: int, retained: int) -> Prefill:
    """Prefills a prompt that keeps `retained` = x layers, interleaved, and sends each of the others when it has been
    computed."""
    time, (link_in, link_out) = prefill_time(place, tokens), place.links()
    parked = parked_layers(place.num_layers, retained, "interleave")
    size = place.layer_bytes(tokens)
    gather = place.cost.page_copy_seconds(size)
    seconds = [time.layer + gather * leaves for leaves in parked.tolist()]
    copies = StepCopies(sends={layer: [Payload(size, layer)] for layer in parked.nonzero()[0].tolist()})
    held = time.collective if place.cost.shares_host_link else 0.0
    ran = run_layers(time.host + time.embed, seconds, copies, link_in, link_out, 1, held, ALL_REDUCES)
    starts = [end - each - wait for end, each, wait in zip(ran.ends, seconds, ran.waits, strict=True)]
    return Prefill(starts, ran.ends, ran.ends[-1] + time.tail, link_out.take_ended(FOREVER))


def fewest_retained(place: Place, tokens: int, blocks: int) -> int:
    """The smallest x with which the last copy of a prefill has landed when it ends, or when `blocks` copies more have
    had their time: found by running every x. L if there is none."""
    allowed = blocks * place.layer_bytes(tokens) / place.rate
    for retained in range(place.num_layers):
        run = run_prefill(place, tokens, retained)
        if run.copied <= run.end + allowed:
            return retained
    return place.num_layers


@dataclass(frozen=True)
class Decode:
    """Decode steps of the same rows, some of whose tokens are streamed from the host in half of the layers."""

    place: Place
    rows: int
    context: int  # tokens of each row

    @cached_property
    def time(self) -> StepTime:
        """A step without copies."""
        return self.place.cost.step(StepWork(self.rows, self.rows * self.context, self.context, (), self.rows))

    def steady(self, tokens: int, parked: Sequence[bool], depth: int) -> float:
        """Seconds of a step among many, when layers of `parked` [L] stream so many tokens each, the next `depth` of
        them under way, across the border between two steps, at no cost to the device: as LayerKV describes it."""
        num, time = self.place.num_layers, self.time
        seconds = [time.layer] * (num - 1) + [time.layer + time.tail + time.embed]
        fetches = self._fetches(tokens, list(parked) * STEPS)
        ran = run_layers(0.0, seconds * STEPS, StepCopies(fetches), *self.place.links(), depth)
        return (ran.ends[-1] - ran.ends[SETTLED * num - 1]) / (STEPS - SETTLED)

    def alone(self, tokens: int, parked: Sequence[bool], depth: int) -> float:
        """Seconds of such a step as the simulated executor runs it: its first fetch begins when the step does, and what
        has come is scattered before its layer."""
        time, fetches = self.time, self._fetches(tokens, parked)
        scatter = self.place.cost.page_copy_seconds(self.place.layer_bytes(tokens))
        seconds = [time.layer + scatter * (layer in fetches) for layer in range(self.place.num_layers)]
        ran = run_layers(time.embed, seconds, StepCopies(fetches), *self.place.links(), depth)
        return ran.ends[-1] + time.tail

    def _fetches(self, tokens: int, parked: Sequence[bool]) -> dict[int, list[Payload]]:
        if not tokens:
            return {}
        payload = Payload(self.place.layer_bytes(tokens))
        return {layer: [payload] for layer, away in enumerate(parked) if away}
