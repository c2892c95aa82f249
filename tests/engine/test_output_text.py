"""Stop strings in growing text against a search after every character of the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.output_text import OutputText
from engine.tokenizer import Detokenizer, load_tokenizer


class Pieces:
    """A tokenizer whose token i is the i-th of a list of byte strings."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def decode(self, ids) -> str:
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")

    def stream(self) -> Detokenizer:
        return Detokenizer(self)


def expected(text: str, stops, first: int = 0) -> tuple[str, str | None]:
    """(text shown, stop string): checks every beginning of the text, from the shortest that may stop."""
    for end in range(first + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(tokenizer, ids, stops, min_tokens=0):
    """Feeds tokens until one stops. (text, stop string, tokens used, what was shown after each)."""
    out, shown = OutputText(tokenizer, tuple(stops)), []
    for n, token in enumerate(ids, 1):
        stop = out.add(token, last=n == len(ids), may_stop=n > min_tokens)
        shown.append(out.text)
        if stop is not None:
            return out.text, stop, n, shown
    return out.text, None, len(ids), shown


STOPS = st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(st.text("abé😀", max_size=14), STOPS, st.data())
def test_any_text_cut_anywhere(text, stops, data):
    """Text cut into tokens between any two bytes: the same end, at the token that completes it, and nothing is ever
    shown that is taken back."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    got, stop, used, shown = feed(Pieces(pieces), range(len(pieces)), stops)
    want, want_stop = expected(text, stops)
    assert (got, stop) == (want, want_stop)
    assert all(want.startswith(s) for s in shown)
    if stop is not None:  # not before its last byte
        completed = len((want + stop).encode())
        assert sum(map(len, pieces[:used])) >= completed


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8), STOPS, st.integers(0, 8))
def test_min_tokens(pieces, stops, min_tokens):
    """A match that ends among the first tokens does not count; one that begins there and ends later does."""
    first = len("".join(pieces[:min_tokens]))
    got, stop, used, shown = feed(Pieces([p.encode() for p in pieces]), range(len(pieces)), stops, min_tokens)
    assert (got, stop) == expected("".join(pieces), stops, first)
    assert stop is None or used > min_tokens
    assert all(got.startswith(s) for s in shown)


def test_only_what_may_begin_a_stop_string_is_held_back():
    """Not a fixed number of characters: text that no stop string begins with is shown at once."""
    *_, shown = feed(Pieces([b"so ", b"end", b" <e", b"nd", b" <", b"end>", b"!"]), range(7), ["<end>"])
    assert shown == ["so ", "so end", "so end ", "so end ", "so end <end ", "so end <end "]


def test_half_a_character_at_the_end_is_shown_like_any_text():
    """U+FFFD when the output ends there, or breaks off."""
    tokenizer = Pieces([b"ab", "é".encode()[:1]])
    assert feed(tokenizer, [0, 1], ["bc"])[0] == "ab\ufffd"
    broken = OutputText(tokenizer, ("bc",))
    assert [broken.add(0), broken.add(1), broken.text] == [None, None, "a"]
    broken.close()
    assert broken.text == "ab\ufffd"


@pytest.mark.parametrize("make", ["byte_level", "byte_fallback"])
def test_real_tokenizers(make, tmp_path):
    """Across tokens and inside the bytes of a character; the text is the decoded text up to the stop string."""
    from tests.engine import test_tokenizer  # skips without the library

    getattr(test_tokenizer, make)(tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    ids = tokenizer.encode("the fox 你好 runs 😀!")
    for stop in ("x 你", "好 r", "😀", "the"):
        text, found, used, _ = feed(tokenizer, ids, [stop, "never"])
        assert (text, found) == (tokenizer.decode(ids).split(stop)[0], stop)
        assert stop in tokenizer.decode(ids[:used]) and stop not in tokenizer.decode(ids[: used - 1])
