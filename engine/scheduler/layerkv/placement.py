"""Which layers of a new sequence begin on the device: as many as the retention rule asks for, and as pages allow.

No JAX here.
"""

from __future__ import annotations

import numpy as np

from engine.config import SchedulerConfig
from engine.memory.parking import ParkingStore
from engine.scheduler.layerkv.foresight import Foresight
from engine.scheduler.layerkv.residency import Residency
from engine.scheduler.layerkv.retention import (
    num_retained,
    num_retained_by_deadline,
    num_retained_by_interval,
    parked_layers,
)
from engine.scheduler.state import SchedulerState


class Placement:
    """For prompts, when they are admitted."""

    def __init__(
        self,
        config: SchedulerConfig,
        state: SchedulerState,
        store: ParkingStore,
        foresight: Foresight,
        residency: Residency,
        high: int,
    ):
        """`high`: pages that are left free by layers which could be parked as well."""
        self.knobs, self.state, self.store = config.layerkv, state, store
        self.foresight, self.residency, self.num_layers = foresight, residency, store.num_layers
        self._least, self._high = int(config.watermark * store.num_pages), high

    def choose(self, num_tokens: int, taken: int) -> np.ndarray | None:
        """Which layers of a sequence of so many tokens are parked, bool [L]; None: it does not fit. `taken`: transient
        pages that the step needs already."""
        store, full = self.store, num_tokens // self.store.page_size
        fewest, most = self._bounds(num_tokens)
        if most == self.num_layers and store.fits(num_tokens, self._spared()):
            return self._mask(self.num_layers)
        if full and fewest < self.num_layers and taken + full <= store.transient_pages:
            away = self._most_that_fit(num_tokens, fewest, min(most, self.num_layers - 1))
            if away is not None:
                return away
        reserve = self._least if len(self.state.running) else 0  # alone a sequence may have all pages
        return self._mask(self.num_layers) if store.fits(num_tokens, reserve) else None

    def leave_for(self, num_tokens: int) -> None:
        """Parks layers of running sequences, newest first, so that a new one will fit."""
        store, fewest = self.store, self._bounds(num_tokens)[0]
        full, pages = num_tokens // store.page_size, store.pages_for(num_tokens)
        lacking = fewest * pages + (self.num_layers - fewest) * (pages - full) - store.num_free_pages
        missing = lacking - self.residency.leaving
        if self.knobs.layerwise and missing > 0:
            self.residency.leave(self.state.decodable()[1:], missing)

    def _mask(self, num_retained: int) -> np.ndarray:
        return parked_layers(self.num_layers, num_retained, self.knobs.pattern)

    def _spared(self) -> int:
        """Pages left free by layers that could be parked as well: all that run, and the new one, may need some next."""
        running = len(self.state.running)
        return max(self._least, self._high, (running + 1) * self.num_layers) if running else 0

    def _most_that_fit(self, num_tokens: int, fewest: int, most: int) -> np.ndarray | None:
        """The mask that keeps the most layers from `fewest` to `most`, of which those beyond the fewest leave `high`
        pages free. None: not even the fewest fit."""
        if not self.store.fits_away(num_tokens, self._mask(fewest)):
            return None
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fits = self.store.fits_away(num_tokens, self._mask(middle), self._spared())
            fewest, most = (middle, most) if fits else (fewest, middle - 1)
        return self._mask(fewest)

    def _bounds(self, num_tokens: int) -> tuple[int, int]:
        """The fewest and the most layers that a new sequence keeps."""
        knobs, layers = self.knobs, self.num_layers
        if not knobs.layerwise:
            return layers, layers
        if knobs.retained_layers is not None:
            return knobs.retained_layers, knobs.retained_layers
        copy = self.foresight.link.seconds_per_byte * self.state.page_bytes * (num_tokens // self.store.page_size)
        if knobs.retain == "select_n":
            seconds = self.foresight.decode_seconds(self.state.decodable())
            fewest = num_retained_by_interval(seconds, copy, layers)
        elif knobs.retain == "orbitflow":
            fewest = num_retained_by_deadline(knobs.tpot_slo, copy, layers)
        else:
            fewest = num_retained(self.foresight.times.prefill(num_tokens), copy, layers)
        return fewest, layers if knobs.retain == "spare" else fewest
