"""Compute and copies of one step, layer by layer, on the virtual clock. No JAX here.

The exact recursion (LayerKV; research note on arXiv 2410.00428, decode and prefill pipelines): a layer starts when the
layer before has ended and what it reads has landed; what it wrote may leave when it has ended. Its copies share the
links with everything else that is under way there. Where all-reduces travel over the links to the host, each waits for
its turn there (`Link.turn`), and the layer with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine.executor.link import Job, Link

STEP_START = -1  # as a layer of `StepCopies.sends`


class Payload(NamedTuple):
    """What one copy moves."""

    num_bytes: int
    tag: Any = None  # of the link's job


@dataclass(frozen=True)
class StepCopies:
    """Copies of a step, each layer's in the order of submission."""

    fetches: Mapping[int, Sequence[Payload]] = field(default_factory=dict)  # by the layer that reads them
    sends: Mapping[int, Sequence[Payload]] = field(default_factory=dict)  # by the layer whose end they wait for


@dataclass(frozen=True)
class LayerTimes:
    """When a step's layers ran. Layer l ran from the end of the layer before, plus its stall, to its end: its seconds
    and its waits."""

    ends: list[float]  # [L] seconds on the engine's clock
    stalls: list[float]  # [L] seconds in which nothing ran, because what the layer reads had not landed
    waits: list[float]  # [L] seconds in which collectives of the layer waited for copies


def run_layers(
    start: float,
    layer_seconds: Sequence[float],
    copies: StepCopies,
    link_in: Link,
    link_out: Link,
    prefetch_depth: int,
    collective_seconds: float = 0.0,
    collectives: int = 1,
) -> LayerTimes:
    """Runs one step's layers and submits its copies to the links, which keep what has not ended for later steps.

    A layer's turn comes when the layer before has ended, the first one's at `start`. Then its own fetches and those of
    the next `prefetch_depth` layers that have any are submitted, as far as they are not yet, and it waits for its own:
    the order of `JaxExecutor._land`, with transient buffers for depth + 1 layers. (A host that dispatches ahead of its
    device and has memory for all that lands is `prefetch_depth = L`.) Sends never delay the step.

    On a `FifoLink`, deeper prefetch, faster layers and better links never make a step slower. On a `Link`, deeper
    prefetch, faster layers and less latency can: a fetch that begins sooner takes its share from those needed before.
    Where copies move in units, what comes sooner may meet one that has just begun: all this holds up to the time of a
    unit for each collective.

    Args:
      start: seconds on the engine's clock; the links know of nothing later.
      layer_seconds: [L] compute of each layer, collectives included.
      copies: fetches by layer 0 .. L - 1; sends by `STEP_START`, 0 .. L - 1.
      link_in: host to device.
      link_out: device to host.
      prefetch_depth: layers that fetch something, however far ahead, whose fetches may be under way while one computes.
      collective_seconds: how long the all-reduces between devices hold both directions in each layer; 0 when they do
        not pass the links to the host.
      collectives: how many of them they are, each at the end of an equal part of the layer (ours).

    Raises:
      ValueError: copies of a layer that does not exist, a layer shorter than its collectives or with less than one, a
        depth below 0 (nothing was submitted); a link that is ahead of `start`.
    """
    layers = range(len(layer_seconds))
    if prefetch_depth < 0:
        raise ValueError(f"a prefetch depth of {prefetch_depth}")
    if not 0 <= collective_seconds <= min(layer_seconds, default=0.0):
        raise ValueError(f"{collective_seconds} s of collectives in layers of {min(layer_seconds, default=0.0)} s")
    if collectives < 1:
        raise ValueError(f"{collectives} collectives in a layer")
    for layer in (*copies.fetches, *(layer for layer in copies.sends if layer != STEP_START)):
        if layer not in layers:
            raise ValueError(f"copies of layer {layer} in a step of {len(layers)} layers")
    incoming = deque(sorted((layer, payloads) for layer, payloads in copies.fetches.items() if payloads))
    landing: dict[int, list[Job]] = {}
    ends, stalls, waits, end = [], [], [], start
    _submit(link_out, start, copies.sends.get(STEP_START, ()))
    for layer, seconds in enumerate(layer_seconds):
        while incoming and (incoming[0][0] == layer or len(landing) - (layer in landing) < prefetch_depth):
            ahead, payloads = incoming.popleft()
            landing[ahead] = _submit(link_in, end, payloads)
        begin = max([end, *(link_in.completion(job) for job in landing.pop(layer, ()))])
        stalls.append(begin - end)
        end, waited = begin + seconds, 0.0
        if collective_seconds:
            end, waited = _compute(begin, seconds, (link_in, link_out), collective_seconds, collectives)
        ends.append(end)
        waits.append(waited)
        _submit(link_out, end, copies.sends.get(layer, ()))
    return LayerTimes(ends, stalls, waits)


def _compute(
    begin: float, seconds: float, links: tuple[Link, Link], collective_seconds: float, collectives: int
) -> tuple[float, float]:
    """A layer of `seconds` whose collectives need both links at once. A link whose turn comes first stands still until
    the other's comes. Returns when the layer ends, and how long its collectives waited."""
    end, waited = begin, 0.0
    for part in range(1, collectives + 1):
        end = begin + seconds * part / collectives + waited
        start = max(begin, end - collective_seconds / collectives)
        turns = [link.turn(start) for link in links]
        wait = max(turns) - start
        end, waited = end + wait, waited + wait
        for link, turn in zip(links, turns, strict=True):
            link.hold(turn, end)
    return end, waited


def _submit(link: Link, now: float, payloads: Sequence[Payload]) -> list[Job]:
    return [link.submit(now, payload.num_bytes, payload.tag) for payload in payloads]
