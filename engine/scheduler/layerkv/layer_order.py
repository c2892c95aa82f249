"""In which order the layers of one sequence leave the device one by one, and in which they come home.

The masks of a pattern for x and for x - 1 retained layers are not nested: to get from one to the other, layers would
have to change places over the link. These orders move one layer at a time and keep what is parked spread out, whatever
is parked at the start (ours; LayerKV says no more than that layers alternate). No JAX here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from engine.scheduler.layerkv.hashing import uniform
from engine.scheduler.layerkv.retention import find_pattern

Mask = bytes  # one of these by layer
RETAINED, PARKED = b"\0", b"\1"


def order_out(parked: np.ndarray, pattern: str) -> tuple[int, ...]:
    """The retained layers of a sequence in the order in which they leave. `parked`: bool [L].

    `prefix`, `suffix` and `random` keep their shape. The others send the layer that leaves the longest run of parked
    layers shortest; of these the one furthest from any parked layer, counted round from the last layer to the first, as
    steps follow each other; of these the lowest.

    Raises:
      ConfigError: no such pattern.
    """
    return _order_out(np.asarray(parked, bool).tobytes(), pattern)


def order_home(parked: np.ndarray, pattern: str) -> tuple[int, ...]:
    """The parked layers of a sequence in the order in which they come home. `parked`: bool [L].

    `prefix`, `suffix` and `random` undo `order_out`. The others bring the middle of the longest run of parked layers,
    and the lowest where there is a choice.

    Raises:
      ConfigError: no such pattern.
    """
    return _order_home(np.asarray(parked, bool).tobytes(), pattern)


@lru_cache(maxsize=4096)
def _order_out(mask: Mask, pattern: str) -> tuple[int, ...]:
    find_pattern(pattern)
    if pattern in FIXED:
        return tuple(layer for layer in FIXED[pattern](len(mask)) if not mask[layer])
    return _order(mask, _spread_out, mask.count(RETAINED), PARKED)


@lru_cache(maxsize=4096)
def _order_home(mask: Mask, pattern: str) -> tuple[int, ...]:
    find_pattern(pattern)
    if pattern in FIXED:
        return tuple(layer for layer in reversed(FIXED[pattern](len(mask))) if mask[layer])
    return _order(mask, _break_run, mask.count(PARKED), RETAINED)


def _order(mask: Mask, choose: Callable[[Mask], int], count: int, becomes: Mask) -> tuple[int, ...]:
    """What `choose` says, as often as told, of masks that its own choices have changed."""
    chosen = []
    for _ in range(count):
        layer = choose(mask)
        mask = mask[:layer] + becomes + mask[layer + 1 :]
        chosen.append(layer)
    return tuple(chosen)


@lru_cache(maxsize=16384)
def _spread_out(mask: Mask) -> int:
    """The retained layer that leaves next; see `order_out`."""
    before, after = _both_ways(_parked_before, mask)
    back, ahead = _both_ways(_steps_to_parked, mask)
    longest = max(before + after)

    def key(i: int) -> tuple[int, int, int]:
        return max(longest, before[i] + 1 + after[i]), -min(back[i], ahead[i]), i

    return min((i for i, parked in enumerate(mask) if not parked), key=key)


@lru_cache(maxsize=16384)
def _break_run(mask: Mask) -> int:
    """The parked layer that comes home next; see `order_home`."""
    before, after = _both_ways(_parked_before, mask)

    def key(i: int) -> tuple[int, int, int]:
        return -(before[i] + 1 + after[i]), abs(before[i] - after[i]), i

    return min((i for i, parked in enumerate(mask) if parked), key=key)


def _both_ways(count: Callable[[Mask], list[int]], mask: Mask) -> tuple[list[int], list[int]]:
    """`count` by layer, towards the first layer and towards the last."""
    return count(mask), count(mask[::-1])[::-1]


def _parked_before(mask: Mask) -> list[int]:
    """How many parked layers lie directly before each layer."""
    counts, run = [], 0
    for parked in mask:
        counts.append(run)
        run = run + 1 if parked else 0
    return counts


def _steps_to_parked(mask: Mask) -> list[int]:
    """How many layers back from each one the nearest parked layer lies, going round; L if none is parked."""
    steps, distance = [], len(mask)
    for parked in mask + mask:
        distance = 0 if parked else min(distance + 1, len(mask))
        steps.append(distance)
    return steps[len(mask) :]


def _random_order(num_layers: int) -> list[int]:
    return np.argsort(uniform(num_layers, np.arange(num_layers)), kind="stable").tolist()


FIXED: dict[str, Callable[[int], list[int]]] = {  # patterns with one order for all masks of L layers: as they leave
    "prefix": lambda num_layers: list(range(num_layers))[::-1],
    "suffix": lambda num_layers: list(range(num_layers)),
    "random": _random_order,
}
