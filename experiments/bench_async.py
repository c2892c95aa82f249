"""What depth-1 asynchrony gains: saturated decode with --async_depth 0 and 1, in turns.

    python -m experiments.bench_async --model=base-124m --max_num_seqs=16

A step's idle time is what lies between the moment when the device had finished the step before, as a thread that waits
for it saw, and the dispatch of its own first program, if that came later: the device has nothing to do meanwhile. (Gaps
between the programs of one step are not seen.) Prints medians over interleaved pairs, after a discarded one, and ends
with one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
from absl import flags

from engine.request import SamplingParams
from experiments import common_flags
from experiments.measure import idle_share
from experiments.tables import format_table, rounded

BATCH = flags.DEFINE_integer("batch", 16, "Sequences that decode together.", lower_bound=1)
PROMPT = flags.DEFINE_integer("prompt", 128, "Tokens of each prompt.", lower_bound=1)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 64, "Tokens produced per sequence.", lower_bound=8)
PAIRS = flags.DEFINE_integer("pairs", 5, "Interleaved pairs.", lower_bound=1)

SWITCH_S = 1e-4  # how long a host that computes may keep the thread that stamps from the interpreter


def run(engine, seed: int) -> tuple[float, float]:
    """(milliseconds per decode step, share of the time that the device is idle between decode steps)."""
    vocab = engine.model_config.vocab_size
    prompts = np.random.default_rng(seed).integers(0, vocab, (BATCH.value, PROMPT.value)).tolist()
    engine.step_log.clear()
    engine.generate(prompts, SamplingParams(max_tokens=NEW_TOKENS.value, ignore_eos=True))
    steps = [s for s in engine.step_log if s.num_decode == BATCH.value]
    return 1e3 * (steps[-1].end - steps[0].end) / (len(steps) - 1), idle_share(steps)


def main() -> int:
    """The program."""
    sys.setswitchinterval(SWITCH_S)
    name, config = common_flags.given_model() or "base-124m", common_flags.engine_config_from_flags()
    engines = {
        depth: common_flags.load_engine(name, dataclasses.replace(config, async_depth=depth)) for depth in (0, 1)
    }
    runs: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for pair in range(-1, PAIRS.value):
        for depth in sorted(engines, reverse=bool(pair % 2)):
            result = run(engines[depth], pair + 1)
            if pair >= 0:
                runs[depth].append(result)
    medians = {depth: np.median(results, axis=0) for depth, results in runs.items()}
    gain = float(np.median([a[0] / b[0] for a, b in zip(runs[0], runs[1], strict=True)]))
    print(format_table(["async_depth", "ms per step", "idle share"], [[d, *m] for d, m in medians.items()]))
    line = {"bench": "async", "model": name, "batch": BATCH.value, "prompt": PROMPT.value, "gain": rounded(gain)}
    line |= {
        f"depth{d}_{n}": rounded(float(v)) for d, m in medians.items() for n, v in zip(("ms", "idle"), m, strict=True)
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main)
