"""The knobs of `--policy=layerkv`: each switches one mechanism off, or chooses what replaces it. No JAX here."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError

RETENTIONS = ("spare", "minimum", "select_n", "orbitflow")
PATTERNS = ("interleave", "prefix", "suffix", "random", "interval")
STREAMS = ("urgent", "hidden", "always", "never")
LENGTHS = ("quantile", "bucket", "mean", "oracle")
TIMES = ("online", "model")
LOST = ("ignore", "block")


def _require(ok: bool, what: str) -> None:
    if not ok:
        raise ConfigError(f"layerkv {what}")


@dataclass(frozen=True)
class LayerKVConfig:
    """LayerKV (arXiv 2410.00428) as reconstructed, and what is ours. Seconds, tokens and shares as said."""

    layerwise: bool = True  # False: a request is admitted when all its layers fit, as by a request-level allocator
    chunked: bool = False  # True: prompts are computed in chunks under the token budget, beside decodes
    # How many layers a new request keeps: spare: x of Eqs 3-4, and more while pages are free | minimum: x | select_n,
    # orbitflow: by what its decode steps can fetch (`retention.py`).
    retain: str = "spare"
    retained_layers: int | None = None  # so many, whatever the rule says
    pattern: str = "interleave"  # which layers
    overlap: bool = True  # False: nothing is computed after a prefill until its copies have landed
    stream: str = "urgent"  # parked rows that decode: those that must | hidden: or cost no time | always | never
    append_pages: int = 1  # full pages of a parked layer that gather on the device before they follow to the host
    slo_rule: bool = True  # False: prompts are admitted whatever becomes of TPOT
    tpot_slo: float = 0.2  # seconds per output token that running requests may take on average
    # Prompts that would be late, and requests that were, count in the rule (ours). False: the rule knows TPOT alone.
    weigh_ttft: bool = True
    ttft_slo: float = 3.0  # seconds to the first token
    lost: str = "ignore"  # requests that miss it anyway do not count (ours) | block: they do, as Eq 2 is written
    lengths: str = "quantile"  # who foresees output lengths
    length_quantile: float = 0.5
    length_accuracy: float = 0.85  # of `bucket`
    times: str = "online"  # step times: fitted to what was seen | model: those of the virtual clock itself
    forecast: bool = True  # False: layers leave when pages are lacking, not before
    horizon: int = 64  # decode steps that the forecast looks ahead
    low_watermark: float = 0.0  # share of the pages: below it layers leave
    high_watermark: float = 0.01  # above it they come home

    def __post_init__(self):
        for name, known in (
            ("retain", RETENTIONS),
            ("pattern", PATTERNS),
            ("stream", STREAMS),
            ("lost", LOST),
            ("lengths", LENGTHS),
            ("times", TIMES),
        ):
            value = getattr(self, name)
            _require(value in known, f"{name} {value!r}; known: {', '.join(known)}")
        x, low, high = self.retained_layers, self.low_watermark, self.high_watermark
        _require(x is None or x >= 0, f"retained_layers must be >= 0, got {x}")
        _require(self.append_pages >= 1, f"append_pages must be >= 1, got {self.append_pages}")
        _require(self.tpot_slo > 0, f"tpot_slo must be > 0 seconds, got {self.tpot_slo}")
        _require(self.ttft_slo > 0, f"ttft_slo must be > 0 seconds, got {self.ttft_slo}")
        _require(0 < self.length_quantile < 1, f"length_quantile must be in (0, 1), got {self.length_quantile}")
        _require(0 < self.length_accuracy <= 1, f"length_accuracy must be in (0, 1], got {self.length_accuracy}")
        _require(self.horizon >= 1, f"horizon must be >= 1 step, got {self.horizon}")
        _require(0 <= low <= high < 1, f"watermarks must be 0 <= low <= high < 1, got {low} and {high}")
