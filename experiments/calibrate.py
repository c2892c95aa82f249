"""Times ops, copies and steps of the real executor on what is here, and writes a device file for the virtual clock.

    python -m experiments.calibrate --model=small-20m --num_pages=2400 --max_num_seqs=32 --out=cpu-here.json
    python -m experiments.serve --executor=sim --device=cpu-here.json --model=small-20m ...

The file has two kinds of times. `steps` are measured steps by bucket, for this model under these settings (page size,
store, largest batch, query tiles; any policy): with them a simulated step is an interpolation. `hardware` and
`constants` are fitted to measured ops: the roofline for other models and settings on the same machine. `measurements`
has the number and the spread of whatever was measured, and how well the roofline does on the measured steps.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags, logging

from engine.costmodel.device import Constants, Hardware, load_device
from engine.costmodel.measured_steps import step_settings
from engine.costmodel.step_model import StepModel, StepWork
from engine.costmodel.tables import interpolate
from engine.errors import ConfigError
from engine.executor.packing import Bucket
from engine.files import write_whole
from experiments import common_flags, environment, quiet
from experiments.quiet import Others
from experiments.step_timing import (
    Point,
    Samples,
    StepTimer,
    Timed,
    attended,
    host_seconds,
    time_rounds,
    timed_buckets,
)
from experiments.tables import format_table, rounded

if TYPE_CHECKING:
    from engine.engine import Engine

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
SECONDS = flags.DEFINE_float("seconds", 90.0, "For timing steps; ops get a third of it on top.", lower_bound=0.1)
flags.adopt_module_key_flags(quiet)
NAME = flags.DEFINE_string("name", None, "Of the device. Default: the name of --out.")
OUT_DEFAULT = "cpu-here.json"
HOST_TOKENS = 24  # decode steps of a run that measures the host's part
HOST_ROUNDS = 5


def bucket_entry(points: dict[Point, Samples], bucket: Bucket, engine: Engine) -> dict[str, Any]:
    """A bucket's curve for the device file, and what one long row among short ones costs."""
    packer = engine.executor.packer
    curve = {attended(p, packer): s for p, s in points.items() if not p.skewed}
    uneven = [(max(p.contexts) - np.mean(p.contexts), attended(p, packer), s) for p, s in points.items() if p.skewed]
    return {
        "rows": bucket.rows,
        "tiles": bucket.tiles,
        "points": [{"attended": x} | curve[x].entry() for x in sorted(curve)],
        "uneven": [{"excess": rounded(float(more)), "attended": x} | s.entry() for more, x, s in uneven],
    }


def skew_alpha(bucket: dict[str, Any]) -> float | None:
    """What the roofline takes for unequal rows, t = t(mean) + alpha (t(longest) - t(mean)), from a bucket's entry with
    the most unequal ones; None: it has none."""
    if not bucket["uneven"]:
        return None
    most, rows = bucket["uneven"][-1], bucket["rows"]
    at, seconds = (np.array([p[name] for p in bucket["points"]], float) for name in ("attended", "seconds"))
    totals = np.array([most["attended"], most["attended"] + rows * most["excess"]])
    mean, longest = interpolate(totals, at, seconds)
    return float(np.clip((most["seconds"] - mean) / (longest - mean), 0, 1)) if longest > mean else 0.0


class StepCalibration:
    """Times the steps of an engine, and the host's part, in one sitting or several."""

    def __init__(self, engine: Engine, rng: np.random.Generator, others: Others):
        """
        Raises:
          ConfigError: a bucket that the pool cannot fill.
        """
        self.engine, self.buckets = engine, timed_buckets(engine)
        self._rng, self._others, self._timer = rng, others, StepTimer(engine)
        self._timed, self._host = Timed({}), {0: Samples(), 1: Samples()}

    def sit(self, seconds: float) -> None:
        """Times steps for so long, then the host's part."""
        points = [point for of in self.buckets.values() for point in of]
        timed = time_rounds(self._timer, points, seconds, self._rng, self._others)
        if timed.others > self._others.limit:
            logging.warning("other processes took %.0f%% of the CPUs meanwhile: steps are too long", 100 * timed.others)
        self._timed.add(timed)
        self._time_host()

    def _time_host(self) -> None:
        """What the engine's loop adds to a decode step at async_depth 0 and 1, from interleaved runs."""
        engine, config = self.engine, self.engine.config
        rows = min(4, engine.executor.packer.num_slots)
        host_seconds(engine, self._timer, rows, HOST_TOKENS)  # compiles what is not yet
        target = len(self._host[1].seconds) + HOST_ROUNDS
        while len(self._host[1].seconds) < target:
            for depth, samples in self._host.items():
                engine.config = dataclasses.replace(config, async_depth=depth)
                self._others.share()
                interval, own = host_seconds(engine, self._timer, rows, HOST_TOKENS)
                if not self._others.disturb():
                    samples.seconds.append(interval - own)
        engine.config = config

    def section(self) -> dict[str, Any]:
        """The section `steps` of a device file, of all sittings; the host's part in microseconds >= 0."""
        engine, samples = self.engine, self._timed.samples
        host: dict[str, Any] = {str(d): rounded(max(0.0, s.median * 1e6)) for d, s in self._host.items()}
        return {
            "settings": step_settings(engine.model_config, engine.config, engine.executor.packer),
            "host_us": host | {f"{depth}_measured": s.entry() for depth, s in self._host.items()},
            "rounds": self._timed.rounds,
            "others": rounded(self._timed.others),
            "dropped": self._timed.dropped,
            "buckets": [bucket_entry({p: samples[p] for p in of}, b, engine) for b, of in self.buckets.items()],
        }


def measure_ops(
    engine: Engine, seconds: float, rng: np.random.Generator, others: Others
) -> tuple[dict[str, float], list[dict]]:
    """Constants of the roofline by name, and the ops that they are fitted to."""
    from experiments.op_timing import fit, make_ops, time_ops

    config, model = engine.config, engine.model_config
    tokens = sorted({config.query_tile, config.max_tiles * config.query_tile})
    ops = make_ops(model, config.tensor, tokens, sorted({1, engine.executor.packer.max_rows}))
    samples = time_ops(ops, seconds, rng, others)
    measured = [{"op": op.name} | op.work | s.entry() for op, s in zip(ops, samples, strict=True)]
    return fit(model, config.tensor, ops, samples), measured


def device_file(name: str, engine: Engine, steps: dict[str, Any], found: dict[str, float], ops: list[dict]) -> dict:
    """Everything, in the format of `engine/costmodel/device.py`."""
    import jax

    device, about = jax.devices()[0], environment.describe()
    memory = (device.memory_stats() or {}).get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf(
        "SC_PAGE_SIZE"
    )
    found = found | {"memory_gib": memory / 2**30, "link_gbs_spec": found["link_gbs"]}
    found |= {"t0_host_us": steps["host_us"]["0"], "reserved_gib": 0.0}
    skews = [alpha for bucket in steps["buckets"] if (alpha := skew_alpha(bucket)) is not None]
    found["skew_alpha"] = float(np.median(skews or [0.0]))
    fitted = {f.name for f in dataclasses.fields(Constants)} - {"t0_host_us", "skew_alpha"}
    source = f"experiments.calibrate, {about['host']['cpus']} CPUs, {device.platform} {device.device_kind}"

    def section(cls: type) -> dict[str, Any]:
        return {
            f.name: {
                "value": rounded(found[f.name]),
                "kind": "fitted" if f.name in fitted else "measured",
                "source": source + (", the best of all ops" if f.name.endswith(("tflops", "memory_gbs")) else ""),
            }
            for f in dataclasses.fields(cls)
            if f.name in found
        }

    hardware = section(Hardware) | {"interconnect": {"value": "none", "kind": "measured", "source": source}}
    return {
        "name": name,
        "description": f"{device.device_kind} under JAX {about['packages']['jax']}, measured",
        "stack": "folio",
        "hardware": hardware,
        "constants": section(Constants),
        "steps": steps,
        "measurements": {
            "link_gbs": {way: rounded(found[f"link_{way}_gbs"]) for way in ("out", "in")},
            "ops": ops,
            "made_by": about,
            "model": engine.source,
            "engine": dataclasses.asdict(engine.config),
        },
    }


def roofline_error(path: Path, engine: Engine, buckets: dict[Bucket, list[Point]], steps: dict[str, Any]) -> float:
    """Mean |relative error| of the roofline on the measured points."""
    model = StepModel(engine.model_config, load_device(str(path)), tensor=engine.config.tensor)
    packer, errors = engine.executor.packer, []
    for (_, points), entry in zip(buckets.items(), steps["buckets"], strict=True):
        seconds = {p["attended"]: p["seconds"] for p in entry["points"]}
        uneven = {p["attended"]: p["seconds"] for p in entry["uneven"]}
        for p in points:
            rows = len(p.contexts)
            longest = max(p.contexts, default=0)
            work = StepWork(rows, sum(p.contexts), longest, p.prefills, rows + len(p.prefills))
            known = (uneven if p.skewed else seconds)[attended(p, packer)]
            errors.append(abs(model.step(work).device / known - 1))
    return float(np.mean(errors))


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    out = Path(common_flags.OUT.value or OUT_DEFAULT)
    if out.suffix != ".json" or not out.parent.is_dir():
        raise ConfigError(f"--out={out} must name a .json file in a folder that is there")
    if out.exists() and not common_flags.OVERWRITE.value:
        raise ConfigError(f"--out={out} is there: name another, or --overwrite")
    if config.executor != "jax" or config.scheduler.max_num_seqs < 2:
        raise ConfigError("calibration times the real executor: --executor=jax and --max_num_seqs of at least 2")
    rng = np.random.default_rng(config.seed)
    engine = common_flags.load_engine(model, dataclasses.replace(config, executor="jax"))
    others = Others.from_flags()
    calibration = StepCalibration(engine, rng, others)
    calibration.sit(SECONDS.value)
    steps = calibration.section()
    found, ops = measure_ops(engine, SECONDS.value / 3, rng, others)
    write_whole(out, json.dumps(device_file(NAME.value or out.stem, engine, steps, found, ops), indent=1) + "\n")
    rows = [
        [f"rows={b['rows']} tiles={b['tiles']}", p["attended"], 1e3 * p["seconds"], p["count"], p["spread"]]
        for b in steps["buckets"]
        for p in b["points"]
    ]
    print(format_table(["bucket", "attended", "ms", "count", "spread"], rows))
    print(load_device(str(out)).describe())
    error = roofline_error(out, engine, calibration.buckets, steps)
    spread = float(np.median([row[-1] for row in rows]))
    print(f"the roofline is {error:.0%} off the measured steps; their median spread is {spread:.0%}")
    line = {"bench": "calibrate", "model": model, "file": str(out), "rounds": steps["rounds"], "points": len(rows)}
    line |= {
        "others": steps["others"],
        "median_spread": rounded(spread),
        "roofline_mape": rounded(error),
        "host_us": steps["host_us"]["0"],
    }
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main)
