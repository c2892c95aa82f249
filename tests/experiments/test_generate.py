"""Protects streaming: what is printed is what `generate` gives, for token ids and for text."""

import pytest

from tests.experiments import programs

BAD = {
    "": "exactly one of --prompt and --prompt_ids",
    "--prompt=a --prompt_ids=1": "exactly one of --prompt and --prompt_ids",
    "--prompt_ids=1,x": "--prompt_ids must be token ids such as 1,2,3, got '1,x'",
    "--prompt_ids=1 --top_p=0": "top_p must be in (0, 1], got 0.0",
    "--prompt_ids=1 --temperature=-1": "temperature must be 0 (greedy) or in [1e-4, 1e4], got -1",
    "--prompt_ids=1 --max_tokens=0": "max_tokens must be an integer in [1, 2147483648), got 0",
    "--prompt_ids=1 --min_p=1.5": "min_p must be in [0, 1], got 1.5",
    "--prompt_ids=1 --max_tokens=2 --min_tokens=3": "min_tokens must be an integer in [0, 3), got 3",
    "--prompt_ids=1 --logprobs=21": "logprobs must be an integer in [0, 21), got 21",
    "--prompt_ids=1 --stop=": "stop must be a tuple of non-empty strings, got ('',)",
    "--prompt_ids=1 --stop=end": "stop strings need a tokenizer and the model has no tokenizer.json",
    "--prompt_ids=1 --stop_ids=b": "--stop_ids must be token ids",
    "--prompt=hello": "--prompt is text but timed has no usable tokenizer.json: give --prompt_ids",
    "--prompt_ids=1,100": "token id 100 at position 1 is outside the vocabulary of 100",
    "--prompt_ids=": "a prompt must be",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments):
    code, stdout, stderr = programs.run("generate", "--model=timed", *arguments.split(), timed=True)
    assert code == 2 and stdout.strip() == ""
    assert BAD[arguments] in stderr and stderr.count("\n") == 1


def test_prints_ids_and_speed_without_a_tokenizer():
    code, stdout, stderr = programs.run("generate", "--model=timed", "--prompt_ids=1,2,3", "--max_tokens=4", timed=True)
    assert (code, stdout.split()) == (0, ["0"] * 4)
    assert "3 prompt tokens, 4 produced: TTFT" in stderr and "decode" in stderr


def test_a_stop_id_ends_it():
    code, stdout, _ = programs.run("generate", "--model=timed", "--prompt_ids=5", "--stop_ids=0", timed=True)
    assert (code, stdout.split()) == (0, ["0"])


def test_text_of_a_real_checkpoint(tmp_path):
    """A tiny checkpoint with a tokenizer: the stream is the text of the tokens that `Engine.generate` gives."""
    tokenizers = pytest.importorskip("tokenizers")
    from engine import CacheConfig, Engine, EngineConfig, SamplingParams, SchedulerConfig
    from engine.models.weights import export_hf, init_params
    from engine.presets import PRESETS

    cfg = PRESETS["tiny-1m"]
    model = tmp_path / "model"
    export_hf(init_params(cfg, seed=3), cfg, model)
    vocab = {f"w{i}": i for i in range(cfg.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(model / "tokenizer.json"))

    common = ["--num_pages=256", "--max_num_seqs=2", "--max_context=64", f"--compilation_cache_dir={tmp_path}/cache"]
    code, stdout, stderr = programs.run("generate", f"--model={model}", "--prompt=w5 w6 w7", "--max_tokens=6", *common)
    assert code == 0, stderr
    engine = Engine.from_pretrained(
        str(model),
        EngineConfig(
            cache=CacheConfig(num_pages=256),
            scheduler=SchedulerConfig(max_num_seqs=2),
            max_context=64,
            compilation_cache_dir=None,
        ),
    )
    (output,) = engine.generate([[5, 6, 7]], SamplingParams(max_tokens=6))
    assert stdout.split() == [f"w{t}" for t in output.token_ids]

    fourth = f"w{output.token_ids[3]}"
    code, stdout, stderr = programs.run(
        "generate", f"--model={model}", "--prompt=w5 w6 w7", f"--stop={fourth}", "--logprobs=1", *common
    )
    used = output.token_ids[: output.token_ids.index(output.token_ids[3]) + 1]
    assert code == 0 and stdout.split() == [f"w{t}" for t in used[:-1]]
    records = [line.split() for line in stderr.splitlines() if " rank " in line]
    assert [(r[0], r[2:4], r[4].split(":")) for r in records] == [
        (str(t), ["rank", "1"], [str(t), r[1]]) for t, r in zip(used, records, strict=True)
    ]
