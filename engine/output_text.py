"""Text of a growing output, cut before the first stop string.

A stop string may begin in one token and end in another, so text that may turn out to be the beginning of one is held
back until later text decides. The result is that of checking after every character, however text falls into tokens: the
match that ends first wins, of these the longest. (Ours; vLLM goes token by token, by the order of `stop`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer


class OutputText:
    """One request's text. `text` may be shown: it never contains a stop string, nor its beginning at the end."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()):
        self._stream, self._stops = tokenizer.stream(), stops
        self.text = ""
        self.new = ""  # what the newest token added to `text`
        self._held = ""  # follows `text`; the beginning of some stop string

    def add(self, token: int, last: bool = False, may_stop: bool = True) -> str | None:
        """Takes the next token and returns the stop string that it completes, if any: nothing may be added after it.

        Args:
          last: the output ends with this token: nothing is held back.
          may_stop: False: stop strings that end in this token do not count (`min_tokens`).
        """
        piece = self._stream.add(token)
        if last:
            piece += self._stream.finish()
        pending = self._held + piece
        matches = self._matches(pending) if may_stop and piece else []
        if matches:
            _, cut, stop = min(matches)
            self.new, self._held = pending[:cut], ""
        else:
            cut = len(pending) - (0 if last else self._undecided(pending))
            stop, self.new, self._held = None, pending[:cut], pending[cut:]
        self.text += self.new
        return stop

    def close(self) -> None:
        """The output breaks off: what was held back is text after all."""
        self.text += self._held + self._stream.finish()
        self._held = ""

    def _matches(self, pending: str) -> list[tuple[int, int, str]]:
        """(end, start, stop string) of each one's first match that ends beyond the text held so far."""
        found = []
        for stop in self._stops:
            start = pending.find(stop, max(0, len(self._held) + 1 - len(stop)))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return found

    def _undecided(self, pending: str) -> int:
        """Length of the longest end of `pending` with which some stop string begins."""
        for n in range(min(len(pending), max(map(len, self._stops), default=1) - 1), 0, -1):
            if any(len(stop) > n and stop.startswith(pending[-n:]) for stop in self._stops):
                return n
        return 0
