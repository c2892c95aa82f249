"""`burst`: requests of one size that arrive at once, the plainest way to fill the KV pool.

num=16  context=8192  output=128    requests, prompt tokens of each, output tokens of each
"""

from __future__ import annotations

from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.synthetic import token_seeds

DEFAULT_NUM = 16


@register("burst")
def burst(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Requests [0, window.end), all due at 0 s.

    Raises:
      WorkloadError: an option out of range.
    """
    if file is not None:
        raise options.error(f"burst reads no file, got {file!r}")
    context, output = options.integer("context", 8192), options.integer("output", 128)
    seeds = token_seeds(window.end(DEFAULT_NUM), window.seed)
    return [WorkloadRequest(str(i), 0.0, context, output, seed) for i, seed in enumerate(seeds)]
