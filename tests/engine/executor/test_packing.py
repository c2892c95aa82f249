"""Packing: every token of a plan lands once, in order, in a bucket that warm-up knows."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.executor.packing import FROM_DEVICE, Packer
from engine.scheduler.plan import Plan, Prefill

TILE, SLOTS = 8, 6


def make_plan(decode: list[tuple[int, int]], prefills: list[Prefill]) -> Plan:
    slots, positions = (np.array([d[i] for d in decode], np.int32) for i in (0, 1))
    tokens = np.full(len(decode), FROM_DEVICE, np.int32)
    return Plan(1, slots, tokens, positions, tuple(prefills), np.empty((0, 4), np.int32), None, None)


@st.composite
def plans(draw):
    slots = draw(st.permutations(range(SLOTS)))
    n = draw(st.integers(0, SLOTS))
    decode = [(s, draw(st.integers(0, 99))) for s in slots[:n]]
    prefills = [
        Prefill(
            s,
            draw(st.integers(0, 30)),
            np.arange(draw(st.integers(1, 40)), dtype=np.int32) + 100 * s,
            draw(st.booleans()),
        )
        for s in slots[n:]
    ]
    return make_plan(decode, prefills)


@settings(max_examples=150, deadline=None)
@given(plans(), st.booleans(), st.sampled_from([1, 4]))
def test_every_token_once_in_order(plan, deterministic, max_tiles):
    """Positions of each slot come out as consecutive runs, in the order of the sub-batches; sampled rows are answered
    once, by the row that holds their last token."""
    packer = Packer(SLOTS, TILE, max_tiles, deterministic)
    known = packer.buckets(mixed=True)
    got: dict[int, list[tuple[int, int]]] = {}
    answered = {}
    for batch in packer.pack(plan):
        assert batch.bucket in known
        part = batch.bucket.unpack(batch.packed)
        for slot, position in zip(part["row_slot"], part["row_position"], strict=True):
            if position >= 0:
                got.setdefault(int(slot), []).append((int(position), FROM_DEVICE))
        tokens = part["tile_tokens"].reshape(-1, TILE)
        for t, (slot, start, n) in enumerate(
            zip(part["tile_slot"], part["tile_start"], part["tile_length"], strict=True)
        ):
            got.setdefault(int(slot), []).extend((int(start) + i, int(tokens[t, i])) for i in range(n))
        for head, row in zip(batch.head_rows, batch.plan_rows, strict=True):
            assert row not in answered
            answered[int(row)] = int(part["out_slot"][head])
        nobody = np.delete(part["out_slot"], batch.head_rows)
        assert (nobody == SLOTS).all(), "padding would overwrite a slot's token"
    expected = {int(s): [(int(p), FROM_DEVICE)] for s, p in zip(plan.decode_slots, plan.decode_positions, strict=True)}
    expected |= {p.slot: [(p.start + i, int(t)) for i, t in enumerate(p.tokens)] for p in plan.prefills}
    assert {s: v for s, v in got.items() if v} == expected
    assert answered == dict(enumerate(plan.sampled_slots.tolist()))
