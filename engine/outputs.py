"""What users get back: a light view of a request at one moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.logprobs import TokenLogprobs, read_row
from engine.metrics import RequestMetrics
from engine.request import Request

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


class RequestOutput:
    """A request's tokens up to one step. Cheap to make; lists and text are built when asked for."""

    __slots__ = ("_end", "_request", "_start", "_text", "_tokenizer", "finished", "new_text")

    def __init__(self, request: Request, num_new: int, finished: bool, tokenizer: Tokenizer | None):
        self._request, self._end = request, len(request.output)
        self._start, self.finished, self._tokenizer = self._end - num_new, finished, tokenizer
        self._text: str | None = None
        self.new_text: str | None = None  # what this step adds to text that is decoded as it grows (streams, `stop`)
        if request.text is not None:
            self._text, self.new_text = request.text.text, request.text.new if num_new else None

    @property
    def request_id(self) -> str:
        """The id given or made at `add_request`."""
        return self._request.id

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt."""
        return self._request.prompt.tolist()

    @property
    def token_ids(self) -> list[int]:
        """Tokens produced so far."""
        return self._request.output[: self._end]

    @property
    def new_token_ids(self) -> list[int]:
        """Tokens produced in this step."""
        return self._request.output[self._start : self._end]

    @property
    def text(self) -> str | None:
        """The produced tokens as text; None without a tokenizer. Ends before a stop string and, while the request runs,
        before what may become one."""
        if self._text is not None:
            return self._text
        return None if self._tokenizer is None else self._tokenizer.decode(self.token_ids)

    @property
    def finish_reason(self) -> str | None:
        """stop (a stop token or string), length, or abort; None while it runs."""
        return self._request.finish_reason if self.finished else None

    @property
    def stop_reason(self) -> int | str | None:
        """Which of `stop_token_ids` or `stop` ended it; None for the model's own end-of-sequence token, as in vLLM."""
        return self._request.stop_reason if self.finished else None

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """A record for each token, with `SamplingParams.logprobs`."""
        k = self._request.params.logprobs
        if k is None:
            return None
        return [read_row(t, row, k) for t, row in zip(self.token_ids, self._request.logprobs, strict=False)]

    @property
    def logits(self) -> np.ndarray | None:
        """Logits behind each token, float32 [n, V], with `capture_logits`."""
        return np.stack(self._request.logits[: self._end]) if self._request.logits else None

    @property
    def metrics(self) -> RequestMetrics:
        """Times of the request so far, in seconds."""
        return RequestMetrics.from_request(self._request)

    def __repr__(self) -> str:
        return f"RequestOutput({self.request_id!r}, token_ids={self.token_ids}, finish_reason={self.finish_reason!r})"
