"""What can never be served is refused at arrival, in one line, and leaves the engine as it was."""

import dataclasses

import pytest

from engine.config import CacheConfig, EngineConfig, ModelConfig, RopeConfig, SchedulerConfig, from_dict, to_dict
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.request import SamplingParams
from tests.engine.fake import MODEL, fake_engine
from tests.engine.tiny import tiny_engine


@pytest.mark.parametrize(
    "prompt, params, message",
    [
        ([], {}, "non-empty list of token ids"),
        ([[1, 2]], {}, "non-empty list of token ids"),
        ([0.5], {}, "non-empty list of token ids"),
        ([1, 2, 1000], {}, "token id 1000 at position 2 is outside the vocabulary of 1000"),
        ([-1], {}, "token id -1 at position 0"),
        ([1] * 4096, {}, "the prompt has 4096 tokens; a context of 4096 takes at most 4095"),
        ([1] * 200, {"max_tokens": 200}, "400 tokens .prompt 200 . output. never fit the KV pool of 48 pages"),
        ([1], {"stop_token_ids": (1000,)}, "stop_token_ids 1000 is outside the vocabulary"),
        ("text", {}, "a text prompt needs a tokenizer"),
        (
            [1],
            {"stop": ("\n",)},
            "stop strings need a tokenizer and the model has no tokenizer.json; use stop_token_ids",
        ),
        (
            [1],
            {"min_tokens": 1, "stop_token_ids": tuple(range(20, 37))},
            "min_tokens holds back at most 16 stop tokens, got 18",
        ),
    ],
)
def test_bad_requests(prompt, params, message):
    """Refused with the reason; nothing is queued, no page is taken."""
    engine = fake_engine(num_pages=24)
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, SamplingParams(**params))
    assert not engine.has_work() and engine.store.num_free_pages == engine.store.num_pages


def test_an_id_in_use_is_refused():
    """Two live requests cannot share one; a finished one frees it."""
    engine = fake_engine(num_pages=24)
    engine.add_request([1], SamplingParams(max_tokens=1), request_id="a")
    with pytest.raises(RequestError, match="request id 'a' is in use"):
        engine.add_request([1], request_id="a")
    engine.step()
    engine.add_request([1], request_id="a")


def test_generate_refuses_all_or_serves_all():
    """One bad prompt: the others are not left in the queue."""
    engine = fake_engine(num_pages=24)
    with pytest.raises(RequestError):
        engine.generate([[1], [2], [-5]])
    assert not engine.has_work()
    with pytest.raises(RequestError, match="give a list"):
        engine.generate("abc")
    with pytest.raises(RequestError, match="2 prompts but 1 sampling"):
        engine.generate([[1], [2]], [SamplingParams()])


def test_abort_in_every_phase():
    """Waiting, running, finished, unknown."""
    engine = fake_engine(num_pages=24, num_slots=1)
    for name in "ab":
        engine.add_request([1] * 20, SamplingParams(max_tokens=2), request_id=name)
    engine.step()
    assert engine.abort("b") and engine.abort("a") and not engine.abort("a") and not engine.abort("nobody")
    assert not engine.has_work() and engine.store.num_free_pages == engine.store.num_pages


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CacheConfig(page_size=24), "page_size must be a power of two, got 24"),
        (lambda: CacheConfig(num_pages=1, device_bytes=1), "sized twice, by num_pages and by device_bytes"),
        (lambda: CacheConfig(store="radix"), "store 'radix'; known: paged, native"),
        (lambda: CacheConfig(store="native", pages_per_chunk=4), "pages_per_chunk=4 is for store=paged"),
        (lambda: CacheConfig(store="native", host_bytes=1, transient_pages=4), "transient_pages are for store=paged"),
        (lambda: CacheConfig(device_fraction=1.5), r"device_fraction must be in \(0, 1\], got 1.5"),
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs must be in"),
        (lambda: SchedulerConfig(watermark=1.0), "watermark must be in"),
        (lambda: EngineConfig(dtype="float17"), "dtype 'float17'; known: float32, bfloat16, float16"),
        (lambda: EngineConfig(query_tile=48), "query_tile must be a power of two"),
        (lambda: EngineConfig(deterministic=True, query_tile=16, max_tiles=2), ">= 64 tokens"),
        (lambda: SamplingParams(temperature=-1), r"temperature must be 0 .greedy. or in \[1e-4, 1e4\], got -1"),
        (lambda: SamplingParams(temperature=float("inf")), "temperature must be 0"),
        (lambda: SamplingParams(top_k=2**31), r"top_k must be an integer in \[0, 2147483648\), got 2147483648"),
        (lambda: SamplingParams(max_tokens=2.5), "max_tokens must be an integer"),
        (lambda: SamplingParams(stop_token_ids=3), "stop_token_ids must be a tuple of token ids, got 3"),
        (lambda: MODEL.replace(windows=(0, None)), "a sliding window must be an integer >= 1"),
        (lambda: RopeConfig(scaling="llama3", factor=8.0, low_freq_factor=4.0), "must be < high_freq_factor"),
        (lambda: SamplingParams(top_p=0), "top_p must be in"),
        (lambda: SamplingParams(min_p=1.01), r"min_p must be in \[0, 1\], got 1.01"),
        (lambda: SamplingParams(min_p=float("nan")), r"min_p must be in \[0, 1\], got nan"),
        (lambda: SamplingParams(max_tokens=5, min_tokens=6), r"min_tokens must be an integer in \[0, 6\), got 6"),
        (lambda: SamplingParams(logprobs=21), r"logprobs must be an integer in \[0, 21\), got 21"),
        (lambda: SamplingParams(stop="end"), "stop must be a tuple of non-empty strings, got 'end'"),
        (lambda: SamplingParams(stop=("",)), "stop must be a tuple of non-empty strings"),
        (lambda: SamplingParams(max_tokens=0), "max_tokens must be an integer in"),
        (lambda: MODEL.replace(num_kv_heads=3), "num_heads=4 is not a multiple of num_kv_heads=3"),
        (lambda: RopeConfig(scaling="yarn"), "rope scaling 'yarn' is not supported; known: default"),
        (lambda: Engine.from_pretrained("llama-9b"), "neither a directory nor a preset; presets: base-124m"),
        (
            lambda: from_dict(EngineConfig, {"cache": {"pages": 3}}),
            "config.cache: unknown field pages; known: store, page_size",
        ),
    ],
)
def test_absurd_settings(make, message):
    """Refused at construction, naming the field and what would be right."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("backend", ["mosaic", "reference"])
def test_an_attention_backend_is_obeyed_or_refused_at_once(backend):
    """Before anything is compiled; `reference` is NumPy and cannot be part of a program."""
    with pytest.raises(ConfigError, match=f"decode_attention has no backend '{backend}' that compiles; known: xla"):
        tiny_engine(attention_backend=backend)


def test_settings_survive_json():
    """What is dumped beside results builds the same configuration again."""
    config = EngineConfig(cache=CacheConfig(page_size=32, num_pages=5), scheduler=SchedulerConfig(watermark=0.1))
    assert from_dict(EngineConfig, to_dict(config)) == config
    model = dataclasses.replace(MODEL, windows=(5, None), rope=RopeConfig(1e6, "llama3", 8.0))
    assert from_dict(ModelConfig, to_dict(model)) == model
