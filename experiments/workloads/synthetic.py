"""`synthetic`: seeded arrivals and lengths from named distributions.

    rate=R                     mean requests/s (default 1)
    arrivals=poisson|gamma|fixed    gamma takes cv=C, the coefficient of variation of the gaps (1 is Poisson)
    prompt=..., output=...     fixed:N | uniform:LOW:HIGH (both included) | lognormal:MEAN:P90
    turns=N, think=S           sessions of N turns; prompt= is what the user adds in each; rate= counts
                               sessions, num= requests

Defaults: 100 requests (more when sessions of N turns are to be whole), Poisson, prompt=fixed:128, output=fixed:64, one
turn. The first request arrives after one gap.
"""

from __future__ import annotations

import math

import numpy as np

from engine.config import cdiv
from engine.errors import WorkloadError
from experiments.workloads import Options, Window, WorkloadRequest, register
from experiments.workloads.sessions import in_sessions, think_seconds

DEFAULT_NUM = 100
Z90 = 1.2815515655446004  # 90th percentile of the standard normal distribution
# Independent random streams, so that changing one option leaves the draws of the others alone.
GAPS, PROMPTS, OUTPUTS, TOKENS = range(4)


@register("synthetic")
def synthetic(file: str | None, options: Options, window: Window) -> list[WorkloadRequest]:
    """Builds the requests [0, window.end), and what is left of the last one's session.

    Raises:
      WorkloadError: an option out of range.
    """
    if file is not None:
        raise options.error(f"synthetic reads no file, got {file!r}")
    turns = options.integer("turns", 1)
    n = cdiv(window.end(DEFAULT_NUM), turns)  # sessions
    arrivals = arrival_times(options, n, window.seed)
    prompts = lengths(options, "prompt", "fixed:128", n * turns, window.seed, PROMPTS).tolist()
    outputs = lengths(options, "output", "fixed:64", n * turns, window.seed, OUTPUTS).tolist()
    seeds = token_seeds(n, window.seed)
    if turns > 1:
        rows = list(zip(prompts, outputs, strict=True))
        talks = [rows[i : i + turns] for i in range(0, n * turns, turns)]
        return in_sessions(arrivals, talks, seeds, think_seconds(options))
    return [WorkloadRequest(str(i), *row) for i, row in enumerate(zip(arrivals, prompts, outputs, seeds, strict=True))]


def token_seeds(n: int, seed: int) -> list[int]:
    """One seed per request for its prompt's token ids; request i has the same one whatever `n` is."""
    return np.random.default_rng([seed, TOKENS]).integers(0, 2**31, n).tolist()


def arrival_times(options: Options, n: int, seed: int) -> list[float]:
    """Seconds from the start of the run to each of `n` arrivals, by the options rate, arrivals and cv."""
    return np.cumsum(_gaps(options, n, seed)).tolist()


def _gaps(options: Options, n: int, seed: int) -> np.ndarray:
    """Seconds between arrivals, float64 [n]."""
    rate = options.number("rate", 1.0)
    process = options.choice("arrivals", ("poisson", "gamma", "fixed"), "poisson")
    cv = options.optional_number("cv")
    if cv is not None and process != "gamma":
        raise options.error(f"cv belongs to arrivals=gamma, not to arrivals={process}")
    if process == "gamma" and cv is None:
        raise options.error("arrivals=gamma needs cv=, the coefficient of variation of the gaps")
    if process == "fixed":
        return np.full(n, 1.0 / rate)
    shape = 1.0 if cv is None else cv**-2  # a gamma of shape 1 is the exponential of a Poisson process
    return np.random.default_rng([seed, GAPS]).gamma(shape, 1.0 / (shape * rate), n)


def lengths(options: Options, name: str, default: str, n: int, seed: int, stream: int) -> np.ndarray:
    """Token counts >= 1 drawn from the distribution that option `name` describes, int64 [n]."""
    text = options.text(name) or default
    kind, *args = text.split(":")
    known = {"fixed": 1, "uniform": 2, "lognormal": 2}
    expected = f"{name} must be fixed:N, uniform:LOW:HIGH or lognormal:MEAN:P90, got {text!r}"
    if kind not in known or len(args) != known[kind]:
        raise options.error(expected)
    try:
        values = [float(a) if kind == "lognormal" else int(a) for a in args]
    except ValueError:
        raise options.error(expected) from None
    if not all(1 <= v < 2**31 for v in values):
        raise options.error(f"{expected}: token counts are >= 1")
    rng = np.random.default_rng([seed, stream])
    if kind == "fixed":
        return np.full(n, int(values[0]), np.int64)
    if kind == "uniform":
        if values[0] > values[1]:
            raise options.error(f"{expected}: LOW is above HIGH")
        return rng.integers(int(values[0]), int(values[1]), n, endpoint=True)
    try:
        mu, sigma = lognormal_parameters(*values)
    except WorkloadError as e:
        raise options.error(f"{name}: {e}") from None
    return np.maximum(1, np.rint(rng.lognormal(mu, sigma, n))).astype(np.int64)


def lognormal_parameters(mean: float, p90: float) -> tuple[float, float]:
    """(mu, sigma) of the log-normal with this mean and 90th percentile.

    mean = exp(mu + sigma^2 / 2) and p90 = exp(mu + z sigma) give sigma^2 / 2 - z sigma + ln(p90 / mean) = 0; of the
    two roots we take the one with the lighter tail.

    Raises:
      WorkloadError: no such distribution (p90 / mean must lie in (1, 2.27]).
    """
    ratio = math.log(p90 / mean)
    if not 0 < ratio <= Z90**2 / 2:
        raise WorkloadError(
            f"no log-normal has mean {mean:g} and P90 {p90:g}: P90 must be above the mean, by at most "
            f"{math.exp(Z90**2 / 2):.2f}x"
        )
    sigma = Z90 - math.sqrt(Z90**2 - 2 * ratio)
    return math.log(mean) - sigma**2 / 2, sigma
