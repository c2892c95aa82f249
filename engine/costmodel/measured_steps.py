"""Step times of our own executor from what was measured of it, in place of the roofline. No JAX here.

A step is cut into sub-batches as the executor cuts it (`packing.Packer`), and each is looked up in its bucket's curve
(`step_tables.py`). The roofline stays for sizes and for copies.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from absl import logging

from engine.config import EngineConfig, ModelConfig, to_dict
from engine.costmodel.device import DeviceProfile
from engine.costmodel.step_model import StepModel, StepTime, StepWork
from engine.costmodel.step_tables import StepTables
from engine.costmodel.tables import interpolate
from engine.errors import ConfigError
from engine.executor.packing import Packer

Prefills = tuple[tuple[int, int], ...]


class MeasuredSteps(StepModel):
    """Steps of one model under the settings they were measured with."""

    def __init__(self, model: ModelConfig, profile: DeviceProfile, tables: StepTables, packer: Packer, depth: int):
        """
        Args:
          packer: of an engine with these settings.
          depth: `async_depth`; at 1 the host's work overlaps, and what remains of it lengthens every step.

        Raises:
          ConfigError: a bucket that plans can need was not measured.
        """
        super().__init__(model, profile, tensor=tables.settings.get("tensor", 1))
        missing = [b for b in packer.buckets(mixed=True) if (b.rows, b.tiles) not in tables.curves]
        if missing:
            rows, tiles, _ = missing[0]
            raise ConfigError(f"device {profile.name} has no step times of rows={rows} tiles={tiles}: calibrate again")
        self.host = tables.host
        self._remains = tables.remains if depth else 0.0
        self._curves, self._packer = tables.curves, packer

    def step(self, work: StepWork) -> StepTime:
        """The time of a step; its layers share all of it. Sampling is greedy, as it was measured."""
        kv, longest = np.array([work.decode_kv]), np.array([work.max_kv])
        seconds = float(self._seconds(work.num_decode, kv, longest, work.prefills)[0])
        return StepTime(self.host, 0.0, seconds / self._layers, 0.0, 0.0, self._layers)

    def decode_seconds(self, num: int, kv: int, max_kv: int, repeat: int) -> np.ndarray:
        """See `StepModel`."""
        steps = np.arange(repeat)
        seconds = self._seconds(num, kv + num * steps, max_kv + steps, ())
        return 0.0 + self._layers * (seconds / self._layers) + 0.0

    def _seconds(self, num: int, kv: np.ndarray, max_kv: np.ndarray, prefills: Prefills) -> np.ndarray:
        """Steps with the same rows and prefills: attended tokens and the longest row, int64 [n] -> float64 [n]."""
        ends: list[Any] = [end for start, new in prefills for end in self._packer.tile_ends(start, new)]
        total, at = np.zeros(len(kv)), 0
        if self._packer.deterministic:  # rows are tiles; of each the mean is known
            ends, num = [kv / max(num, 1)] * num + ends, 0
        for bucket, rows, tiles in self._packer.cut(num, len(ends)):
            if tiles:
                curve = self._curves[bucket.rows, bucket.tiles]
                total = total + interpolate(sum(ends[at : at + tiles]), curve.attended, curve.seconds)
                at += tiles
            if rows:
                total = total + self._rows(bucket.rows, kv, max_kv)
                if tiles:  # the curve has short rows already
                    total = total - self._curves[bucket.rows, 0].seconds[0]
        return total + self._remains if num or ends else total

    def _rows(self, rows: int, kv: np.ndarray, max_kv: np.ndarray) -> np.ndarray:
        """A sub-batch of decode rows alone. Padding rows attend to nothing."""
        curve = self._curves[rows, 0]
        excess = max_kv - kv / min(rows, self._packer.num_slots)
        return interpolate(kv, curve.attended, curve.seconds) + interpolate(excess, curve.excess, curve.added)


def make_packer(config: EngineConfig, num_slots: int) -> Packer:
    """What cuts the steps of an engine with these settings."""
    return Packer(num_slots, config.query_tile, config.max_tiles, config.deterministic)


def step_settings(model: ModelConfig, config: EngineConfig, packer: Packer) -> dict[str, Any]:
    """What the time of a step depends on, as plain JSON types; the name of the model is not part of it."""
    cache = config.cache
    shape = {f"model.{name}": value for name, value in to_dict(model).items() if name != "name"}
    settings = shape | {
        "tensor": config.tensor,
        "kernels": config.sim.kernels,
        "pipeline": config.sim.pipeline,
        "page_size": cache.page_size,
        "store": cache.store,
        "parking": bool(cache.transient_pages),
        "max_rows": packer.max_rows,
        "query_tile": packer.tile,
        "max_tiles": packer.max_tiles,
        "deterministic": packer.deterministic,
        "attention_backend": config.attention_backend,
    }
    return json.loads(json.dumps(settings))


def with_measured_steps(roofline: StepModel, config: EngineConfig, num_slots: int) -> StepModel:
    """The steps that were measured on the roofline's device, when they hold for its model under these settings; else
    the roofline, and a warning that says so when there are measured ones.

    Raises:
      ConfigError: measured steps that lack a bucket.
    """
    model, profile = roofline.model, roofline.profile
    if (tables := profile.steps) is None:
        return roofline
    packer = make_packer(config, num_slots)
    wanted = step_settings(model, config, packer)
    names = wanted.keys() | tables.settings.keys()
    differing = [n for n in sorted(names) if wanted.get(n) != tables.settings.get(n)]
    if not differing:
        return MeasuredSteps(model, profile, tables, packer, config.async_depth)
    words = ", ".join(f"{n}={tables.settings.get(n)} (here {wanted.get(n)})" for n in differing[:3])
    more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
    logging.warning(
        "device %s: its measured steps are of %s%s, so the roofline times the steps", profile.name, words, more
    )
    return roofline
