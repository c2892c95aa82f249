"""Log-probabilities, min-p and `min_tokens` on the real engine, mixed in batches that preempt."""

import numpy as np
import pytest

from engine.request import SamplingParams
from tests.engine.identity import OUTPUT, plain, plain_engine, serve, small_engine
from tests.engine.test_output_text import Pieces
from tests.engine.tiny import prompts, tiny_engine


def check_logprobs(out, k):
    """Against log-softmax in float64 of the logits that the engine kept."""
    logits = out.logits.astype(np.float64)
    want = logits - logits.max(-1, keepdims=True)
    want -= np.log(np.exp(want).sum(-1, keepdims=True))
    assert [r.token for r in out.logprobs] == out.token_ids
    for record, x in zip(out.logprobs, want, strict=True):
        assert record.rank == 1 + (x > x[record.token]).sum()
        assert record.top_tokens == tuple(np.argsort(-x, kind="stable")[:k].tolist())
        got = np.array([record.logprob, *record.top_logprobs])
        np.testing.assert_allclose(got, x[[record.token, *record.top_tokens]], atol=1e-5)


def test_logprobs_of_greedy_sampled_masked_and_forced_tokens():
    """Of the raw logits, whatever cut, mask or script chose the token; only for those who ask."""
    greedy = plain("wide", tuple(prompts([40])[0]), False)[0]
    kinds = [
        {"logprobs": 3},
        {"logprobs": 20, "temperature": 2.0, "seed": 1},
        {"logprobs": 0, "temperature": 1.0, "min_p": 0.05, "seed": 2},
        {"logprobs": 5, "forced_tokens": tuple(range(OUTPUT))},
        {"logprobs": 2, "min_tokens": OUTPUT, "stop_token_ids": greedy},
        {},
    ]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, **kind) for kind in kinds]
    outputs = tiny_engine(max_num_seqs=8).generate([prompts([40])[0]] * len(kinds), params)
    for out, kind in zip(outputs[:-1], kinds, strict=False):
        check_logprobs(out, kind["logprobs"])
    assert outputs[-1].logprobs is None
    assert {r.rank for r in outputs[0].logprobs} == {1} and {r.rank for r in outputs[1].logprobs} != {1}
    assert outputs[3].token_ids == list(range(OUTPUT))


@pytest.mark.parametrize("stops", [1, 12])
def test_min_tokens_masks_on_the_device(stops):
    """Greedy: while masked, the best of the other tokens; afterwards a stop token ends the request."""
    prompt = prompts([40])[0]
    unmasked = plain("wide", tuple(prompt), True)[0]
    ids = tuple(dict.fromkeys(unmasked))[:stops]
    params = SamplingParams(max_tokens=40, min_tokens=6, stop_token_ids=ids, ignore_eos=True)
    (out,) = tiny_engine(deterministic=True).generate([prompt], params)
    masked = out.logits.copy()
    masked[:6, list(ids)] = -np.inf
    assert out.token_ids == masked.argmax(-1).tolist()
    assert not set(out.token_ids[:6]) & set(ids) and not set(out.token_ids[6:-1]) & set(ids)
    assert out.finish_reason == ("stop" if out.token_ids[-1] in ids else "length")
    assert unmasked[0] in ids  # without min_tokens it would have ended at once


def test_extras_change_nobody_elses_tokens_and_survive_preemption():
    """Bit-identical logits, tokens and log-probabilities, alone or in a batch of all kinds that preempts."""
    prompt_list = prompts([40, 63, 63, 17])
    stop = plain("wide", tuple(prompt_list[2]), True)[0][0]
    kinds = [
        {"temperature": 0.9, "seed": 5, "min_p": 0.1, "logprobs": 4},
        {},
        {"min_tokens": 5, "stop_token_ids": (stop,)},
        {"temperature": 1.2, "seed": 3, "min_p": 0.2, "min_tokens": 8, "stop_token_ids": (stop, 7, 9)},
    ]
    params = [SamplingParams(max_tokens=OUTPUT, ignore_eos=True, **k) for k in kinds]
    together, preemptions = serve(small_engine("wide", 16, True), prompt_list, params, [0] * 4)
    assert preemptions > 0
    for prompt, p, got in zip(prompt_list, params, together, strict=True):
        (alone,) = plain_engine("wide", True).generate([prompt], p)
        assert got.token_ids == alone.token_ids and got.finish_reason == alone.finish_reason
        assert np.array_equal(got.logits, alone.logits) and got.logprobs == alone.logprobs
    assert together[1].token_ids == list(plain("wide", tuple(prompt_list[1]), True)[0])


def test_stop_strings_survive_preemption():
    """The stop string of each request crosses two of its tokens; the same end alone, and preempted in a batch."""
    prompt_list = prompts([63, 63, 63, 17])
    tokenizer = Pieces([f" w{i}".encode() for i in range(512)])
    params = []
    for prompt in prompt_list:
        tokens = plain("wide", tuple(prompt), True)[0]
        params.append(SamplingParams(max_tokens=OUTPUT, ignore_eos=True, stop=(f"{tokens[-3]} w{tokens[-2]}",)))
    engine = tiny_engine(num_pages=14, deterministic=True)
    engine.tokenizer = tokenizer
    outputs, preemptions = serve(engine, prompt_list, params, [0] * 4)
    assert preemptions > 0
    for prompt, p, out in zip(prompt_list, params, outputs, strict=True):
        tokens = list(plain("wide", tuple(prompt), True)[0])
        whole = tokenizer.decode(tokens)
        assert out.text == whole[: whole.index(p.stop[0])] and out.stop_reason == p.stop[0]
        assert out.token_ids == tokens[: len(out.token_ids)]
        assert p.stop[0] in tokenizer.decode(out.token_ids) and p.stop[0] not in tokenizer.decode(out.token_ids[:-1])
