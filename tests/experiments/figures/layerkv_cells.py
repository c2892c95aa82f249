"""Cells made by hand, as the figures of LayerKV see them."""

from experiments.figures.base import Figure, Verdict
from experiments.figures.layerkv.setting import VLLM
from experiments.seeded import VALUES, Cell


def cell(ttft: float | list[float] = 1000.0, **given: float | list[float]) -> Cell:
    """Two seeds; a number stands for both. The rest of `VALUES` is 100, all objectives are met."""
    values = dict.fromkeys(VALUES, 100.0) | {"mean_ttft_ms": ttft, "p99_ttft_ms": ttft, "slo_attainment": 1.0} | given
    return {name: value if isinstance(value, list) else [value] * 2 for name, value in values.items()}


def cells_of(figure: Figure, capacity: float, policies: dict[str, Cell] | None = None) -> dict:
    """Of each point of a figure: what `policies` say, by what its key ends with. The baseline completes `capacity`
    requests/s when all come at once; what is not said is a plain `cell`."""
    known = policies or {}
    found = {key: known.get(key[-1] if isinstance(key, tuple) else key, cell()) for key in figure.points("sim")}
    full = cell(request_throughput=capacity)
    return {key: full if "full" in (key, key[0] if isinstance(key, tuple) else key) else c for key, c in found.items()}


def judged(figure: Figure, cells: dict) -> dict[str, Verdict]:
    """Its verdicts, by the first words of their names."""
    return {verdict.name: verdict for verdict in figure.evaluate(cells, "sim").verdicts}


def failed(figure: Figure, cells: dict) -> list[str]:
    """The names of those that missed."""
    return [name for name, verdict in judged(figure, cells).items() if verdict.passed is False]


def baseline(ttft: float | list[float] = 30_000.0, **given: float | list[float]) -> dict[str, Cell]:
    """vLLM's cell, by its name."""
    return {VLLM: cell(ttft, **given)}
