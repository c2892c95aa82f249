"""`azure:FILE` replays the Azure 2023 LLM inference trace; `azure-like` draws from that hour's quantiles.

Source: Azure Public Dataset, AzureLLMInferenceTrace_conv.csv (one hour of 2023-11-16, 19,366 conversation requests,
CC-BY 4.0), published with Patel et al., "Splitwise", ISCA 2024. `azure:FILE` wants the file; `azure-like` needs only
the figures below, so it runs anywhere.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import numpy as np

from engine.errors import WorkloadError
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.synthetic import token_seeds

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
EPOCH = datetime.datetime(2023, 11, 16)
DEFAULT_NUM = 100
GAPS, CONTEXTS, OUTPUTS = range(10, 13)  # random streams

# Quantiles of the conversation hour, computed from the file. A draw is a uniform number looked up in a table with
# linear interpolation (inverse CDF).
PROBABILITIES = (
    0, 0.01, 0.02, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.40, 0.50,
    0.60, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95, 0.98, 0.99, 0.999, 1,
)  # fmt: skip
GAP_SECONDS = (
    0, 0.0005, 0.0014, 0.0063, 0.0161, 0.0264, 0.0365, 0.0483, 0.0607, 0.0873, 0.1184,
    0.1587, 0.2136, 0.2467, 0.2888, 0.3459, 0.4207, 0.5652, 0.7493, 0.8897, 1.4112, 4.3146,
)  # fmt: skip
CONTEXT_TOKENS = (
    2, 29, 91, 181, 207, 372, 387, 396, 403, 703, 1020,
    1071, 1130, 1189, 1315, 1876, 2734, 4083, 4098, 4142, 6179, 14050,
)  # fmt: skip
MEAN_RATE = 5.53  # requests/s over the hour; the gaps' coefficient of variation is 1.09

# Context and output are nearly uncorrelated in rank (Spearman 0.07) but far from independent: contexts of 900 to 1200
# tokens answer with about 400, the longest with about 50. So outputs are drawn per class of context. What is dropped:
# the slow drift of the rate (190 to 510 requests a minute over the hour).
OUTPUT_PROBABILITIES = (0, 0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95, 0.99, 1)
CONTEXT_EDGES = (0, 300, 450, 900, 1200, 1500, 3900)  # lower edges of the classes, tokens
OUTPUT_TOKENS = (
    (11, 14, 50, 94, 152, 183, 217, 217, 273, 1000),
    (7, 51, 62, 81, 93, 106, 129, 144, 175, 436),
    (10, 41, 51, 80, 96, 121, 394, 413, 456, 739),
    (27, 91, 373, 392, 404, 427, 482, 551, 652, 1000),
    (26, 52, 68, 124, 178, 376, 415, 440, 593, 954),
    (15, 43, 49, 65, 88, 115, 144, 161, 206, 594),
    (17, 29, 34, 41, 54, 77, 117, 149, 281, 757),
)


@register("azure-like")
def azure_like(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Requests [0, window.end) with the gaps, contexts and outputs of the conversation hour; `rate=` sets requests/s.

    Raises:
      WorkloadError: an option out of range.
    """
    if file is not None:
        raise options.error(f"azure-like reads no file (azure:FILE does), got {file!r}")
    n = window.end(DEFAULT_NUM)
    rate = options.number("rate", MEAN_RATE)

    def uniform(stream: int) -> np.ndarray:
        return np.random.default_rng([window.seed, stream]).random(n)

    gaps = np.interp(uniform(GAPS), PROBABILITIES, GAP_SECONDS)
    gaps /= rate * np.trapezoid(GAP_SECONDS, PROBABILITIES)  # the mean of an inverse CDF is its integral
    contexts = np.rint(np.interp(uniform(CONTEXTS), PROBABILITIES, CONTEXT_TOKENS)).astype(int)
    draws = uniform(OUTPUTS)
    by_class = np.stack([np.rint(np.interp(draws, OUTPUT_PROBABILITIES, table)) for table in OUTPUT_TOKENS])
    outputs = by_class[np.searchsorted(CONTEXT_EDGES, contexts, side="right") - 1, np.arange(n)].astype(int)
    rows = zip(np.cumsum(gaps).tolist(), contexts.tolist(), outputs.tolist(), token_seeds(n, window.seed), strict=True)
    return [WorkloadRequest(str(i), t, c, o, s) for i, (t, c, o, s) in enumerate(rows)]


@register("azure")
def azure(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Reads the trace up to the last wanted row; arrivals count from the first row.

    Raises:
      WorkloadError: no such file, or a malformed row (file:line, column, what was expected).
    """
    if file is None:
        raise options.error("azure needs a file: azure:FILE.csv")
    end = None if window.num is None else window.start + window.num
    rows = read_csv(Path(file), end)
    seeds = token_seeds(len(rows), window.seed)
    return [WorkloadRequest(str(i), *row, s) for i, (row, s) in enumerate(zip(rows, seeds, strict=True))]


def read_csv(path: Path, num_rows: int | None = None) -> list[tuple[float, int, int]]:
    """(arrival in seconds after the first row, context tokens, generated tokens) of the first `num_rows` rows.

    Timestamps are UTC with a 100 ns fraction; the last line may lack its newline.

    Raises:
      WorkloadError: see `azure`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise WorkloadError(f"{path}: cannot read the trace: {e}") from None
    if not lines or tuple(lines[0].strip().split(",")) != COLUMNS:
        raise WorkloadError(f"{path}:1: expected the header {','.join(COLUMNS)!r}, got {(lines or [''])[0][:80]!r}")
    rows: list[tuple[float, int, int]] = []
    first = 0.0
    for number, line in enumerate(lines[1:], 2):
        if num_rows is not None and len(rows) == num_rows:
            break
        where = f"{path}:{number}"
        fields = line.strip().split(",")
        if len(fields) != len(COLUMNS):
            raise WorkloadError(f"{where}: expected {len(COLUMNS)} fields ({','.join(COLUMNS)}), got {line[:80]!r}")
        seconds = _seconds(fields[0], where)
        first = seconds if not rows else first
        arrival = seconds - first
        if rows and arrival < rows[-1][0]:
            raise WorkloadError(f"{where}: field {COLUMNS[0]}: expected a time not before the previous row's")
        rows.append((arrival, _tokens(fields[1], COLUMNS[1], where), _tokens(fields[2], COLUMNS[2], where)))
    return rows


def _seconds(text: str, where: str) -> float:
    """Seconds since EPOCH, the trace's day: small enough for a float64 to keep 100 ns."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(\.\d{1,9})?", text)
    try:
        whole = datetime.datetime.fromisoformat(match[1]) if match else None
    except ValueError:
        whole = None
    if match is None or whole is None:
        raise WorkloadError(f"{where}: field {COLUMNS[0]}: expected YYYY-MM-DD HH:MM:SS.fffffff, got {text!r}")
    return (whole - EPOCH).total_seconds() + float(match[2] or 0)


def _tokens(text: str, column: str, where: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise WorkloadError(f"{where}: field {column}: expected an integer >= 1, got {text!r}")
    return int(text)
