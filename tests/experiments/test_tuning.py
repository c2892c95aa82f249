"""Every policy is tried equally often, with settings that exist, and nobody is shown the future."""

import pytest

from experiments.capacity_places import FIXED, Place, Site
from experiments.tuning import POLICIES, settled, trials

SITE = Site(Place(FIXED), 32 * 400, 21, 256)


def test_the_budget_is_the_same_for_all():
    assert {name: len(set(trials(policy, 12))) for name, policy in POLICIES.items()} == dict.fromkeys(POLICIES, 12)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_trials_are_settings_that_exist_the_defaults_first(policy):
    """Points check what they are given. More trials begin with the same ones."""
    found = trials(policy, 40)
    assert found[:12] == trials(policy, 12) and found[0] == ("policy=vllm_v0" if policy.name == "sjf" else "")
    configs = [SITE.point(policy, text, 1.0, 0).config for text in found]
    default = configs[0].scheduler
    assert all(config.scheduler.policy == default.policy for config in configs) or policy.name == "sjf"
    assert all(config.scheduler.order == default.order for config in configs)
    assert {config.scheduler.layerkv.lengths for config in configs} <= {"quantile", "mean"}
    assert {config.scheduler.layerkv.times for config in configs} == {"online"}
    needs = [config.cache.host_bytes > 0 for config in configs]
    assert needs == [policy.host or c.scheduler.preemption == "swap" for c in configs]


def test_seeds_draw_other_trials():
    policy = POLICIES["layerkv"]
    assert trials(policy, 12) == trials(policy, 12) != trials(policy, 12, seed=1)


def test_there_are_only_so_many():
    with pytest.raises(ValueError, match="vllm_v0 has 96 different settings, 97 are wanted"):
        trials(POLICIES["vllm_v0"], 97)


def test_sequences_are_counted_in_what_the_pool_holds():
    assert settled("watermark=0,max_num_seqs=x1.5", 21) == "watermark=0,max_num_seqs=32"
    assert settled("max_num_seqs=x0.5", 1) == "max_num_seqs=1" and settled("", 3) == ""
    point = SITE.point(POLICIES["vllm_v0"], "max_num_seqs=x3", 1.0, 0)
    assert point.config.scheduler.max_num_seqs == 63


def test_who_keeps_to_an_objective_is_told_it_at_its_scale():
    knobs = {name: SITE.point(policy, "", 1.0, 0, 0.5).config.scheduler.layerkv for name, policy in POLICIES.items()}
    told = {name for name, k in knobs.items() if (k.tpot_slo, k.ttft_slo) == (0.1, 1.5)}
    assert told == {"layerkv", "layerkv, sjf", "paged_park"}
    assert {name for name, k in knobs.items() if (k.tpot_slo, k.ttft_slo) == (0.2, 3.0)} == {*POLICIES} - told
