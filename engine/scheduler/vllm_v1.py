"""`vllm_v1`: the scheduler of vLLM's V1 engine (`vllm/v1/core/sched/scheduler.py`, read at v0.16, 0.19 and 0.33).

There is no prefill phase and no decode phase: every request has tokens still to compute, and a step computes at most
`max_num_batched_tokens` of them. Running requests come first, in order of admission: a decode takes one token, a
partial prefill as many as the budget has left. Pages are mapped as chunks are scheduled. When one cannot get pages, the
last running is preempted until it can, or is itself the last. Waiting requests follow with what is left of the budget,
never in a step that preempted; one is admitted only if all tokens it has fit now (`scheduler_reserve_full_isl`, on by
default since pull request 37307) above the watermark (vLLM's own default is none: `--watermark=0`).

Where we differ: vLLM only recomputes, ours may swap; sequences on the host come back before anybody is admitted. Under
`priority`, where a victim may come before the request that needs its pages, vLLM has cut that request's chunk before
the victim's tokens return to the budget, and gives them to those behind it; ours gives them to the first in order. And
0.19 ends its pass when a request preempts itself; ours goes on with the rest, as 0.33 does. Nothing else differs, step
by step, from vLLM 0.19.0 and 0.33.0 (`experiments/results/vllm_scheduler`).
"""

from __future__ import annotations

from engine.scheduler.policy import register_policy
from engine.scheduler.token_budget import TokenBudgetPolicy


@register_policy("vllm_v1")
class VllmV1(TokenBudgetPolicy):
    """Running first, one token budget, pages by chunk."""

    default_budget = 2048  # vLLM's SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS
    decodes_first = False
    whole_prompt = False
