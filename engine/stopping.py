"""What ends a request besides its length: stop tokens, the model's own and the caller's, and stop strings.

`min_tokens` holds all of them back, as in vLLM: stop tokens cannot be drawn (they are masked on the device by token
index alone, so also when results are known late) and strings that end among those tokens do not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.config import ModelConfig
from engine.errors import RequestError
from engine.request import Request, SamplingParams
from engine.scheduler.sampling_rows import MAX_STOP_IDS
from engine.tokenizer import no_tokenizer

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


def stop_ids(params: SamplingParams, model: ModelConfig) -> frozenset[int]:
    """Tokens that end the request.

    Raises:
      RequestError: more than `min_tokens` can hold back.
    """
    ids = frozenset((*params.stop_token_ids, *(() if params.ignore_eos else model.eos_token_ids)))
    if params.min_tokens and len(ids) > MAX_STOP_IDS:
        raise RequestError(f"min_tokens holds back at most {MAX_STOP_IDS} stop tokens, got {len(ids)}")
    return ids


def check_stop_strings(params: SamplingParams, tokenizer: Tokenizer | None, source: str) -> None:
    """Raises RequestError for stop strings without a tokenizer. source: directory or preset, for the message."""
    if params.stop and tokenizer is None:
        raise no_tokenizer("stop strings need", source, "use stop_token_ids")


def end_reason(request: Request) -> str | None:
    """Why the newest token of `request.output` ends it: "stop" or "length"; None when it goes on.

    Decodes the token of a request with `text` and notes in `stop_reason` what stopped it.
    """
    p, token = request.params, request.output[-1]
    held_back = len(request.output) <= p.min_tokens  # forced tokens can be stop tokens
    end = "length" if request.num_tokens >= request.max_length else None
    if token in request.stop_ids and not held_back:
        end = "stop"
    stop: int | str | None = None
    if request.text is not None:
        stop = request.text.add(token, last=end is not None, may_stop=not held_back)
    if end == "stop":  # a stop token goes before a string that it completes
        stop = token if token in p.stop_token_ids else None
    request.stop_reason = stop
    return end if stop is None else "stop"
