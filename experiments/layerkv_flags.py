"""`--layerkv_<knob>`: the fields of `LayerKVConfig` as flags. Imports no JAX."""

from __future__ import annotations

from absl import flags

from engine.scheduler.layerkv.config import LENGTHS, LOST, PATTERNS, RETENTIONS, STREAMS, TIMES, LayerKVConfig

DEFAULTS = LayerKVConfig()


def _bool(name: str, words: str) -> flags.FlagHolder:
    return flags.DEFINE_bool(f"layerkv_{name}", getattr(DEFAULTS, name), words)


def _enum(name: str, known: tuple[str, ...], words: str) -> flags.FlagHolder:
    return flags.DEFINE_enum(f"layerkv_{name}", getattr(DEFAULTS, name), known, words)


def _float(name: str, words: str) -> flags.FlagHolder:
    return flags.DEFINE_float(f"layerkv_{name}", getattr(DEFAULTS, name), words)


def _integer(name: str, words: str) -> flags.FlagHolder:
    return flags.DEFINE_integer(f"layerkv_{name}", getattr(DEFAULTS, name), words)


LAYERKV: tuple[flags.FlagHolder, ...] = (
    _bool("layerwise", "False: a request is admitted when all its layers fit."),
    _bool("chunked", "Prompts are computed in chunks under the token budget, beside decodes."),
    _enum(
        "retain",
        RETENTIONS,
        "How many layers a new request keeps: while pages are free, the fewest, or by other rules.",
    ),
    _integer("retained_layers", "So many layers, whatever the rule says."),
    _enum("pattern", PATTERNS, "Which layers are parked."),
    _bool("overlap", "False: nothing is computed after a prefill until its copies have landed."),
    _enum(
        "stream",
        STREAMS,
        "Parked rows that decode: those that must, also those that hide under the step, all that fit, or none.",
    ),
    _integer("append_pages", "Full pages of a parked layer that gather on the device before they follow to the host."),
    _bool("slo_rule", "False: prompts are admitted whatever becomes of running requests."),
    _float("tpot_slo", "Seconds per output token that running requests may take on average."),
    _bool("weigh_ttft", "False: the rule knows TPOT alone, and not who would be late, or was."),
    _float("ttft_slo", "Seconds to the first token, for the rule."),
    _enum("lost", LOST, "Running requests that cannot meet it any more: ignored, or as Eq 2 is written."),
    _enum("lengths", LENGTHS, "Who foresees output lengths."),
    _float("length_quantile", "Of what was left of finished outputs, for lengths=quantile."),
    _float("length_accuracy", "Share of outputs that lengths=bucket puts into the right bucket."),
    _enum("times", TIMES, "Step times: fitted to what was seen, or those of the virtual clock itself."),
    _bool("forecast", "False: layers leave when pages are lacking, not before."),
    _integer("horizon", "Decode steps that the forecast looks ahead."),
    _float("low_watermark", "Share of the pages below which layers leave."),
    _float("high_watermark", "Share of the pages above which they come home."),
)
