"""What ends a request and what it says then: stop tokens, stop strings, `min_tokens`. On an engine without a device."""

import pytest

from engine.request import SamplingParams
from tests.engine.fake import MODEL, fake_engine
from tests.engine.test_output_text import Pieces

EOS = MODEL.eos_token_ids[0]
WORDS = [f" w{i}".encode() for i in range(MODEL.vocab_size)]


def script(tokens: list[int], **options):
    """An engine with a tokenizer whose only request produces these tokens."""
    remaining = iter(tokens)
    engine = fake_engine(num_pages=64, answer=lambda slot: next(remaining), **options)
    engine.tokenizer = Pieces(WORDS)
    return engine


def serve(tokens: list[int], **params):
    (out,) = script(tokens).generate([[1, 2, 3]], SamplingParams(max_tokens=len(tokens), **params))
    return out.token_ids, out.finish_reason, out.stop_reason, out.text


def test_reasons():
    """A caller's stop token is named, the model's own is not, a string is; length has none. As vLLM does."""
    assert serve([5, 6], stop_token_ids=(9,)) == ([5, 6], "length", None, " w5 w6")
    assert serve([5, 6, 5], stop_token_ids=(6, 9)) == ([5, 6], "stop", 6, " w5 w6")
    assert serve([5, EOS, 5]) == ([5, EOS], "stop", None, " w5 w7")
    assert serve([5, EOS, 5], stop_token_ids=(EOS,)) == ([5, EOS], "stop", EOS, " w5 w7")
    assert serve([5, EOS, 5], ignore_eos=True) == ([5, EOS, 5], "length", None, " w5 w7 w5")
    assert serve([5, 6, 5], stop=("5 w6",)) == ([5, 6], "stop", "5 w6", " w")


def test_a_stop_string_and_something_else_at_the_same_token():
    """A string goes before the length, a stop token before the string; the text is cut in any case."""
    assert serve([5, 6], stop=("w6",)) == ([5, 6], "stop", "w6", " w5 ")
    assert serve([5, EOS, 6], stop=("w7",)) == ([5, EOS], "stop", None, " w5 ")
    assert serve([5, 6, 6], stop=("w6",), stop_token_ids=(6,)) == ([5, 6], "stop", 6, " w5 ")


def test_nothing_stops_among_the_first_min_tokens():
    """Neither tokens (here produced in spite of the mask, as forced ones are) nor strings."""
    assert serve([EOS, EOS, EOS, 5], min_tokens=2) == ([EOS] * 3, "stop", None, " w7 w7 w7")
    assert serve([9, 8, 9, 5], min_tokens=2, stop_token_ids=(8, 9)) == ([9, 8, 9], "stop", 9, " w9 w8 w9")
    assert serve([5, 5, 5, 6], min_tokens=2, stop=("w5",)) == ([5, 5, 5], "stop", "w5", " w5 w5 ")
    assert serve([EOS, EOS], min_tokens=2) == ([EOS, EOS], "length", None, " w7 w7")


def test_a_stream_never_shows_what_is_taken_back():
    """Pieces add up to the text of every output; what may begin a stop string waits."""
    tokens = [1, 2, 1, 3, 1, 2, 3, 4]
    outputs = list(script(tokens).stream([1], SamplingParams(max_tokens=8, stop=("1 w2 w3",))))
    assert [o.new_text for o in outputs] == [" w", "", "1 w2 w", "1 w3", " w", "", ""]
    assert [o.text for o in outputs][:3] == [" w", " w", " w1 w2 w"]
    assert outputs[-1].text == "".join(o.new_text for o in outputs) == " w1 w2 w1 w3 w"
    assert outputs[-1].token_ids == tokens[:7] and outputs[-1].stop_reason == "1 w2 w3"


def test_an_aborted_request_keeps_its_whole_text():
    """Nothing is held back any more."""
    engine = script([1] * 9)
    params = SamplingParams(max_tokens=9, stop=("1 w2",))
    for n, out in enumerate(engine.stream([1], params), 1):
        if n == 3:
            request = engine._live[out.request_id]
            assert out.text == " w1 w1 w"
            engine.abort(out.request_id)
            assert request.text.text == " w1 w1 w1" and request.finish_reason == "abort"


def test_plain_greedy_requests_cost_nothing():
    """No sampler in their plans and no text work, also once `min_tokens` is behind them."""
    engine = script([1] * 20)
    engine.add_request([1], SamplingParams(max_tokens=8, min_tokens=3, stop_token_ids=(8, 9)))
    engine.add_request([1], SamplingParams(max_tokens=8))
    requests = list(engine._live.values())
    while engine.has_work():
        engine.step()
    assert [p.sampling is not None for p in engine.executor.plans] == [True] * 3 + [False] * 5
    assert all(r.text is None for r in requests)


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"logprobs": 0}, {"min_tokens": 4, "stop_token_ids": (3,)}])
def test_the_sampler_runs_when_it_is_needed(params):
    engine = script([1] * 4)
    engine.generate([[1]], SamplingParams(max_tokens=4, **params))
    assert all(p.sampling is not None for p in engine.executor.plans)
    assert [p.sampling["index"].tolist() for p in engine.executor.plans] == [[0], [1], [2], [3]]
