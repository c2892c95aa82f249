"""One table of runs and of other engines' bench files, with ratios against the first.

    python -m experiments.compare RUN_A RUN_B vllm.json sglang.jsonl

RUN is a directory that `serve` wrote. A file is what `vllm bench serve --save-result` or SGLang's `bench_serving
--output-file` wrote; of a file with several results each is a row. Workloads must be equal: runs know the hash of
theirs, vLLM files can carry it (`--metadata workload_hash=...`), and a file that does not is marked with `?`. Ends with
one JSON line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from engine.errors import ConfigError
from experiments import common_flags
from experiments.tables import format_table, rounded

DIFFERENT = flags.DEFINE_bool("allow_different_workloads", False, "Compare runs of unequal workloads all the same.")
SCOPE = flags.DEFINE_enum(
    "scope", "all", ["all", "window"], "Figures of our runs: the whole run, as other benches report, or its window."
)

COLUMNS = {
    "request_throughput": "req/s",
    "output_throughput": "tok/s",
    "request_goodput": "goodput",
    "median_ttft_ms": "TTFT ms p50",
    "p99_ttft_ms": "p99",
    "median_tpot_ms": "TPOT ms p50",
    "p99_tpot_ms": "p99",
    "p99_itl_ms": "ITL ms p99",
    "median_e2el_ms": "E2E ms p50",
    "p99_e2el_ms": "p99",
}
COUNTS = {"completed": "done", "failed": "failed", "total_preemptions": "preempted"}  # no ratios
SGLANG = {f"{s}_e2e_latency_ms": f"{s}_e2el_ms" for s in ("mean", "median", "std", "p90", "p95", "p99")}


@dataclass(frozen=True)
class Result:
    """One row: figures under vLLM's names, and the hash of the workload if it is known."""

    name: str
    figures: dict[str, Any]
    workload_hash: str | None


def load(path: Path, scope: str) -> list[Result]:
    """The results of a run's directory or of a bench file.

    Raises:
      ConfigError: it cannot be read, holds no result, or a figure is no number.
    """
    if path.is_dir():
        summary = _objects(path / "summary.json")[0]
        config = _objects(path / "config.json")[0] if (path / "config.json").exists() else {}
        figures = summary if scope == "all" else summary.get("window")
        if figures is None:
            raise ConfigError(f"{path}/summary.json: no window, the run is of an earlier version: use --scope=all")
        engine = config.get("engine", {})
        name = f"{path} (simulated {engine['sim']['device']})" if engine.get("executor") == "sim" else str(path)
        return [_result(name, figures, config.get("workload_hash"))]
    objects = _objects(path)
    results = []
    for number, figures in enumerate(objects, 1):
        if "request_throughput" not in figures:
            raise ConfigError(f"{path}: no request_throughput in result {number}: not a file of a serving bench")
        name = str(path) if len(objects) == 1 else f"{path}:{number}"
        renamed = {SGLANG.get(key, key): value for key, value in figures.items()}
        results.append(_result(name, renamed, figures.get("workload_hash")))
    return results


def _result(name: str, figures: dict[str, Any], workload_hash: Any) -> Result:
    """A row whose figures are numbers, where it has any."""
    for column in (*COUNTS, *COLUMNS):
        value = figures.get(column)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{name}: {column} must be a number, got {str(value)[:80]!r}")
    if workload_hash is not None and not isinstance(workload_hash, str):
        raise ConfigError(f"{name}: workload_hash must be text, got {str(workload_hash)[:80]!r}")
    return Result(name, figures, workload_hash)


def check_workloads(results: list[Result]) -> None:
    """Raises ConfigError, naming both, when two known workload hashes differ."""
    known = [r for r in results if r.workload_hash]
    for other in known[1:]:
        if other.workload_hash != known[0].workload_hash:
            both = " and ".join(f"{r.name} served {str(r.workload_hash)[:12]}" for r in (known[0], other))
            raise ConfigError(f"different workloads: {both}; --allow_different_workloads compares them all the same")


def table(results: list[Result]) -> str:
    """A row per result; after each figure its ratio to the first result's. Columns that nobody has are left out."""
    counts = [c for c in COUNTS if any(r.figures.get(c) is not None for r in results)]
    shown = [c for c in COLUMNS if any(r.figures.get(c) is not None for r in results)]
    header = ["run", "workload", *(COUNTS[c] for c in counts), *(h for c in shown for h in (COLUMNS[c], "x"))]
    rows = []
    for result in results:
        figures: list[Any] = [result.figures.get(c) for c in counts]
        for column in shown:
            figures += [result.figures.get(column), ratio(result, results[0], column)]
        rows.append([result.name, (result.workload_hash or "?")[:8], *figures])
    return format_table(header, rows)


def ratio(result: Result, base: Result, column: str) -> str | None:
    """`result` over `base`, to two digits; None when one is unknown or the base is 0."""
    a, b = result.figures.get(column), base.figures.get(column)
    return None if a is None or not b else f"{a / b:.2f}"


def _objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file: one, or several one after the other (SGLang and vLLM append)."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read, and is no directory of a finished run: {e}") from None
    objects, at = [], 0
    while at < len(text):
        try:
            value, at = json.JSONDecoder().raw_decode(text, at)
        except ValueError as e:
            raise ConfigError(f"{path}: not JSON: {e}") from None
        objects += value if isinstance(value, list) else [value]
        at += len(text[at:]) - len(text[at:].lstrip())
    if not objects or not all(isinstance(o, dict) for o in objects):
        raise ConfigError(f"{path}: expected JSON objects, as a serving bench writes them")
    return objects


def main(paths: list[str]) -> int:
    """The program."""
    if len(paths) < 2:
        raise ConfigError("name at least two runs or bench files; the first is what the others are compared with")
    results = [result for path in paths for result in load(Path(path), SCOPE.value)]
    if not DIFFERENT.value:
        check_workloads(results)
    print(table(results))
    unknown = [r.name for r in results if r.workload_hash is None]
    if unknown:
        print(f"? the workload of {', '.join(unknown)} is not known")
    rows = [
        {"run": r.name, "workload_hash": r.workload_hash} | {c: rounded(r.figures.get(c)) for c in (*COUNTS, *COLUMNS)}
        for r in results
    ]
    print(json.dumps({"bench": "compare", "scope": SCOPE.value, "runs": rows}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, takes="RUN|FILE ...", engine=False)
