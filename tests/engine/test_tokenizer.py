"""Encoding, decoding and streaming, with the two kinds of tokenizer that Llama-family checkpoints have."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError, WeightsError
from engine.tokenizer import load_tokenizer, prompt_ids

tokenizers = pytest.importorskip("tokenizers")

TEXT = "The quick brown fox — jumps; über 你好, 😀👩‍👩‍👧!"


def byte_level(path):
    """As Llama 3 and Qwen: bytes as tokens, so every character beyond ASCII is split."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 4, trainer)
    _add_bos(backend)
    backend.save(str(path))


def byte_fallback(path):
    """As Llama 2, Yi and Mistral: a space is part of the next word, unknown characters fall back to bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
        "th",
        "▁th",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [("t", "h"), ("▁", "th")], byte_fallback=True, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    normal, dec = tokenizers.normalizers, tokenizers.decoders
    backend.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    backend.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>", "</s>"])
    _add_bos(backend)
    backend.save(str(path))


def _add_bos(backend):
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])


@pytest.fixture(scope="module", params=[byte_level, byte_fallback], ids=lambda make: make.__name__)
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param.__name__)
    request.param(directory / "tokenizer.json")
    return load_tokenizer(directory)


def test_round_trip_with_bos(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.encode("")[0]  # <s>
    assert tokenizer.decode(ids) == TEXT


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list("the fox. éß你好😀‍")), max_size=30))
def test_streamed_pieces_make_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.add(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_half_a_character_waits_and_is_flushed_at_the_end(tokenizer):
    ids = tokenizer.encode("a😀")
    stream = tokenizer.stream()
    assert [stream.add(i) for i in ids[-4:-1]] == ["", "", ""]  # three of the four bytes
    assert set(stream.finish()) == {"\ufffd"}


def test_streaming_emits_as_early_as_it_can(tokenizer):
    stream = tokenizer.stream()
    pieces = [stream.add(i) for i in tokenizer.encode("x y")]
    assert [p for p in pieces if p] in (["x", " ", "y"], ["x", " y"])


def test_prompts(tokenizer):
    assert prompt_ids([5, 6], None, "tiny-1m") == [5, 6]
    assert prompt_ids("fox", tokenizer, "dir") == tokenizer.encode("fox")


def test_text_without_tokenizer_is_one_clear_line(tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(RequestError, match=r"tiny-1m has no tokenizer.json; give token ids"):
        prompt_ids("text", None, "tiny-1m")


def test_text_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    byte_level(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(RequestError, match=r"pip install 'folio\[hf\]'"):
        prompt_ids("text", None, tmp_path)


def test_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(WeightsError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)
