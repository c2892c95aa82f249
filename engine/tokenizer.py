"""Text to token ids and back, through the optional `tokenizers` library. Token ids always work without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from engine.errors import RequestError, WeightsError

FILE = "tokenizer.json"
INSTALL = "pip install 'folio[hf]'"
BROKEN = "\ufffd"  # what decoders put where bytes are not (or not yet) a character


class Tokenizer:
    """A `tokenizer.json`."""

    def __init__(self, backend: Any):
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens (such as bos) that the file's post-processor adds."""
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._backend.decode(list(ids))

    def stream(self) -> Detokenizer:
        """A new incremental detokeniser, for the output of one request."""
        return Detokenizer(self)


class Detokenizer:
    """Text of a growing sequence of tokens, in pieces that never hold half a character.

    What a token adds depends on its neighbours (leading spaces, characters split over tokens), so each step decodes a
    short window: from `_start`, whose text up to `_emitted` has been handed out already, to the newest token.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        self._emitted = 0

    def add(self, token: int) -> str:
        """The text that `token` completes; "" while the last character is incomplete."""
        self._ids.append(token)
        return self._take(final=False)

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that the output broke off in."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._emitted])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(BROKEN) and not final):
            return ""
        self._start, self._emitted = self._emitted, len(self._ids)
        return text[len(before) :]


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a model directory; None without a tokenizer.json or, with a logged line, without the library.

    Raises:
      WeightsError: the file is there but cannot be read.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    try:
        import tokenizers  # pyright: ignore[reportMissingImports]
    except ImportError:
        logging.warning("%s is not used: %s; token ids work without it", path, INSTALL)
        return None
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise WeightsError(f"{path}: not a tokenizer: {error}") from error


def prompt_ids(prompt: str | Sequence[int], tokenizer: Tokenizer | None, model: str | Path) -> list[int]:
    """Token ids of a prompt, given as text or as ids already.

    Args:
      model: directory or preset name, for the error.

    Raises:
      RequestError: text, but the model has no tokenizer or the library is missing.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise no_tokenizer("a text prompt needs", model, "give token ids")
    return tokenizer.encode(prompt)


def no_tokenizer(what: str, model: str | Path, instead: str) -> RequestError:
    """The error for something that needs a tokenizer when there is none: says whether the file or the library is
    missing. `what` ends in a verb."""
    if (Path(model) / FILE).exists():
        return RequestError(f"{what} the tokenizers library: {INSTALL}; or {instead}")
    return RequestError(f"{what} a tokenizer and {model} has no {FILE}; {instead}")
