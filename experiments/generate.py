"""Generates from one prompt, streaming.

    python -m experiments.generate --model=DIR --prompt="The capital of France is" --temperature=0.7
    python -m experiments.generate --model=tiny-1m --prompt_ids=1,2,3

Text goes to stdout as it is produced (token ids when the model has no tokenizer); one line with TTFT and tokens/s ends
it on stderr. Includes compiling what the request needs, unless --warmup compiles every bucket first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from absl import flags

from engine.errors import ConfigError, RequestError
from engine.metrics import RequestMetrics
from engine.request import SamplingParams
from experiments import common_flags

if TYPE_CHECKING:
    from engine import RequestOutput

PROMPT = flags.DEFINE_string("prompt", None, "Text; needs the model's tokenizer.json and the `hf` extra.")
PROMPT_IDS = flags.DEFINE_list("prompt_ids", None, "Token ids, such as 1,2,3.")
MAX_TOKENS = flags.DEFINE_integer("max_tokens", SamplingParams().max_tokens, "Tokens to produce at most.")
TEMPERATURE = flags.DEFINE_float("temperature", SamplingParams().temperature, "0: greedy.")
TOP_K = flags.DEFINE_integer("top_k", SamplingParams().top_k, "Keep the k most likely tokens; 0: all.")
MIN_P = flags.DEFINE_float("min_p", SamplingParams().min_p, "Drop tokens below this share of the most likely one.")
TOP_P = flags.DEFINE_float("top_p", SamplingParams().top_p, "Keep the most likely tokens with this mass.")
SAMPLING_SEED = flags.DEFINE_integer("sampling_seed", None, "Of the request. Default: derived from --seed.")
MIN_TOKENS = flags.DEFINE_integer("min_tokens", SamplingParams().min_tokens, "No stop among the first ones.")
STOP = flags.DEFINE_multi_string("stop", [], "A string that ends the output; may be repeated.")
LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Print log-probabilities: each token's, and those of this many rivals."
)
STOP_IDS = flags.DEFINE_list("stop_ids", [], "Token ids that end the output, besides the model's own.")
IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Do not stop at the model's end-of-sequence tokens.")
WARMUP = flags.DEFINE_bool("warmup", False, "Compile every bucket before the request.")


def prompt_from_flags() -> str | list[int]:
    """--prompt or --prompt_ids.

    Raises:
      ConfigError: both or neither, or an id that is no integer.
    """
    text, ids = PROMPT.value, PROMPT_IDS.value
    if text is not None and ids is None:
        return text
    if ids is not None and text is None:
        return token_ids("prompt_ids", ids)
    raise ConfigError("give a prompt by exactly one of --prompt and --prompt_ids")


def params_from_flags() -> SamplingParams:
    """The request's sampling parameters.

    Raises:
      ConfigError: a value out of range.
    """
    return SamplingParams(
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        seed=SAMPLING_SEED.value,
        max_tokens=MAX_TOKENS.value,
        min_tokens=MIN_TOKENS.value,
        stop_token_ids=tuple(token_ids("stop_ids", STOP_IDS.value)),
        stop=tuple(STOP.value),
        ignore_eos=IGNORE_EOS.value,
        logprobs=LOGPROBS.value,
    )


def token_ids(flag: str, items: list[str]) -> list[int]:
    """Integers of a list flag.

    Raises:
      ConfigError: an item that is none.
    """
    try:
        return [int(item) for item in items]
    except ValueError:
        raise ConfigError(f"--{flag} must be token ids such as 1,2,3, got {','.join(items)!r}") from None


def speed_line(m: RequestMetrics) -> str:
    """TTFT and decode speed of one request."""
    decode = f", decode {1 / m.tpot_s:.1f} tokens/s" if m.tpot_s else ""
    return f"{m.num_prompt_tokens} prompt tokens, {m.num_output_tokens} produced: TTFT {m.ttft_s or 0:.3f} s{decode}"


def logprob_lines(output: RequestOutput) -> Iterator[str]:
    """One line per token: its id, log-probability and rank, then the most likely tokens."""
    for record in output.logprobs or []:
        rivals = zip(record.top_tokens, record.top_logprobs, strict=True)
        own = f"{record.token} {record.logprob:.4f} rank {record.rank}"
        yield " ".join([own, *(f"{token}:{value:.4f}" for token, value in rivals)])


def main() -> int:
    """The program."""
    model, config = common_flags.required_model(), common_flags.engine_config_from_flags()
    prompt, params = prompt_from_flags(), params_from_flags()
    engine = common_flags.load_engine(model, config)
    if isinstance(prompt, str) and engine.tokenizer is None:
        raise RequestError(f"--prompt is text but {model} has no usable tokenizer.json: give --prompt_ids")
    if WARMUP.value:
        engine.warmup()
    last: RequestOutput | None = None
    try:
        for last in engine.stream(prompt, params):
            print(piece(last), end="", flush=True)
    finally:  # Ctrl-C too: what was produced has been printed
        print(flush=True)
        if last is not None:
            print(*logprob_lines(last), speed_line(last.metrics), sep="\n", file=sys.stderr)
    return 0


def piece(output: RequestOutput) -> str:
    """What a step adds to the print: its text, or token ids when the model has no tokenizer."""
    return output.new_text if output.new_text is not None else "".join(f"{t} " for t in output.new_token_ids)


if __name__ == "__main__":
    common_flags.run_main(main)
