"""The events behind the figures of LayerKV's pipelines, against schedules worked out on their own."""

import dataclasses

import pytest

from engine.errors import ConfigError
from engine.scheduler.layerkv.retention import parked_layers
from experiments.figures.layerkv.events import Decode, Place, fewest_retained, prefill_time, run_prefill

L20 = Place("llama2-7b", "l20", stack="vllm-0.5")
LATENCY = 10e-6  # of the L20's link


def landed(place: Place, tokens: int, retained: int) -> list[float]:
    """When the copies of a prefill have landed: each starts when its layer has ended and the one before has landed."""
    time, size = prefill_time(place, tokens), tokens * 2 * 32 * 128 * 2  # K and V of 32 heads of 128, 2 bytes
    gather, now, free, found = place.cost.page_copy_seconds(size), time.host + time.embed, 0.0, []
    for away in parked_layers(32, retained, "interleave"):
        now += time.layer + gather * away
        if away:
            free = max(free, now + LATENCY) + size / (place.share * 25e9)
            found.append(free)
    return found


@pytest.mark.parametrize("share", [1.0, 0.05])
@pytest.mark.parametrize("retained", [0, 1, 17, 31])
def test_a_prefill_and_its_copies(share, retained):
    place = dataclasses.replace(L20, share=share)
    run = run_prefill(place, 512, retained)
    assert [job.end for job in run.copies] == pytest.approx(landed(place, 512, retained))
    assert run.copied == run.copies[-1].end and len(run.copies) == 32 - retained
    alone = prefill_time(place, 512)
    gathers = (32 - retained) * place.cost.page_copy_seconds(512 * 16384)
    assert run.end == pytest.approx(alone.total + gathers)
    assert run.starts[1:] == pytest.approx(run.ends[:-1])


def test_a_prefill_that_keeps_all_copies_nothing():
    run = run_prefill(L20, 512, 32)
    assert not run.copies and run.copied == 0 and run.end == pytest.approx(prefill_time(L20, 512).total)


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_fewest_that_stay_are_just_enough(blocks):
    place = dataclasses.replace(L20, share=0.05)
    fewest = fewest_retained(place, 2048, blocks)
    block = place.layer_bytes(2048) / place.rate

    def behind(retained):
        return landed(place, 2048, retained)[-1] - run_prefill(place, 2048, retained).end

    assert behind(fewest) <= blocks * block < behind(fewest - 1)


def test_equations_3_and_4_by_hand():
    """x is the least with (32 - x) copies within the prefill; at a twentieth of the link a copy of 2,048 tokens takes
    33,554,432 / 1.25e9 s."""
    place = dataclasses.replace(L20, share=0.05)
    seconds, copy = prefill_time(place, 2048).total, 33_554_432 / 1.25e9
    x = place.retained(2048)
    assert (32 - x) * copy <= seconds < (33 - x) * copy
    assert L20.retained(2048) == 0  # on the whole link 32 copies take 43 ms


def test_links_carry_what_all_devices_have():
    """Llama-3.1-70B: 8 kv heads of 128 in all; four links of 25e9 bytes/s."""
    place = Place("llama3.1-70b", "l20", 4, share=0.5)
    assert place.layer_bytes(16) == 16 * 2 * 8 * 128 * 2 and place.rate == pytest.approx(50e9)
    assert place.links()[0].bytes_per_second == pytest.approx(50e9)


@pytest.mark.parametrize("pattern", ["interleave", "prefix", "suffix"])
def test_decode_steps_in_turn(pattern):
    """With nothing streamed a step is a step; far behind the hide bound it is the link's time. Alone, a step ends when
    its 16 copies and what is computed behind the last of them have."""
    batch, parked = Decode(L20, 4, 1024), parked_layers(32, 16, pattern).tolist()
    assert batch.steady(0, parked, 2) == pytest.approx(batch.time.device)
    assert batch.alone(0, parked, 1) == pytest.approx(batch.time.device)
    copy = 262_144 * 16_384 / 25e9  # 172 ms, a step takes 24 ms
    assert batch.steady(262_144, parked, 32) == pytest.approx(16 * copy, rel=1e-4)
    last = max(layer for layer, away in enumerate(parked) if away)
    behind = (32 - last) * batch.time.layer + L20.cost.page_copy_seconds(262_144 * 16_384) + batch.time.tail
    assert batch.alone(262_144, parked, 32) == pytest.approx(batch.time.embed + LATENCY + 16 * copy + behind)


def test_interleaved_layers_hide_a_copy_under_two_layers():
    """The next parked layer is on its way: a copy of 1.9 layers' time costs an interleaved step nothing, and a block of
    parked layers 0.9 of a layer's time for each but the first."""
    batch = Decode(L20, 26, 2048)
    tokens = int(1.9 * batch.time.layer * 25e9 / 16_384)
    masks = {p: parked_layers(32, 16, p).tolist() for p in ("interleave", "prefix")}
    interleaved, prefix = (batch.steady(tokens, mask, 1) for mask in masks.values())
    assert interleaved == pytest.approx(batch.time.device, rel=1e-3)
    assert prefix > batch.time.device + 13 * 0.9 * batch.time.layer


def test_a_place_that_cannot_be():
    with pytest.raises(ConfigError, match="link_gbs"):
        Place("llama2-7b", "l20", share=0.0)
    with pytest.raises(ConfigError, match="no model preset"):
        Place("llama9", "l20")
