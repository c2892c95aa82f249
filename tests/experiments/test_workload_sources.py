"""Protects the readers: what hand-written files mean, that shared prefixes are shared tokens, and errors that name the
line and the field."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from engine.errors import WorkloadError
from experiments.workloads import build, sharegpt
from experiments.workloads.content import Blocks, stream_keys, stream_tokens
from experiments.workloads.frozen import freeze

TRACES = Path(__file__).parents[3] / "shared/traces"
VOCAB = 1000


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lengths(requests):
    return [(r.prompt_len, r.output_len) for r in requests]


def tokens(request):
    return request.prompt_tokens(VOCAB).tolist()


# ---------------------------------------------------------------------------------------------- token streams


def test_streams_are_positional_uniform_and_pinned():
    long, short = (stream_tokens(stream_keys(7), np.arange(n), VOCAB) for n in (100_000, 10))
    assert long[:10].tolist() == short.tolist() and long.dtype == np.int32
    assert np.bincount(long, minlength=VOCAB).min() > 50  # 100 expected, 5 standard deviations
    assert len(set(stream_keys(0, np.arange(1000)).tolist())) == 1000
    # Frozen files depend on these numbers: the first output of splitmix64 with seed 0 is known from its publication.
    assert stream_tokens(np.zeros(1, np.uint64), np.array([0]), 1 << 31).tolist() == [16294208416658607535 >> 33]


# ---------------------------------------------------------------------------------------------- Mooncake


MOONCAKE = (
    {"timestamp": 5000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 2]},
    {"timestamp": 5000, "input_length": 1024, "output_length": 3, "hash_ids": [0, 1]},
    {"timestamp": 6500, "input_length": 600, "output_length": 1, "hash_ids": [0, 9]},
)


@pytest.fixture
def mooncake(tmp_path):
    return write(tmp_path / "trace.jsonl", MOONCAKE)


def test_mooncake_ids_are_tokens(mooncake):
    a, b, c = build(f"mooncake:{mooncake}")
    assert [r.arrival_s for r in (a, b, c)] == [0.0, 0.0, 1.5]
    assert lengths((a, b, c)) == [(1100, 7), (1024, 3), (600, 1)]
    assert len(tokens(a)) == 1100 and tokens(a)[:1024] == tokens(b)
    assert tokens(c)[:512] == tokens(a)[:512] and tokens(c)[512:600] != tokens(a)[512:600]
    assert tokens(build(f"mooncake:{mooncake},seed=1")[0]) != tokens(a)


def test_mooncake_scaled_prompts_share_what_they_shared(mooncake):
    a, b, c = build(f"mooncake:{mooncake},scale_len=0.25")
    assert lengths((a, b, c)) == [(128 * 2 + 19, 2), (256, 1), (128 + 22, 1)]
    assert tokens(a)[:256] == tokens(b) and tokens(c)[:128] == tokens(a)[:128] and tokens(c)[128] != tokens(a)[128]
    clipped = build(f"mooncake:{mooncake},max_prompt=700")
    assert [r.prompt_len for r in clipped] == [700, 700, 600] and tokens(clipped[0]) == tokens(clipped[1])


def test_blocks_scale_to_at_least_one_token():
    assert Blocks((1, 2, 3), 16).scaled(33, 0.01) == (Blocks((1, 2, 3), 1), 3)
    assert Blocks((1, 2), 16).scaled(32, 2.0) == (Blocks((1, 2), 32), 64)


def test_bailian_conversations_are_sessions(tmp_path):
    columns = ("chat_id", "parent_chat_id", "timestamp", "input_length", "output_length", "hash_ids")
    values = (
        (8, -1, 1.0, 20, 4, [1, 2]),
        (9, -1, 1.5, 16, 4, [1]),
        (10, 8, 3.0, 33, 4, [1, 2, 3]),
        (11, 5, 4.0, 3, 4, [7]),
    )
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    path = write(tmp_path / "b.jsonl", rows)
    requests = build(f"bailian:{path},loop=closed,think=0.5")
    assert [(r.session, r.turn, r.think_s) for r in requests] == [
        ("8", 0, None), ("9", 0, None), ("8", 1, 0.5), ("11", 0, None),
    ]  # fmt: skip
    assert [r.arrival_s for r in requests] == [0.0, 0.5, 2.0, 3.0]
    assert tokens(requests[2])[:20] == tokens(requests[0])
    assert all(r.think_s is None for r in build(f"bailian:{path}"))


def changed(**fields):
    return json.dumps({"timestamp": 9000, "input_length": 3, "output_length": 1, "hash_ids": [1]} | fields)


BAD_MOONCAKE = {
    '{"timestamp": 1': ":2: expected JSON:",
    "[1]": ":2: expected an object, got '[1]'",
    '{"timestamp": 9000, "input_length": 3, "output_length": 1}': ":2: field hash_ids is missing",
    changed(timestamp="x"): ":2: field timestamp: expected a time >= 0, got 'x'",
    changed(timestamp=1): ":2: field timestamp: expected a time not before the previous row's, got 1",
    changed(input_length=0, hash_ids=[]): ":2: field input_length: expected an integer >= 1, got 0",
    changed(output_length=True): ":2: field output_length: expected an integer >= 1, got True",
    changed(input_length=513): ":2: field hash_ids: expected 2 ids for input_length 513, got 1",
    changed(hash_ids=[-1]): ":2: field hash_ids: expected a list of integers >= 0, got [-1]",
    changed(hash_ids=["a"]): ":2: field hash_ids: expected a list of integers >= 0, got ['a']",
}


@pytest.mark.parametrize("row", BAD_MOONCAKE)
def test_a_bad_mooncake_row_names_line_and_field(tmp_path, row):
    path = write(tmp_path / "trace.jsonl", MOONCAKE[:1])
    path.write_text(path.read_text() + row + "\n")
    with pytest.raises(WorkloadError) as e:
        build(f"mooncake:{path}")
    assert f"{path}{BAD_MOONCAKE[row]}" in str(e.value) and "\n" not in str(e.value)
    assert len(build(f"mooncake:{path},num=1")) == 1  # nothing is read past the last wanted row


# ---------------------------------------------------------------------------------------------- ShareGPT


def talk(*messages):
    return {"id": "x", "conversations": [{"from": who, "value": text} for who, text in messages]}


CONVERSATIONS = [
    talk(("human", "a" * 40), ("gpt", "b" * 21), ("human", "c" * 4), ("gpt", "d" * 8)),  # (10, 6), then (1, 2)
    talk(("gpt", "e" * 12), ("human", "f" * 4), ("gpt", "g" * 4), ("human", "never answered")),  # (3 + 1, 1)
    talk(("human", "no answer")),
    talk(("system", "h" * 4), ("human", ""), ("user", "i" * 4), ("bard", "j" * 4)),  # (1 + 1, 1)
]


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps(CONVERSATIONS))
    return path


def test_sharegpt_turns_by_characters(conversations):
    requests = build(f"sharegpt:{conversations},arrivals=fixed,rate=0.1,think=2")
    assert [(r.session, r.turn, r.arrival_s, r.prompt_len, r.output_len) for r in requests] == [
        ("0", 0, 10.0, 10, 6), ("0", 1, 12.0, 17, 2), ("1", 0, 20.0, 4, 1), ("2", 0, 30.0, 2, 1),
    ]  # fmt: skip
    assert tokens(requests[1])[:10] == tokens(requests[0]) and tokens(requests[2]) != tokens(requests[0])[:4]
    assert [r.turn for r in build(f"sharegpt:{conversations},turns=1")] == [0, 0, 0]
    assert lengths(build(f"sharegpt:{conversations},num=2,arrivals=fixed,rate=0.1")) == [(10, 6), (17, 2)]


def test_turns_scale_by_what_they_add(conversations):
    first, second, *_ = build(f"sharegpt:{conversations},scale_prompt=0.5,max_output=3,arrivals=fixed")
    assert lengths((first, second)) == [(5, 3), (5 + 3 + 1, 2)]
    assert tokens(second)[:5] == tokens(first)


def test_sharegpt_tokens_by_tokenizer(conversations, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<s>": 0, "?": 1, "a" * 40: 2, "b" * 21: 3, "c" * 4: 4, "d" * 8: 5}, "?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = f"sharegpt:{conversations},tokenizer={tmp_path},arrivals=fixed,rate=0.1"
    first, second, *_ = build(spec)
    assert (tokens(first), first.output_len) == ([0, 2], 1)
    assert (tokens(second), second.output_len) == ([0, 2, 3, 4], 1)
    with pytest.raises(WorkloadError, match="token id 2 of a prompt is outside the vocabulary of 2"):
        first.prompt_tokens(2)
    with pytest.raises(WorkloadError, match="cannot become"):
        build(f"{spec},scale_prompt=9")
    with pytest.raises(WorkloadError, match=r"tokenizer=nowhere needs nowhere/tokenizer\.json"):
        build(f"sharegpt:{conversations},tokenizer=nowhere")


BAD_SHAREGPT = {
    '{"a": 1}': ": expected a JSON list of conversations, got dict",
    "[": ": expected JSON:",
    "[3]": ": conversation 0: expected an object with a list",
    '[{"items": []}]': ": conversation 0: field conversations is missing; got items",
    '[{"conversations": [3]}]': ": conversation 0: message 0: expected an object with from and value",
    '[{"conversations": [{"from": "human"}]}]': ": conversation 0: message 0: field value is missing; got from",
    '[{"conversations": [{"from": "me", "value": "x"}]}]': ": conversation 0: message 0: field from: expected one of",
    '[{"conversations": [{"from": "gpt", "value": 3}]}]': ": conversation 0: message 0: field value: expected text",
}


@pytest.mark.parametrize("text", BAD_SHAREGPT)
def test_a_bad_conversation_is_named(tmp_path, text):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(WorkloadError) as e:
        build(f"sharegpt:{path}")
    assert f"{path}{BAD_SHAREGPT[text]}" in str(e.value) and "\n" not in str(e.value)


def test_sharegpt_like_has_its_quantiles():
    requests = build("sharegpt-like:num=20000,rate=3")
    assert 20000 / requests[-1].arrival_s == pytest.approx(3, rel=0.03)
    for column, table in (("prompt_len", sharegpt.PROMPT_TOKENS), ("output_len", sharegpt.OUTPUT_TOKENS)):
        found = np.quantile([getattr(r, column) for r in requests], sharegpt.PROBABILITIES[3:-2])
        assert found == pytest.approx(table[3:-2], rel=0.15)


# ---------------------------------------------------------------------------------------------- Vidur, bursts, sessions


def test_vidur_files(tmp_path):
    header, rows = "arrived_at,num_prefill_tokens,num_decode_tokens,pd_ratio", ("2.5,100,7,14.3", "3.0,20.0,1.0,20")
    csv = tmp_path / "t.csv"
    csv.write_text("\n".join((header, *rows)))
    from_csv = build(f"vidur:{csv}")
    assert [r.arrival_s for r in from_csv] == [0.0, 0.5] and lengths(from_csv) == [(100, 7), (20, 1)]
    objects = [dict(zip(header.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    (tmp_path / "t.json").write_text(json.dumps(objects))
    assert build(f"vidur:{tmp_path}/t.json") == from_csv == build(f"vidur:{write(tmp_path / 't.jsonl', objects)}")
    csv.write_text("input_tokens,output_tokens\n5,6\n7,8\n")
    drawn = build(f"vidur:{csv},arrivals=fixed,rate=4")
    assert [r.arrival_s for r in drawn] == [0.25, 0.5] and lengths(drawn) == [(5, 6), (7, 8)]


BAD_VIDUR = {
    "a,b\n1,2\n": ":2: expected a column num_prefill_tokens or input_tokens, got 'a, b'",
    "num_prefill_tokens,num_decode_tokens\n": ": no rows",
    "num_prefill_tokens,num_decode_tokens\n1,2\n3\n": ":3: field num_decode_tokens: expected an integer >= 1, got ''",
    "num_prefill_tokens,num_decode_tokens\n1.5,2\n": ":2: field num_prefill_tokens: expected an integer >= 1, got",
    "arrived_at,num_prefill_tokens,num_decode_tokens\n2,1,1\n1,1,1\n": ":3: field arrived_at: expected a time not",
    "arrived_at,num_prefill_tokens,num_decode_tokens\nnan,1,1\n": ":2: field arrived_at: expected a time >= 0",
}


@pytest.mark.parametrize("text", BAD_VIDUR)
def test_a_bad_vidur_row_names_line_and_column(tmp_path, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(WorkloadError) as e:
        build(f"vidur:{path}")
    assert f"{path}{BAD_VIDUR[text]}" in str(e.value)


def test_burst_comes_at_once():
    requests = build("burst:num=3,context=50,output=2")
    assert [r.arrival_s for r in requests] == [0.0] * 3 and lengths(requests) == [(50, 2)] * 3
    assert tokens(requests[0]) != tokens(requests[1])


def test_synthetic_sessions():
    spec = "synthetic:arrivals=fixed,rate=1,turns=3,think=1.5,prompt=fixed:10,output=fixed:4"
    requests = build(f"{spec},num=6")
    assert [(r.session, r.turn, r.arrival_s, r.prompt_len) for r in requests] == [
        ("0", 0, 1.0, 10), ("1", 0, 2.0, 10), ("0", 1, 2.5, 24),
        ("1", 1, 3.5, 24), ("0", 2, 4.0, 38), ("1", 2, 5.0, 38),
    ]  # fmt: skip
    assert tokens(requests[4])[:24] == tokens(requests[2]) and tokens(requests[3])[:24] != tokens(requests[2])
    closed = build(f"{spec},num=6,loop=closed,time_scale=2")
    assert [r.think_s for r in closed] == [None, None, 3.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("spec", ["synthetic:turns=3,rate=100,priorities=4,output=uniform:3:9", "sharegpt:{}"])
def test_sessions_are_counted_one_after_the_other_so_that_they_stay_whole(tmp_path, spec, caplog):
    """However fast they begin. Session by session a smaller `num` is a prefix of a larger one; ids go by arrival."""
    three = talk(*(("human", "a" * 9), ("gpt", "b" * 8)) * 3)
    (tmp_path / "s.json").write_text(json.dumps([three] * 9))
    spec = spec.format(tmp_path / "s.json")

    def counted(options):
        requests = build(f"{spec},{options}")
        assert [r.id for r in requests] == [str(i) for i in range(len(requests))]
        assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
        return sorted((int(r.session), r.turn, dataclasses.replace(r, id="")) for r in requests)

    six, long = counted("num=6"), counted("num=15")
    assert [row[:2] for row in six] == [(s, t) for s in (0, 1) for t in (0, 1, 2)] and long[:6] == six
    assert not caplog.messages
    assert counted("num=8") == long[:8]
    assert caplog.messages == [f"workload '{spec},num=8': num and start cut 1 of the 3 sessions (turns left out: 1)"]
    tail = build(f"{spec},start=7,num=5")
    assert sorted((int(r.session), r.turn) for r in tail) == [row[:2] for row in long[7:12]]
    assert sorted((int(r.session), r.turn) for r in build(spec))[-1][1] == 2


def test_a_recorded_trace_is_cut_by_time_and_says_what_that_does_to_its_sessions(tmp_path, caplog):
    text, _ = freeze(build("synthetic:turns=3,arrivals=fixed,rate=4,num=9"), "spec", 0, 100)
    (tmp_path / "w.jsonl").write_text(text)
    assert [(r.session, r.turn) for r in build(f"{tmp_path}/w.jsonl,num=4")] == [("0", 0), ("1", 0), ("2", 0), ("0", 1)]
    assert caplog.messages == [
        f"workload '{tmp_path}/w.jsonl,num=4': num and start cut 3 of the 3 sessions (turns left out: 5)"
    ]


def test_loop_and_sampling_options():
    with pytest.raises(WorkloadError, match="loop=closed needs sessions"):
        build("synthetic:loop=closed")
    request = build("synthetic:num=1,temperature=0.7,top_k=5")[0]
    assert request.sampling == (("temperature", 0.7), ("top_k", 5))
    with pytest.raises(ValueError, match=r"top_p must be in \(0, 1\]"):
        build("synthetic:top_p=2")


# ---------------------------------------------------------------------------------------------- the real files


@pytest.mark.skipif(not TRACES.exists(), reason="the public traces are not beside the checkout")
def test_real_traces():
    requests = build(f"mooncake:{TRACES}/mooncake-fast25/conversation_trace.jsonl")
    assert len(requests) == 12031 and requests[-1].arrival_s == pytest.approx(3536.999)
    seen, hits = set(), 0
    for r in requests:
        assert isinstance(r.content, Blocks)
        hits += len(seen & set(r.content.ids))
        seen |= set(r.content.ids)
    assert len(seen) == 182_790 and hits / (hits + len(seen)) == pytest.approx(0.366, abs=1e-3)
    lengths_file = build(f"vidur:{TRACES}/vidur-fork-akafaka/sharegpt_val_10k_llama2.csv")
    for column, table in (("prompt_len", sharegpt.PROMPT_TOKENS), ("output_len", sharegpt.OUTPUT_TOKENS)):
        found = np.quantile([getattr(r, column) for r in lengths_file], sharegpt.PROBABILITIES)
        assert np.abs(found - table).max() <= 1
