"""What is looked at before a request is taken: its prompt as token ids, and whether it can ever be served. No JAX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.config import ModelConfig
from engine.errors import RequestError
from engine.request import SamplingParams
from engine.stopping import check_stop_strings
from engine.tokenizer import prompt_ids

if TYPE_CHECKING:
    from engine.memory.store import KVStore
    from engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


class Intake:
    """Knows what one engine can serve."""

    def __init__(self, model: ModelConfig, store: KVStore, max_context: int, source: str, simulated: bool):
        self.model, self.store, self.max_context, self.source = model, store, max_context, source
        self.simulated = simulated

    def tokens(self, prompt: Prompt, tokenizer: Tokenizer | None) -> np.ndarray:
        """A prompt as int32 token ids [T].

        Raises:
          RequestError: it is none, or has ids outside the vocabulary.
        """
        ids = prompt_ids(prompt, tokenizer, self.source) if isinstance(prompt, str) else prompt
        try:
            tokens = np.asarray(ids)
        except ValueError:  # rows of different lengths
            raise RequestError("a prompt must be a string or one flat list of token ids") from None
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise RequestError(
                f"a prompt must be a string or a non-empty list of token ids, got {tokens.dtype} {list(tokens.shape)}"
            )
        vocab = self.model.vocab_size
        if tokens.min() < 0 or tokens.max() >= vocab:
            bad = np.flatnonzero((tokens < 0) | (tokens >= vocab))[0]
            raise RequestError(f"token id {tokens[bad]} at position {bad} is outside the vocabulary of {vocab}")
        return tokens.astype(np.int32, copy=tokens.flags.writeable)  # the caller may change what it can write

    def refuse_impossible(
        self, tokens: np.ndarray, params: SamplingParams, max_length: int, tokenizer: Tokenizer | None
    ) -> None:
        """Raises RequestError for what can never be served. `max_length`: of prompt and output together."""
        if len(tokens) >= self.max_context:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; a context of {self.max_context} takes at most "
                f"{self.max_context - 1}"
            )
        vocab = self.model.vocab_size
        for name in ("stop_token_ids", "forced_tokens"):
            bad = [t for t in getattr(params, name) if not 0 <= t < vocab]
            if bad:
                raise RequestError(f"{name} {bad[0]} is outside the vocabulary of {vocab}")
        check_stop_strings(params, tokenizer, self.source)
        if params.logprobs is not None and self.simulated:
            raise RequestError("logprobs: a simulated request has none")
        if (params.logprobs or 0) > vocab:
            raise RequestError(f"logprobs={params.logprobs} is more than the vocabulary of {vocab}")
        if not self.store.can_ever_hold(max_length - 1):  # the last token's KV is never needed
            raise RequestError(
                f"{max_length} tokens (prompt {len(tokens)} + output) never fit the KV pool of "
                f"{self.store.num_pages} pages"
            )
