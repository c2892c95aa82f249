"""Decode speed and prefill time of the engine, against `transformers` generate with the same weights when it is there.

    python -m experiments.bench_engine --out=results/bench_engine

Both sides get the same batch of random prompts of one length, greedy, in the same dtype, and the same definition:
    prefill   seconds from handing over the batch until every sequence has its first token
    decode    tokens that became known after that moment / seconds since then
A cell (prompt length x batch) is measured in interleaved pairs, ours and the peer's in turns with alternating order,
after one discarded run each. The table shows medians, and the median over pairs of their ratio (> 1: ours is faster).
The peer runs under --peer_python (default: this interpreter). Both sides use every core, so other load on the machine
shows in the numbers; the load average is recorded. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from engine.config import to_dict
from engine.errors import ConfigError
from engine.files import write_whole, writing
from experiments import checkpoints, common_flags, environment
from experiments.measure import Side, Timing, our_side
from experiments.peer import Peer
from experiments.tables import format_table, rounded

flags.declare_key_flag("out")
BATCHES = flags.DEFINE_list("batches", ["1", "4", "16"], "Batch sizes.")
PROMPTS = flags.DEFINE_list("prompts", ["128", "1024"], "Prompt lengths in tokens.")
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens produced per sequence.", lower_bound=2)
PAIRS = flags.DEFINE_integer("pairs", 5, "Interleaved pairs per cell.", lower_bound=1)
PEER = flags.DEFINE_bool("peer", True, "Measure transformers too.")
PEER_PYTHON = flags.DEFINE_string("peer_python", sys.executable, "Interpreter that has torch and transformers.")

DEFAULT_MODEL = "base-124m"


def measure_cell(sides: dict[str, Side], prompt: int, batch: int, vocab_size: int) -> dict[str, Any]:
    """All pairs of one cell: medians per side, and their ratios when there are two sides."""
    runs: dict[str, list[Timing]] = {name: [] for name in sides}
    for pair in range(-1, PAIRS.value):  # the first is discarded: it compiles and touches memory
        rng = np.random.default_rng([prompt, batch, pair + 1])
        prompts = rng.integers(0, vocab_size, (batch, prompt)).tolist()
        for name in sorted(sides, reverse=bool(pair % 2)):
            result = sides[name](prompts, NEW_TOKENS.value)
            if pair >= 0:
                runs[name].append(result)
    cell: dict[str, Any] = {"prompt": prompt, "batch": batch}
    for name, results in runs.items():
        cell[f"{name}_decode_tokens_s"] = median(r.decode_tokens_s for r in results)
        cell[f"{name}_prefill_s"] = median(r.prefill_s for r in results)
    if len(runs) == 2:
        pairs = list(zip(runs["folio"], runs["transformers"], strict=True))
        ratios = [a.decode_tokens_s / b.decode_tokens_s for a, b in pairs]
        cell["decode_ratio"] = median(ratios)
        cell["decode_ratio_range"] = f"{min(ratios):.2f}-{max(ratios):.2f}"  # wide: the machine was not quiet
        cell["prefill_ratio"] = median(b.prefill_s / a.prefill_s for a, b in pairs)
        cell["same_tokens"] = float(np.mean([np.equal(a.tokens, b.tokens).mean() for a, b in pairs]))
    cell["runs"] = {n: [[r.prefill_s, r.decode_tokens_s] for r in results] for n, results in runs.items()}
    return cell


def median(values: Any) -> float:
    """Median of an iterable."""
    return float(np.median(list(values)))


def headline(model: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The JSON line: every cell, and geometric means over batch sizes per prompt length."""
    line: dict[str, Any] = {"bench": "engine", "model": model, "new_tokens": NEW_TOKENS.value, "pairs": PAIRS.value}
    for prompt in dict.fromkeys(c["prompt"] for c in cells):
        for metric in ("decode_ratio", "prefill_ratio"):
            ratios = [c[metric] for c in cells if c["prompt"] == prompt and metric in c]
            if ratios:
                line[f"{metric}_geomean_{prompt}"] = rounded(float(np.exp(np.mean(np.log(ratios)))))
    line["cells"] = [{k: rounded(v) for k, v in c.items() if k != "runs"} for c in cells]
    return line


def table(cells: list[dict[str, Any]]) -> str:
    """One row per cell."""
    columns = {
        "prompt": "prompt",
        "batch": "batch",
        "folio_decode_tokens_s": "decode tok/s",
        "transformers_decode_tokens_s": "transformers",
        "decode_ratio": "ratio",
        "decode_ratio_range": "range",
        "folio_prefill_s": "prefill s",
        "transformers_prefill_s": "transformers",
        "prefill_ratio": "ratio",
        "same_tokens": "same tokens",
    }
    shown = [k for k in columns if k in cells[0]]
    return format_table([columns[k] for k in shown], [[c[k] for k in shown] for c in cells])


def sizes(name: str, values: Sequence[str]) -> list[int]:
    """A list flag as integers >= 1.

    Raises:
      ConfigError: an item that is none.
    """
    if not values or not all(v.isdecimal() and int(v) > 0 for v in values):
        raise ConfigError(f"--{name} must be integers > 0 such as 1,4,16, got {','.join(values)!r}")
    return [int(v) for v in values]


def main() -> int:
    """The program."""
    name, config = common_flags.given_model() or DEFAULT_MODEL, common_flags.engine_config_from_flags()
    prompts, batches = sizes("prompts", PROMPTS.value), sizes("batches", BATCHES.value)
    out = common_flags.out_directory("bench_engine")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    directory = Path(name) if Path(name).is_dir() else checkpoints.exported(name, out, config.seed)
    engine = common_flags.load_engine(str(directory), config)
    sides: dict[str, Side] = {"folio": our_side(engine)}
    peer = None
    if PEER.value:
        try:
            peer = sides["transformers"] = Peer(PEER_PYTHON.value, directory, engine.model_config.dtype)
        except ConfigError as e:
            print(f"our numbers alone: {e}", flush=True)
    cells: list[dict[str, Any]] = []
    try:
        for prompt in prompts:
            for batch in batches:
                cells.append(measure_cell(sides, prompt, batch, engine.model_config.vocab_size))
                print(table(cells[-1:]), flush=True)
    finally:
        if peer is not None:
            peer.close()
    about = {
        "load_average": os.getloadavg(),
        "engine": to_dict(engine.config),
        "peer": peer and peer.about,
        **environment.describe(),
    }
    line = headline(name, cells)
    write_whole(out / "bench_engine.json", json.dumps({**line, "cells": cells, **about}, indent=2) + "\n")
    print(f"\n{table(cells)}\nresults in {out}")
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main)
