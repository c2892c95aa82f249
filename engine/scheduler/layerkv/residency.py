"""Which layers of which sequences leave the device, and which come home: moves decided over a `ParkingStore`.

Newest admissions leave first: they have most slack, and the oldest will end soonest and free its pages anyway. Layers
leave one by one, in an order that keeps those parked apart, and come home oldest sequence first (LayerKV's proactive
offload, reconstructed). No JAX here.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from engine.memory.parking import ParkingStore
from engine.scheduler.layerkv.config import LayerKVConfig
from engine.scheduler.layerkv.layer_order import order_home, order_out
from engine.scheduler.state import SchedulerState


class Residency:
    """Moves for the coming plan; the store and the copies do the rest."""

    def __init__(self, config: LayerKVConfig, state: SchedulerState, store: ParkingStore):
        self.config, self.state, self.store = config, state, store
        self._next_append = 0  # step from which on full tail pages may follow

    @property
    def idle(self) -> bool:
        """Whether nothing is on the host or on its way."""
        return not self.store.tier.used and not self.store.copies_in_flight

    def parked_pages(self, slots: np.ndarray) -> np.ndarray:
        """Pages of each sequence that are on the host and not on the device, int32 [n, L]."""
        ranges = self.store.parked[slots]
        return ranges[..., 1] - ranges[..., 0]

    def held(self, slots: np.ndarray) -> np.ndarray:
        """Pages of each sequence that are on the device, int64 [n]."""
        store = self.store
        return store.mapped[slots].astype(np.int64) * store.num_layers - self.parked_pages(slots).sum(1)

    @property
    def leaving(self) -> int:
        """Pages that will be free when copies in flight have landed."""
        store = self.store
        return int((store.sent - store.parked[..., 1]).sum()) if store.copies_in_flight else 0

    def append(self, slots: np.ndarray) -> None:
        """Full pages of parked layers follow the rest to the host; all sequences' together, so that blocks are few."""
        state, store = self.state, self.store
        if state.step < self._next_append:
            return
        self._next_append = state.step + store.page_size * self.config.append_pages
        sent = store.sent[slots]  # [n, L]
        full = state.cached[slots] // store.page_size
        due = (full[:, None] > sent) & (sent > 0)
        for layer in np.flatnonzero(due.any(0)).tolist():
            some = np.flatnonzero(due[:, layer])
            self._park(layer, slots[some].tolist(), full[some].tolist())

    def leave(self, slots: np.ndarray, num_pages: int) -> int:
        """Parks layers of sequences `slots`, oldest first, from the last one backwards, until so many pages are on
        their way. Returns how many are."""
        state, store, going = self.state, self.store, 0
        chosen: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for slot in slots[::-1].tolist():
            if going >= num_pages:
                break
            full = int(state.cached[slot]) // store.page_size
            sent = store.sent[slot]
            for layer in order_out(sent > 0, self.config.pattern):
                if going >= num_pages or full == 0:
                    break
                chosen[layer].append((slot, full))
                going += full
        return sum(self._park(layer, *map(list, zip(*some, strict=True))) for layer, some in chosen.items())

    def come_home(self, slots: np.ndarray, num_pages: float) -> int:
        """Brings parked layers of sequences `slots` home into at most so many pages: first, in this order, of those
        that come home whole, then of the others. Pages of every layer stay free for the next tokens of those that come:
        these would have to leave for them at once. Returns how many pages they take."""
        store, taken, growth = self.store, 0, 0
        slots = slots[self._whole_first(slots, num_pages)]
        lacking = store.lacking(slots, self.state.cached[slots] + 1)
        for slot, lacks in zip(slots.tolist(), lacking.tolist(), strict=True):
            growth += lacks
            ranges = store.parked[slot]
            sizes = ranges[:, 1] - ranges[:, 0]
            for layer in order_home(sizes > 0, self.config.pattern):
                if not store.is_parked(slot, layer):
                    continue  # more of it is on its way out
                size = int(sizes[layer])
                counts = np.full(store.num_layers, growth)
                counts[layer] += size
                if taken + size > num_pages or not store.pool.fits(counts):
                    return taken
                store.bring_home(slot, layer)
                taken += size
        return taken

    def _whole_first(self, slots: np.ndarray, num_pages: float) -> np.ndarray:
        """Order of `slots` [n] in which those come first that have room for all that is missing of them. Otherwise an
        older one, which cannot come whole, would keep a younger one waiting that nearly is."""
        left, partly = num_pages, np.ones(len(slots), bool)
        for i, missing in enumerate(self.parked_pages(slots).sum(1).tolist()):
            if missing <= left:
                left, partly[i] = left - missing, False
        return np.argsort(partly, kind="stable")

    def _park(self, layer: int, slots: list[int], ends: list[int]) -> int:
        """Sends pages of one layer to the host, as far as that has room. Returns how many leave."""
        store = self.store
        wanted = int(np.maximum(np.array(ends) - store.sent[slots, layer], 0).sum())
        if not store.tier.fits(wanted):
            return 0
        return store.park(layer, slots, [request.id for request in self.state.owners(slots)], ends)
