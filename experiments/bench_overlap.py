"""What parked layers cost a step: prefills whose layers leave for the host, decode steps that stream layers back.

    python -m experiments.bench_overlap --patience=300

One long prompt is served alone, with some or all of its layers parked against none, in interleaved rounds. The link is
paced so that the KV of the whole prompt takes --offload_ratios of its prefill. In every round the side without parked
layers runs twice: the second run over the first, A/A, is what the machine says of itself.

overlap = 1 - (t_with - t_without) / t_copy_alone, where t_copy_alone is what the same blocks take over the same link
while nothing is computed (DESIGN "Host tier"). Prefill is the time to the first token; *landed* is when the last block
was on the host, over the prefill without copies. Gate: a prefill that copies for no longer than it computes takes at
most 1.05 times as long. A round that other processes disturb (--max_others) is made again while --patience lasts. Ends
with one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import EngineConfig, ModelConfig, cdiv
from engine.errors import ConfigError
from engine.models.source import resolve
from engine.request import SamplingParams
from experiments import common_flags, quiet
from experiments.common_flags import laid_over
from experiments.gates import Gate, gate_table
from experiments.quiet import Others
from experiments.tables import format_table, rounded

if TYPE_CHECKING:
    from engine import Engine

flags.adopt_module_key_flags(quiet)
PROMPT = flags.DEFINE_integer("prompt", 3072, "Tokens of the prompt.", lower_bound=16)
NEW_TOKENS = flags.DEFINE_integer("new_tokens", 24, "Decode steps of a run.", lower_bound=4)
OFFLOAD_RATIOS = flags.DEFINE_list(
    "offload_ratios", ["0.107", "0.9"], "Time of the prompt's KV over the link / prefill."
)
STREAMED = flags.DEFINE_list("streamed", ["1", "4"], "Parked layers, besides all of them, at the first ratio.")
ROUNDS = flags.DEFINE_integer("rounds", 11, "Interleaved rounds; one more is discarded.", lower_bound=1)

LIMIT = 1.05  # of the gate
SETTLING = 2  # decode steps before those that count: copies out still land
KEPT = "policy=layerkv,layerkv_slo_rule=false,layerkv_stream=always,layerkv_low_watermark=0,layerkv_high_watermark=0.99"


@dataclass(frozen=True)
class Run:
    """One prompt served alone; seconds."""

    prefill: float  # until its first token
    landed: float  # until the last block of the prefill was on the host, or the first token
    decode: float  # median step; nan: too few were taken


@dataclass(frozen=True)
class Side:
    """Parked layers, and what their copies take alone."""

    layers: int
    ratio: float  # of the link
    num_tokens: int  # decode steps of a run
    alone_out: float = 0.0  # seconds, of the blocks of a prefill
    alone_in: float = 0.0  # of those of a decode step

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.layers} parked, link {self.ratio:g}" if self.layers else "none parked"


def sides_from_flags(num_layers: int) -> list[Side]:
    """All layers at every ratio, and the other numbers at the first.

    Raises:
      ConfigError: not numbers, or not so many layers.
    """
    try:
        ratios, streamed = [float(r) for r in OFFLOAD_RATIOS.value], [int(k) for k in STREAMED.value]
    except ValueError as e:
        raise ConfigError(f"--offload_ratios and --streamed are lists of numbers: {e}") from None
    if not ratios or min(ratios) <= 0 or not all(0 < k < num_layers for k in streamed):
        raise ConfigError(
            f"--offload_ratios must be > 0 and --streamed from 1 to {num_layers - 1}, the layers but one; got "
            f"{','.join(OFFLOAD_RATIOS.value)} and {','.join(STREAMED.value)}"
        )
    steps = NEW_TOKENS.value
    first, *others = ratios
    slow = [Side(num_layers, ratio, 1) for ratio in others]  # a decode step would take as long as the copy
    return [Side(num_layers, first, steps), *slow, *(Side(k, first, steps) for k in streamed)]


def sized(config: EngineConfig, model: ModelConfig) -> EngineConfig:
    """`config` with room for the prompt, on the device and on the host.

    Raises:
      ConfigError: it sets what this program does.
    """
    if config.cache.num_pages or config.cache.device_bytes or config.cache.device_fraction or config.link_gbs:
        raise ConfigError("pool and link follow from --prompt and --offload_ratios: leave their sizes and link_gbs out")
    context = PROMPT.value + NEW_TOKENS.value + 1
    pages = cdiv(context, config.cache.page_size) * (2 * model.num_layers)
    num_bytes = pages * config.cache.page_size * model.kv_bytes_per_token_per_layer
    cache = dataclasses.replace(config.cache, num_pages=pages, host_bytes=2 * num_bytes)
    scheduler = dataclasses.replace(config.scheduler, max_num_seqs=2)
    return dataclasses.replace(config, cache=cache, scheduler=scheduler, max_context=context)


def serve(engine: Engine, prompt: list[int], side: Side) -> Run:
    """Prefills one prompt and decodes."""
    engine.step_log.clear()
    start = engine.clock.now()
    (output,) = engine.generate([prompt], SamplingParams(max_tokens=side.num_tokens + 1, ignore_eos=True))
    prefill, steps = output.metrics.ttft_s, output.metrics.itl_s[SETTLING:]
    assert prefill is not None
    written = [c.end - start for s in engine.step_log for c in s.copies if c.out][: side.layers]
    return Run(prefill, max([prefill, *written]), float(np.median(steps)) if steps else np.nan)


def copy_alone(engine: Engine, layers: int, repeats: int) -> tuple[float, float]:
    """Median seconds for the prompt's full pages of so many layers to the host and back, a block per layer, over the
    link of this engine while nothing is computed."""
    import jax
    from jax.sharding import NamedSharding

    from engine.builder import device_sizes
    from engine.executor.programs import ARENA
    from engine.executor.transfers import Transfers
    from engine.memory.moves import Move
    from pallas_kernels import init_arena

    config, full = engine.config, PROMPT.value // engine.config.cache.page_size
    spec = device_sizes(engine.model_config, config)[1]
    sharding = NamedSharding(engine.executor.mesh, ARENA)
    arena = init_arena(spec, layers * full + 1, sharding)
    lanes = Transfers(sharding, spec.page_bytes, engine.clock, config.link_gbs, config.cache.staging_bytes)
    blocks = np.split(1 + np.arange(layers * full, dtype=np.int32), layers)
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        times = [engine.clock.now()]
        for i, pages in enumerate(blocks):
            lanes.send(arena, Move(True, i, i, pages))
        while lanes.busy:
            lanes.take_ended(wait=True)
        times.append(engine.clock.now())
        for i, pages in enumerate(blocks):
            transfer = lanes.fetch(Move(False, i, i, pages))
            assert transfer is not None
            arena = lanes.land(arena, transfer)
        jax.block_until_ready(arena)
        while lanes.busy:
            lanes.take_ended(wait=True)
        times.append(engine.clock.now())
        lanes.drop(tuple(range(layers)))
        seconds.append((times[1] - times[0], times[2] - times[1]))
    out, back = np.median(seconds[1:], axis=0).tolist()
    return out, back


def measure(
    engines: dict[Side, Engine], plain: Engine, rounds: int, others: Others, rng: np.random.Generator
) -> tuple[dict[Side, list[Run]], list[Run], list[Run]]:
    """Runs of each side, and twice as many without parked layers; the first round is discarded."""
    twice = tuple(Side(0, number, NEW_TOKENS.value) for number in (1, 2))
    both = engines | dict.fromkeys(twice, plain)
    found: dict[Side, list[Run]] = {key: [] for key in both}
    discarded = False
    while len(found[twice[0]]) < rounds:
        prompt = rng.integers(0, plain.model_config.vocab_size, PROMPT.value).tolist()
        order = [list(both)[i] for i in rng.permutation(len(both)).tolist()]
        others.share()
        runs = {key: serve(both[key], prompt, key) for key in order}
        if not discarded:
            discarded = True
            others.wait()
        elif not others.disturb():
            for key, run in runs.items():
                found[key].append(run)
    first, second = (found.pop(side) for side in twice)
    return found, first, second


def spread(values: np.ndarray) -> str:
    """Median, and from where to where."""
    return f"{float(np.median(values)):.3f} ({values.min():.3f} to {values.max():.3f})"


def column(runs: list[Run], name: str) -> np.ndarray:
    """One time of every run, float64 [rounds]."""
    return np.array([getattr(run, name) for run in runs])


def figures(side: Side, runs: list[Run], plain: list[Run]) -> dict[str, float]:
    """What a side's copies cost, medians over rounds, each run against the plain one of its round."""
    found = {}
    for name, alone in (("prefill", side.alone_out), ("decode", side.alone_in)):
        with_, without = column(runs, name), column(plain, name)
        found[name] = float(np.median(with_ / without))
        found[f"{name}_overlap"] = 1 - float(np.median(with_ - without)) / alone
    found = {key: value for key, value in found.items() if np.isfinite(value)}
    return found | {"landed": float(np.median(column(runs, "landed") / column(plain, "prefill")))}


def judge(sides: dict[Side, dict[str, float]], prefill: float) -> Gate:
    """`prefill`: seconds without copies."""
    name, limit = "prefill whose copies take no longer than it", f"<= {LIMIT}x"
    hidden = [(found["prefill"], side.name) for side, found in sides.items() if side.alone_out <= prefill]
    if not hidden:
        return Gate(name, limit, "no such side", None)
    most, where = max(hidden)
    return Gate(name, limit, f"{most:.3f} ({where}), of {len(hidden)} sides", most <= LIMIT)


def main() -> int:
    """The program."""
    name = common_flags.given_model() or "small-20m"
    config = common_flags.engine_config_from_flags(executor="jax")
    model = resolve(name, config)[0]
    sides = sides_from_flags(model.num_layers)
    base = sized(config, model)

    def engine(layers: int, link_gbs: float | None) -> Engine:
        knobs = f"{KEPT},layerkv_retained_layers={model.num_layers - layers}"
        return common_flags.load_engine(name, dataclasses.replace(laid_over(base, knobs), link_gbs=link_gbs))

    plain, rng, others = engine(0, None), np.random.default_rng(config.seed), Others.from_flags()
    prompt = rng.integers(0, model.vocab_size, PROMPT.value).tolist()
    others.wait()
    prefill = float(np.median([serve(plain, prompt, Side(0, 0, 1)).prefill for _ in range(4)][1:]))
    num_bytes = PROMPT.value * model.num_layers * model.kv_bytes_per_token_per_layer
    engines: dict[Side, Engine] = {}
    for side in sides:
        made = engine(side.layers, num_bytes / (side.ratio * prefill) / 1e9)
        out, back = copy_alone(made, side.layers, 3)
        engines[dataclasses.replace(side, alone_out=out, alone_in=back)] = made
    runs, first, second = measure(engines, plain, ROUNDS.value, others, rng)
    found = {side: figures(side, of, first) for side, of in runs.items()}
    report(found, runs, first, second)
    gate = judge(found, float(np.median(column(first, "prefill"))))
    print("\n" + gate_table([gate]))
    line: dict[str, Any] = {"bench": "overlap", "model": name, "prompt": PROMPT.value, "rounds": len(first)}
    line |= {f"{n}_ms": rounded(1e3 * float(np.median(column(first, n)))) for n in ("prefill", "decode")}
    line |= {f"aa_{n}": rounded(float(np.median(column(second, n) / column(first, n)))) for n in ("prefill", "decode")}
    line["sides"] = {side.name: {k: rounded(v) for k, v in f.items()} for side, f in found.items()}
    print(json.dumps(line | {"passed": gate.passed}))
    return 0


def report(
    found: dict[Side, dict[str, float]], runs: dict[Side, list[Run]], first: list[Run], second: list[Run]
) -> None:
    """Prints a row per side."""
    rows: list[list[Any]] = []
    for label, of in (("none parked", first), ("none parked, again", second)):
        rows.append([label, *_times(of, first, "prefill"), *[None] * 3, *_times(of, first, "decode"), *[None] * 2])
    for side, of in runs.items():
        f, decodes = found[side], "decode" in found[side]
        prefill = [*_times(of, first, "prefill"), f["landed"], 1e3 * side.alone_out, f"{f['prefill_overlap']:.0%}"]
        decode = (
            [*_times(of, first, "decode"), 1e3 * side.alone_in, f"{f['decode_overlap']:.0%}"] if decodes else [None] * 4
        )
        rows.append([side.name, *prefill, *decode])
    header = ["", "prefill ms", "over none", "landed", "copy alone ms", "overlap"]
    print(format_table([*header, "decode ms", "over none", "copy alone ms", "overlap"], rows))


def _times(runs: list[Run], plain: list[Run], name: str) -> list[Any]:
    """Median milliseconds, and the ratios to the plain runs."""
    times = column(runs, name)
    return [1e3 * float(np.median(times)), spread(times / column(plain, name))]


if __name__ == "__main__":
    common_flags.run_main(main)
