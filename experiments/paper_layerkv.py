"""LayerKV at the scale of its paper, simulated: three models on L20s over context lengths and arrival rates.

    python -m experiments.paper_layerkv --out=results/layerkv_paper

100 requests of 450 output tokens each (Poisson; all policies serve the same ones) under every policy and seed: over
context lengths at one rate, and over rates at 2,048 tokens. Llama2-7B gets the paper's 1 request/s. The paper's rates
for the other two models could not be read; ours is fixed here by a rule that knows nothing of LayerKV: the load at
2,048 tokens, rate over the baseline's capacity, is that of Llama2-7B at 1 request/s. Capacity is what `vllm_v0`
completes per second when all come at once; rates of the second sweep are shares of it. Objectives are the paper's: TTFT
3 s, TPOT 200 ms. A place where a request alone misses them is marked infeasible; where that is so at 2,048 tokens,
rates are swept at the longest feasible context, too.

Prints a table per place, then the gates of issue 5 as passed or missed. Writes layerkv_paper.json, tables.txt and
ttft.png / .pdf, which are the same bytes whenever the same code runs, and environment.json under --out; ends with one
JSON line.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from engine.config import to_dict
from engine.errors import ConfigError
from engine.files import write_whole
from experiments import common_flags, environment, layerkv_figure, seeded
from experiments.gates import Gate, gate_table
from experiments.layerkv_gates import BASELINE, LAYERKV, NO_RULE, OVERLOAD, PAPER_CONTEXT, PAPER_RATE, Place, gates
from experiments.paper_models import MACHINE, SATURATED, SLO, SLO_TTFT_MS
from experiments.points import Point
from experiments.run_record import claim
from experiments.seeded import figures, losses, mean, over_seeds, rounded_values, run_all
from experiments.tables import format_table, rounded

flags.declare_key_flag("out")
flags.declare_key_flag("overwrite")
flags.adopt_module_key_flags(seeded)
CONTEXTS = flags.DEFINE_multi_integer(
    "prompt_tokens",
    [128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "Prompt lengths in tokens; 2,048 in any case.",
    lower_bound=1,
)
NUM = flags.DEFINE_integer("num_requests", 100, "Requests of each run.", lower_bound=2)
OUTPUT = flags.DEFINE_integer("num_output_tokens", 450, "Output tokens of each request.", lower_bound=2)


@dataclass(frozen=True)
class Setup:
    """A model and the L20s that share it."""

    name: str
    model: str
    tensor: int
    shortest: int  # tokens of the shortest prompts that it serves here: shorter ones are far below its knee


SETUPS = (
    Setup("Llama2-7B", "experiments.paper_models:LLAMA2_7B_32K", 1, 1),
    Setup("Yi-34B", "yi-34b-200k", 2, 512),
    Setup("Llama3.1-70B", "llama3.1-70b", 4, 512),
)
WHICH = flags.DEFINE_multi_enum("setup", [s.name for s in SETUPS], [s.name for s in SETUPS], "Models.")
POLICIES = {
    BASELINE: "policy=vllm_v0",
    "vllm_v0, swap": "policy=vllm_v0,preemption=swap",
    LAYERKV: "policy=layerkv",
    NO_RULE: "policy=layerkv,layerkv_slo_rule=false",
    "layerkv, TPOT alone": "policy=layerkv,layerkv_weigh_ttft=false",  # the rule as the paper writes it
    "layerkv, more streams": "policy=layerkv,layerkv_stream=hidden",
    "paged_park": "policy=paged_park",
    "chunked": "policy=chunked",
    "vllm_v1, sjf": "policy=vllm_v1,order=sjf",
}
LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.1, 1.25, OVERLOAD)  # of the sweep over rates, times capacity
FILE, TABLES, ENVIRONMENT, FIGURE = "layerkv_paper.json", "tables.txt", "environment.json", "ttft"
Capacities = dict[tuple[str, int], float]  # by (setup, context): requests/s


def point(setup: Setup, policy: str, context: int, rate: float, num: int | None = None) -> Point:
    """A run of `num` requests (default --num_requests)."""
    output = OUTPUT.value
    engine = f"{POLICIES[policy]},{MACHINE},tensor={setup.tensor},max_context={context + output}"
    load = f"synthetic:num={num or NUM.value},rate={rate:g},prompt=fixed:{context},output=fixed:{output}"
    return Point(setup.model, engine, load, slo=SLO)


def setups() -> list[Setup]:
    """Those of --setup."""
    return [setup for setup in SETUPS if setup.name in WHICH.value]


def contexts(setup: Setup) -> list[int]:
    """Those of --prompt_tokens that a setup serves, with the one that rates are swept at."""
    return sorted({PAPER_CONTEXT, *(c for c in CONTEXTS.value if c >= setup.shortest)})


def measure_capacities() -> tuple[Capacities, Capacities]:
    """By (setup, context), under the baseline: requests/s when all come at once, and milliseconds to the first token of
    a request that is alone. The paper's point is always among them."""
    places = [(setup, context) for setup in setups() for context in contexts(setup)]
    places = list(dict.fromkeys([(SETUPS[0], PAPER_CONTEXT), *places]))
    runs = {}
    for setup, context in places:
        runs[setup.name, context, "full"] = over_seeds(point(setup, BASELINE, context, SATURATED[1], SATURATED[0]), 1)
        runs[setup.name, context, "alone"] = over_seeds(point(setup, BASELINE, context, 1.0, 1), 1)
    cells = run_all(runs)
    capacity = {(s.name, c): mean(cells[s.name, c, "full"], "request_throughput") for s, c in places}
    return capacity, {(s.name, c): mean(cells[s.name, c, "alone"], "mean_ttft_ms") for s, c in places}


def rates(capacity: Capacities, alone: Capacities) -> dict[str, dict[int, list[float]]]:
    """By setup and context: the rates to run."""
    reference = capacity[SETUPS[0].name, PAPER_CONTEXT]
    found: dict[str, dict[int, list[float]]] = {}
    for setup in setups():
        own = rounded_rate(PAPER_RATE * capacity[setup.name, PAPER_CONTEXT] / reference)
        found[setup.name] = {context: [own] for context in contexts(setup)}
        feasible = [c for c in contexts(setup) if c <= PAPER_CONTEXT and alone[setup.name, c] <= SLO_TTFT_MS]
        for context in {PAPER_CONTEXT, max(feasible, default=PAPER_CONTEXT)}:
            found[setup.name][context] += [rounded_rate(load * capacity[setup.name, context]) for load in LOADS]
    return found


def rounded_rate(rate: float) -> float:
    """To three digits, so that a point's text says it exactly."""
    return float(f"{rate:.3g}")


def run_places() -> list[Place]:
    """Everything: every policy at every place."""
    capacity, alone = measure_capacities()
    runs, places = {}, []
    for setup in setups():
        for context, own in rates(capacity, alone)[setup.name].items():
            for rate in dict.fromkeys(own):
                places.append((setup, context, rate))
                for policy in POLICIES:
                    runs[setup.name, context, rate, policy] = over_seeds(point(setup, policy, context, rate))
    cells = run_all(runs)
    return [
        Place(
            setup.name,
            context,
            rate,
            rate / capacity[setup.name, context],
            alone[setup.name, context],
            alone[setup.name, context] <= SLO_TTFT_MS,
            {policy: cells[setup.name, context, rate, policy] for policy in POLICIES},
        )
        for setup, context, rate in places
    ]


def table_of(place: Place) -> str:
    """A line per policy, under a line about the place."""
    marks = [] if place.feasible else ["infeasible: a request alone misses the TTFT objective"]
    marks += ["below the knee"] if place.calm else []
    if worse := losses(place.cells[LAYERKV], place.cells[BASELINE]):
        marks.append(f"layerkv loses in {', '.join(worse)}")
    title = f"{place.words}: load {place.load:.2f}, alone {place.isolated_ms:,.0f} ms"
    rows = [[policy, *figures(cell, place.cells[BASELINE])] for policy, cell in place.cells.items()]
    return "\n".join(["; ".join([title, *marks]), format_table(["policy", *seeded.HEADER], rows)])


def text_of(places: Sequence[Place], judged: Sequence[Gate]) -> str:
    """All tables and the gates."""
    return "\n\n".join([*map(table_of, places), gate_table(judged)])


def record_of(places: Sequence[Place], judged: Sequence[Gate]) -> dict[str, Any]:
    """What follows from the code and the flags alone."""
    setting = {"num": NUM.value, "output": OUTPUT.value, "seeds": seeded.SEEDS.value, "slo": SLO, "machine": MACHINE}
    points = {s.name: to_dict(point(s, LAYERKV, PAPER_CONTEXT, PAPER_RATE).config) for s in setups()}
    return setting | {
        "policies": POLICIES,
        "engine": points,
        "gates": [dataclasses.asdict(gate) for gate in judged],
        "places": [rounded_values(dataclasses.asdict(place)) for place in places],
    }


def draw(places: Sequence[Place], stem: Path) -> str | None:
    """The figure's path, or None after saying why there is none."""
    try:
        layerkv_figure.draw(places, SETUPS[0].name, stem)
    except ConfigError as e:
        print(f"no figure: {e}")
        return None
    return f"{stem}.png"


def main() -> int:
    """The program."""
    out = claim(common_flags.out_directory("layerkv_paper"), common_flags.OVERWRITE.value, (FILE, TABLES))
    start = time.perf_counter()
    places = run_places()
    judged = gates(places, SETUPS[0].name)
    text = text_of(places, judged)
    print(text)
    write_whole(out / TABLES, text + "\n")
    write_whole(out / FILE, json.dumps(record_of(places, judged), separators=(",", ":")) + "\n")
    seconds = round(time.perf_counter() - start, 1)
    write_whole(out / ENVIRONMENT, json.dumps(environment.describe() | {"seconds": seconds}, indent=1) + "\n")
    figure = draw(places, out / FIGURE)
    best = {s.name: rounded(max(_gain(p) for p in places if p.model == s.name)) for s in setups()}
    line = {"bench": "layerkv_paper", "places": len(places), "largest_gain": best, "seconds": seconds}
    print(json.dumps(line | {"figure": figure, "gates": {gate.name: gate.passed for gate in judged}}))
    return 0


def _gain(place: Place) -> float:
    return seeded.lower_by(place.cells[LAYERKV], place.cells[BASELINE])[0]


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
