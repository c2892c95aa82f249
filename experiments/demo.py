"""The main job, small: real weights in, a trace's requests in at their arrival times, tokens and honest metrics out.

    python -m experiments.demo                              the Azure conversation hour's quantiles
    python -m experiments.demo --workload=azure:FILE.csv    the trace itself

Writes the 124M preset as a Hugging Face checkpoint, loads it back, and serves the same requests (arrivals and outputs)
at growing context lengths from a KV pool that holds one of the longest requests at a time. It shows what LayerKV
starts from: short contexts spend their TTFT in prefill; long ones spend it waiting for pages, although the machine
could compute them. The last point is served again with a pool that never fills, to tell memory from compute. At the
end, a saturated point under `vllm_v0` and under `layerkv` (`saturated.py`): what parking layers gains.

The arrival rate comes from a short calibration, so that the same happens on any machine: at the reference context
scale the machine would be 90% busy. Prints two tables, draws one figure, ends with one JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from engine.config import EngineConfig, ModelConfig, cdiv
from engine.errors import ConfigError
from engine.models.hf_config import read_config
from experiments import checkpoints, common_flags, plots, saturated, workloads
from experiments.measure import our_side
from experiments.replay import stop_on_signals
from experiments.run_record import RunRecord, claim
from experiments.serving import serve, settings, start_engine
from experiments.tables import format_table, rounded
from experiments.workloads import WorkloadRequest

if TYPE_CHECKING:
    from engine import Engine

flags.declare_key_flag("out")
WORKLOAD = flags.DEFINE_string("workload", "azure-like", "Workload spec; the demo sets its lengths, rate and number.")
SECONDS = flags.DEFINE_float("seconds", 16.0, "Arrivals per point.", lower_bound=1.0)
CONTROL = flags.DEFINE_bool("control", True, "Serve the longest contexts again with a pool that never fills.")
SATURATED = flags.DEFINE_bool("saturated", True, "Serve a saturated point under vllm_v0 and under layerkv.")

DEFAULT_MODEL = "base-124m"
SCALES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8)  # of the trace's contexts
REFERENCE_SCALE = 1 / 4
OUTPUT_SCALE = 0.5
MAX_PROMPT, MAX_OUTPUT = 1024, 256  # tokens
POOL_TOKENS = MAX_PROMPT + MAX_OUTPUT  # small enough to hurt: the longest request alone
CONTROL_FACTOR = 8
MAX_NUM_SEQS = 16
BUSY = 0.9
MIN_REQUESTS = 8
COLUMNS = {
    "mean_context": "context",
    "pool_tokens": "pool",
    "completed": "requests",
    "mean_ttft_ms": "TTFT ms",
    "mean_queue_ms": "queue",
    "mean_prefill_ms": "prefill",
    "queue_share": "queue share",
    "mean_tpot_ms": "TPOT ms",
    "output_throughput": "out tok/s",
    "total_preemptions": "preempted",
}
CALIBRATION_PROMPT, CALIBRATION_BATCH, CALIBRATION_RUNS = 256, 4, 3


@dataclass(frozen=True)
class Speed:
    """What the machine does, unloaded."""

    prefill_s: float  # per prompt token
    decode_s: float  # per output token, in batches of CALIBRATION_BATCH


@dataclass(frozen=True)
class Point:
    """One run: a context scale and a pool."""

    mean_context: float
    pool_tokens: int
    summary: dict[str, Any]

    def bar(self) -> plots.TtftBar:
        """For the figure."""
        label = f"{self.mean_context:.0f}" + (f"\npool x{CONTROL_FACTOR}" if self.pool_tokens > POOL_TOKENS else "")
        return plots.TtftBar(label, self.summary["mean_queue_ms"] / 1e3, self.summary["mean_prefill_ms"] / 1e3)

    def row(self) -> dict[str, Any]:
        """What COLUMNS name."""
        s = self.summary
        share = s["mean_queue_ms"] / s["mean_ttft_ms"] if s["mean_ttft_ms"] else None
        own = {"mean_context": self.mean_context, "pool_tokens": self.pool_tokens, "queue_share": share}
        return {name: own[name] if name in own else s[name] for name in COLUMNS}


def demo_config(config: EngineConfig, model: ModelConfig, pool_tokens: int) -> EngineConfig:
    """`config` with a pool of `pool_tokens` tokens, and the demo's limits where no flag set others."""
    if config.cache.num_pages or config.cache.device_bytes or config.cache.device_fraction:
        raise ConfigError("the demo sizes the KV pool itself: leave num_pages, device_bytes and device_fraction out")
    pages = cdiv(pool_tokens, config.cache.page_size) * model.num_layers
    cache = dataclasses.replace(config.cache, num_pages=pages, pages_per_chunk=config.cache.pages_per_chunk or 1)
    scheduler = config.scheduler
    overlay = (common_flags.CONFIG.value or {}).get("scheduler", {})
    if not common_flags.MAX_NUM_SEQS.present and "max_num_seqs" not in overlay:
        scheduler = dataclasses.replace(scheduler, max_num_seqs=MAX_NUM_SEQS)
    return dataclasses.replace(
        config, cache=cache, scheduler=scheduler, max_context=config.max_context or MAX_PROMPT + MAX_OUTPUT
    )


def calibrate(engine: Engine) -> Speed:
    """Medians over a few runs of one prompt, and of a small batch's decode."""
    side, rng, size = our_side(engine), np.random.default_rng(0), engine.model_config.vocab_size
    prompts = [side(rng.integers(0, size, (1, CALIBRATION_PROMPT)).tolist(), 2) for _ in range(CALIBRATION_RUNS)]
    batches = [side(rng.integers(0, size, (CALIBRATION_BATCH, 64)).tolist(), 24) for _ in range(CALIBRATION_RUNS)]
    return Speed(
        float(np.median([t.prefill_s for t in prompts])) / CALIBRATION_PROMPT,
        float(np.median([1 / t.decode_tokens_s for t in batches])),
    )


def spec(base: str, scale: float, num: int | None = None, rate_scale: float = 1.0) -> str:
    """The workload of one point; every point has the same arrivals and outputs. `num`: None for all there are."""
    options = {
        "scale_prompt": scale,
        "scale_output": OUTPUT_SCALE,
        "max_prompt": MAX_PROMPT,
        "max_output": MAX_OUTPUT,
        "rate_scale": f"{rate_scale:.6g}",
    } | ({} if num is None else {"num": num})
    return base + ("," if ":" in base else ":") + ",".join(f"{k}={v}" for k, v in options.items())


def busy_rate(base: str, speed: Speed, num: int | None = None) -> float:
    """Requests/s that would keep the machine `BUSY` with the first `num` requests at the reference scale, if memory
    were no limit."""
    sample = workloads.build(spec(base, REFERENCE_SCALE, num))
    return BUSY / float(np.mean([speed.prefill_s * r.prompt_len + speed.decode_s * r.output_len for r in sample]))


def serve_point(engine: Engine, model: str, workload: str, directory: Path, pool: int) -> Point:
    """Serves one point and writes its run files."""
    requests: Sequence[WorkloadRequest] = workloads.build(workload)
    record = RunRecord(claim(directory, overwrite=True))
    record.config(settings(engine, model, workload, requests))
    mean_context = float(np.mean([r.prompt_len for r in requests]))
    print(f"\n{len(requests)} requests, mean context {mean_context:.0f} tokens, pool {pool:,} tokens", flush=True)
    with stop_on_signals() as stop:
        return Point(mean_context, pool, serve(engine, requests, record, stop))


def serve_points(directory: Path, model: ModelConfig, config: EngineConfig, out: Path) -> Iterator[Point]:
    """All points, in the order of the table."""
    base, name = WORKLOAD.value, str(directory)
    engine = start_engine(name, demo_config(config, model, POOL_TOKENS), warmup=True)
    speed = calibrate(engine)
    num = max(MIN_REQUESTS, round(busy_rate(base, speed) * SECONDS.value))
    rate = busy_rate(base, speed, num)
    rate_scale = rate / workloads.mean_rate(workloads.build(spec(base, 1.0, num)))
    print(
        f"calibration: prefill {speed.prefill_s * 1e3:.2f} ms/token, decode {speed.decode_s * 1e3:.2f} ms/token in "
        f"batches of {CALIBRATION_BATCH}\n{rate:.2f} requests/s would keep this machine {BUSY:.0%} busy at "
        f"{REFERENCE_SCALE:g} of the trace's context lengths; every point gets this rate"
    )
    for scale in SCALES:
        workload = spec(base, scale, num, rate_scale)
        yield serve_point(engine, name, workload, out / f"context-x{scale:g}", POOL_TOKENS)
    if CONTROL.value:
        del engine  # its arena and weights go before the next one's come
        pool = CONTROL_FACTOR * POOL_TOKENS
        engine = start_engine(name, demo_config(config, model, pool), warmup=True)
        yield serve_point(engine, name, spec(base, SCALES[-1], num, rate_scale), out / "control", pool)


def draw(points: Sequence[Point], stem: Path) -> str | None:
    """The figure's path, or None after saying why there is none."""
    bars = [p.bar() for p in points if p.summary["completed"]]
    try:
        if not bars:
            raise ConfigError("no request completed")
        plots.ttft_figure(bars, stem, "mean context length (tokens)", "TTFT at one arrival rate")
    except ConfigError as e:
        print(f"no figure: {e}")
        return None
    return f"{stem}.png"


def main() -> int:
    """The program."""
    name, config = common_flags.given_model() or DEFAULT_MODEL, common_flags.engine_config_from_flags()
    workloads.build(spec(WORKLOAD.value, 1.0))  # a bad spec or file is found out before anything slow starts
    out = claim(common_flags.out_directory("demo"), overwrite=True)
    start = time.monotonic()
    directory = Path(name) if Path(name).is_dir() else checkpoints.exported(name, out, config.seed)
    print(f"checkpoint {directory} ({time.monotonic() - start:.1f} s)", flush=True)
    model, points = read_config(directory), list[Point]()
    demo_config(config, model, POOL_TOKENS)  # what it cannot take is found out before anything slow starts
    if SATURATED.value:
        saturated.POINT.config(config, model)
    for point in serve_points(directory, model, config, out):
        points.append(point)
        if point.summary["interrupted"]:
            break
    stopped_by = points[-1].summary["stopped_by"]
    rows = [p.row() for p in points]
    print("\n" + format_table(list(COLUMNS.values()), [list(r.values()) for r in rows]))
    if stopped_by:
        print(f"interrupted by {stopped_by} in point {len(points)} of {len(SCALES) + CONTROL.value}")
    figure = draw(points, out / "ttft")
    sides: list[saturated.Side] = []
    if SATURATED.value and not stopped_by:
        with stop_on_signals() as stop:
            sides = saturated.serve_sides(str(directory), model, config, out, stop)
        stopped_by = stop.signal
        header = ["policy", *saturated.COLUMNS.values()]
        print("\n" + format_table(header, [list(side.row().values()) for side in sides]))
        if stopped_by:
            print(f"interrupted by {stopped_by} at the saturated point")
    print(f"figure {figure}\nresults in {out}")
    line = {"bench": "demo", "model": name, "workload": WORKLOAD.value, "interrupted": stopped_by is not None}
    json_rows, json_sides = (
        [{k: rounded(v) for k, v in row.items()} for row in part] for part in (rows, [side.row() for side in sides])
    )
    print(json.dumps(line | {"figure": figure, "points": json_rows, "saturated": json_sides}))
    return 128 + signal.Signals[stopped_by] if stopped_by else 0


if __name__ == "__main__":
    common_flags.run_main(main)
