"""The comparison itself, without vLLM: our side against a schedule recorded from it, and what a difference is."""

import dataclasses

import pytest

from engine.errors import ConfigError
from experiments.schedules import (
    Arrival,
    Load,
    Step,
    VllmV1,
    continued_chunks,
    difference,
    preempted,
    random_load,
    schedule,
)
from tests.experiments import programs

LOAD = Load(
    (Arrival(0, 40, 14), Arrival(0, 30, 4), Arrival(1, 60, 6), Arrival(22, 20, 2), Arrival(22, 6, 3)),
    num_blocks=7,
    max_num_seqs=3,
    max_num_batched_tokens=32,
)
# What the schedulers of vLLM 0.19.0 and 0.33.0 decide under LOAD: 0 and 1 come in chunks; 2 waits in step 2, although
# its first chunk fits, until all of it does; 0 takes its last block from 2, which comes back when 0 has ended.
RECORDED = """
>0+32 | 5
0+8 >1+24 | 2
0 1+6 | 2
0 1 | 2
0 1 | 2
0 1 | 1
0 >2+31 | 2
0 2+29 | 0
0 2 | 0
0 2 | 0
0 x2 | 3
0 | 3
0 | 3
0 | 3
0 | 3
>2+32 | 5
2+31 | 3
2 | 3
2 | 2
| 7
| 7
| 7
>3+20 >4+6 | 4
3 4 | 4
4 | 6
"""


def test_our_side_decides_what_vllm_decided():
    assert [str(step) for step in schedule(LOAD, VllmV1(LOAD))] == RECORDED.split("\n")[1:-1]


def test_the_first_difference_is_shown_and_all_are_counted():
    steps = schedule(LOAD, VllmV1(LOAD))
    assert difference(steps, steps) == (25, None)
    other = steps[:-1]
    other[10] = dataclasses.replace(other[10], free_blocks=4)
    assert difference(steps, other) == (23, {"step": 10, "ours": "0 x2 | 3", "vllm": "0 x2 | 4"})
    assert difference(steps, steps[:-1]) == (24, {"step": 24, "ours": "4 | 6", "vllm": "ended"})


def test_the_order_of_admission_counts():
    steps = [Step.between([1, 2], [1, *new], [(1, 1), (5, 8), (4, 2)], 3) for new in ([4, 5], [5, 4])]
    assert [str(step) for step in steps] == ["1 >4+2 >5+8 x2 | 3", "1 >5+8 >4+2 x2 | 3"]
    assert difference(steps[:1], steps[1:])[0] == 0


@pytest.mark.parametrize("order", ["fcfs", "priority"])
def test_random_loads_compute_every_token_since_the_last_admission(order):
    num_preempted = num_chunks = 0
    for seed in range(6):
        load = random_load(seed, order)
        steps, computed = schedule(load, VllmV1(load)), {}
        for step in steps:
            assert sum(count for _, count in step.tokens) <= load.max_num_batched_tokens
            computed.update(dict.fromkeys(step.admitted, 0))
            for number, count in step.tokens:
                computed[number] += count
        assert computed == {i: a.prompt_len + a.output_len - 1 for i, a in enumerate(load.arrivals)}
        num_preempted += preempted(steps)
        num_chunks += continued_chunks(steps)
    assert num_preempted and num_chunks


def test_loads_that_cannot_be_served_are_refused():
    fits, long = Arrival(3, 16, 17), Arrival(3, 17, 17)  # 32 tokens have KV, and 33
    Load((fits,), 2, 1, 8)
    with pytest.raises(ConfigError, match="request 1 needs room for 33 tokens: more than 2 blocks"):
        Load((fits, long), 2, 1, 8)
    with pytest.raises(ConfigError, match="request 1 comes before step 2, the one before it 3"):
        Load((fits, Arrival(2, 1, 1)), 2, 1, 8)
    with pytest.raises(ConfigError, match="order 'sjf'; vLLM knows fcfs and priority"):
        Load((fits,), 2, 1, 8, "sjf")


def test_without_vllm_the_program_says_in_one_line_what_it_needs(tmp_path):
    for flags, told in (([], "--vllm_path is not given"), ([f"--vllm_path={tmp_path}"], "no unpacked vLLM wheel")):
        code, out, err = programs.run("compare_vllm_scheduler", *flags)
        assert (code, out) == (2, "") and err.count("\n") == 1 and told in err
