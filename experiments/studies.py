"""What `ablate` can run: a study is a value, made of cases (settings) and loads (requests, and what belongs to them).

Every study is on the point of LayerKV's figure 1 where queueing begins to rule, Llama2-7B on one L20, or around it. The
first case of a study is the one that the others are compared with. A case says what stands in for what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from experiments.gates import Gate
from experiments.paper_models import MACHINE, SLO
from experiments.points import Point
from experiments.seeded import Cell, mean, throughput_ratio

MODEL = "experiments.paper_models:LLAMA2_7B_32K"
LINK_GBS = 25  # of the L20
OUTPUT = 450

Cells = dict[tuple[str, str], Cell]  # by load and case


@dataclass(frozen=True)
class Case:
    """Settings under comparison."""

    name: str
    engine: str  # settings over those of the study and the load
    instead: str = ""  # what stands in for what is left out, or what is special


@dataclass(frozen=True)
class Load:
    """Requests, and settings that belong to them."""

    name: str
    workload: str
    engine: str = ""


@dataclass(frozen=True)
class Study:
    """Every case under every load."""

    name: str
    about: str
    cases: tuple[Case, ...]
    loads: tuple[Load, ...]
    judge: Callable[[Study, Cells], list[Gate]] | None = None

    def points(self) -> dict[tuple[str, str], Point]:
        """By load and case; without seeds."""
        return {
            (load.name, case.name): Point(MODEL, joined(MACHINE, load.engine, case.engine), load.workload, slo=SLO)
            for load in self.loads
            for case in self.cases
        }


STUDIES: dict[str, Study] = {}


def add(study: Study) -> None:
    """Makes it known by its name."""
    STUDIES[study.name] = study


def joined(*texts: str) -> str:
    """Settings one over the other; of those with the same name the last one counts."""
    return ",".join(text for text in texts if text)


def fixed(context: int, rate: float, extra: str = "", name: str = "") -> Load:
    """100 requests of one length, as in the paper."""
    workload = f"synthetic:num=100,rate={rate:g},prompt=fixed:{context},output=fixed:{OUTPUT}"
    return Load(name or f"{context} tokens, {rate:g}/s", workload, joined(f"max_context={context + OUTPUT}", extra))


V0, V0_SWAP = Case("vllm_v0", "policy=vllm_v0"), Case("vllm_v0, swap", "policy=vllm_v0,preemption=swap")
FULL, PAGED_PARK = Case("layerkv", "policy=layerkv"), Case("paged_park", "policy=paged_park")
NO_RULE = Case("layerkv, no SLO rule", "policy=layerkv,layerkv_slo_rule=false")
TPOT_ALONE = Case("layerkv, TPOT alone", "policy=layerkv,layerkv_weigh_ttft=false", "Eqs 1 and 2 as they are written")

# Mechanism, the settings without it, what takes its place.
MECHANISMS = (
    ("layer-wise allocation", "layerkv_layerwise=false", "a request is admitted when all its layers fit"),
    ("interleave", "layerkv_pattern=prefix", "the first layers are retained, the last ones parked"),
    ("prefill overlap", "layerkv_overlap=false", "nothing is computed until the copies of a prefill have landed"),
    ("decode prefetch", "prefetch_depth=0", "a parked layer is fetched when the step has come to it"),
    ("SLO rule", "layerkv_slo_rule=false", "a prompt is admitted as soon as it fits"),
    ("forecast", "layerkv_forecast=false", "layers leave when pages are lacking, and not before"),
)


def without(*left_out: str) -> str:
    """LayerKV's settings without these mechanisms."""
    return joined(FULL.engine, *(settings for name, settings, _ in MECHANISMS if name in left_out))


def _leave_one_out() -> tuple[Case, ...]:
    return (FULL, *(Case(f"- {name}", without(name), instead) for name, _, instead in MECHANISMS), TPOT_ALONE, V0)


def _add_one_in() -> tuple[Case, ...]:
    """Each alone, and each beside layer-wise allocation: most have nothing to act on while no layer is parked."""
    names = [name for name, *_ in MECHANISMS]
    cases = [Case("none of them", without(*names), "as vllm_v0, with its copies to the host")]
    cases += [Case(f"+ {name}", without(*(n for n in names if n != name))) for name in names]
    first, *rest = names
    cases += [Case(f"+ {first} + {name}", without(*(n for n in rest if n != name))) for name in rest]
    return (*cases, FULL)


PRESSURE = (
    fixed(2048, 1.0),
    fixed(4096, 1.0),
    fixed(2048, 1.0, f"link_gbs={LINK_GBS / 10:g}", "2048 tokens, 1/s, a tenth of the link"),
)
add(Study("leave_one_out", "LayerKV with one mechanism replaced", _leave_one_out(), PRESSURE))
add(Study("add_one_in", "one mechanism of LayerKV, all others replaced", _add_one_in(), PRESSURE))

VARIED = "synthetic:num=100,rate={},prompt=fixed:2048,output={},max_output=2000"
add(
    Study(
        "lengths",
        "who foresees output lengths for the SLO rule and the forecast",
        (
            FULL,
            Case("quantile 0.9", "policy=layerkv,layerkv_length_quantile=0.9"),
            Case("mean", "policy=layerkv,layerkv_lengths=mean"),
            *(
                Case(f"bucket {share:g}", f"policy=layerkv,layerkv_lengths=bucket,layerkv_length_accuracy={share:g}")
                for share in (1.0, 0.85, 0.5)
            ),
            Case("oracle", "policy=layerkv,layerkv_lengths=oracle", "an upper bound: it looks at the true lengths"),
            NO_RULE,
            V0,
        ),
        (
            *(
                Load(f"outputs {output}, {rate}/s", VARIED.format(rate, output), "max_context=4048")
                for output in ("uniform:50:850", "lognormal:450:900")
                for rate in ("0.8", "1")
            ),
            *(
                Load(f"ShareGPT lengths, {rate}/s", f"sharegpt-like:num=400,rate={rate}", "max_context=5760")
                for rate in (4, 5)
            ),
        ),
    )
)
add(
    Study(
        "link",
        "the link to the host, as shares of an L20's 25 GB/s",
        (
            V0,
            V0_SWAP,
            FULL,
            Case("layerkv, minimum", "policy=layerkv,layerkv_retain=minimum", "x of Eqs 3-4, though pages are free"),
            NO_RULE,
            PAGED_PARK,
        ),
        tuple(
            fixed(2048, 1.0, f"link_gbs={LINK_GBS * share:g}", f"link x{share:g}")
            for share in (1.0, 0.5, 0.2, 0.1, 0.05)
        ),
    )
)
# Requests/s at 1.2 times what vllm_v0 completes when all come at once, by prompt length (`paper_layerkv` measures it).
AT_LOAD = {128: 4.0, 256: 3.22, 512: 2.16, 1024: 1.31, 2048: 0.726, 4096: 0.38, 8192: 0.198, 16384: 0.0961}
add(
    Study(
        "prompt",
        "prompt lengths at the same load, 1.2 times the baseline's capacity, instead of at the same rate",
        (V0, FULL, NO_RULE, PAGED_PARK),
        tuple(fixed(context, rate) for context, rate in AT_LOAD.items()),
    )
)
add(
    Study(
        "page_size",
        "tokens in a page",
        (V0, FULL),
        tuple(fixed(2048, 1.0, f"page_size={size}", f"{size} tokens in a page") for size in (8, 16, 32, 64, 128)),
    )
)


def costs_nothing(study: Study, cells: Cells) -> list[Gate]:
    """Without pressure LayerKV must be what the baseline is: within 1%, and nothing on the host."""
    found = []
    for load in study.loads:
        ours, first = cells[load.name, FULL.name], cells[load.name, V0.name]
        ttft, tpot = (mean(ours, name) / mean(first, name) for name in ("mean_ttft_ms", "mean_tpot_ms"))
        rate, host = throughput_ratio(ours, first), mean(ours, "peak_host_bytes")
        reached = f"TTFT {ttft:.3f}, TPOT {tpot:.3f}, tok/s {rate:.3f} of the baseline's, {host:,.0f} bytes on the host"
        met = max(ttft, tpot) <= 1.01 and rate >= 0.99 and host == 0
        found.append(Gate(load.name, "TTFT, TPOT <= 1.01, tok/s >= 0.99, host 0", reached, met))
    return found


add(
    Study(
        "no_pressure",
        "workloads that leave pages free all the time",
        (V0, FULL, NO_RULE, PAGED_PARK),
        (fixed(128, 1.0), fixed(256, 1.0), fixed(512, 1.0), fixed(2048, 0.25)),
        costs_nothing,
    )
)


def _combinations() -> tuple[Case, ...]:
    """Baseline and LayerKV next to each other."""
    policies = {
        "whole": ("policy=vllm_v0", "policy=layerkv"),
        "chunked": ("policy=chunked", "policy=layerkv,layerkv_chunked=true,max_num_batched_tokens=512"),
    }
    return tuple(
        Case(f"{prefill} {order} {preemption}{name}", joined(engine, f"order={order}", f"preemption={preemption}"))
        for prefill, engines in policies.items()
        for order in ("fcfs", "sjf", "priority")
        for preemption in ("recompute", "swap")
        for name, engine in zip(("", " + LayerKV"), engines, strict=True)
    )


MIXED = "synthetic:num=100,rate=0.8,prompt=lognormal:2048:4096,output=uniform:100:800,max_prompt=8192,priorities=3"
add(
    Study(
        "combinations",
        "how prompts are computed, whose turn it is, what preemption does, without and with LayerKV",
        _combinations(),
        (Load("mixed lengths and priorities, 0.8/s", MIXED, "max_context=8992"),),
    )
)
