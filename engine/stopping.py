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

STOP = 1  # the value of `SchedulerState.append` for a request that a stop token ends


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


def account(request: Request, token: int, end: int) -> int:
    """Decodes the newest token of a request with `text` and notes what stopped it.

    Args:
      token: the last of `request.output`.
      end: 0 goes on, 1 stop token, 2 length.

    Returns:
      The same, or 1 when the token completes a stop string.
    """
    p = request.params
    stop: int | str | None = None
    if request.text is not None:
        stop = request.text.add(token, last=bool(end), may_stop=len(request.output) > p.min_tokens)
    if end == STOP:  # a stop token goes before a string that it completes
        stop = token if token in p.stop_token_ids else None
    request.stop_reason = stop
    return end if stop is None else STOP
