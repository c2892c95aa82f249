"""`chunked`: Sarathi-Serve's stall-free batching (Agrawal et al., OSDI 2024, algorithm 3; microsoft/sarathi-serve,
`sarathi_scheduler.py` at 96f9911).

A step computes at most `max_num_batched_tokens` (their chunk size) tokens: all decodes first, then partial prefills,
then new admissions with what is left. A prompt is admitted when it fits whole above the watermark, and has all its
pages from then on; only decodes need more, and preempt the last running when there are none.

Where we differ: theirs may admit in a step that preempted, even the request it has just preempted; ours does not. Their
decodes are not held to the budget, ours are. Theirs only recomputes, ours may swap.
"""

from __future__ import annotations

from engine.scheduler.policy import register_policy
from engine.scheduler.token_budget import TokenBudgetPolicy


@register_policy("chunked")
class Chunked(TokenBudgetPolicy):
    """Decodes first, one token budget, whole prompts mapped at admission."""

    default_budget = 512  # Sarathi's SarathiSchedulerConfig.chunk_size
    decodes_first = True
    whole_prompt = True
