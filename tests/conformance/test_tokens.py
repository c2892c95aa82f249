"""A policy must not change what a request gets: the tiny real engine under it, against each prompt served alone."""

import pytest
from hypothesis import given, settings

from tests.engine.identity import BUDGETS, LOADS, RELAXED, check_bit_identical


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("async_depth", [0, 1])
@settings(RELAXED, max_examples=6)
@given(load=LOADS, budget=BUDGETS)
def test_logits_are_bit_identical(policy, async_depth, preemption, load, budget):
    """Small pool, prompts on and around page and chunk borders, arriving while others run."""
    check_bit_identical("wide", 16, load, policy=policy, async_depth=async_depth, preemption=preemption, budget=budget)
