"""Freezes a workload into a file that every run can replay, or exports it for another system's benchmark.

    python -m experiments.workload --workload=azure-like:num=200,rate=1.5 --out=w.jsonl
    python -m experiments.serve --model=base-124m --workload=w.jsonl

The file states the content hash; `serve` writes the hash of what it served to config.json and summary.json, so two runs
served the same exactly when their hashes are equal. Synthetic token ids depend on the vocabulary: --vocab_size.

`--format` also writes, for others (experiments/workload_exports.py says which versions read what):

    vllm        `vllm bench serve --dataset-name custom`; text, so it needs --tokenizer
    sglang      `sglang.bench_serving --dataset-name autobench`; token ids
    mooncake    Mooncake's trace format with real block hashes; read also by vLLM (`timed_trace`) and SGLang

An export is another workload when its format cannot hold all of this one (a closed loop, sampling, priorities, for
some formats times or token ids): a line is printed for each property left out, and the hash is that of what was
exported, for the other benchmark's results (`vllm bench serve --metadata workload_hash=...`). The last line printed is
one JSON object.
"""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags

from engine.errors import ConfigError
from engine.files import write_whole
from engine.tokenizer import FILE, INSTALL, Tokenizer, load_tokenizer
from experiments import common_flags, workload_exports, workloads
from experiments.workload_exports import Export
from experiments.workloads import WorkloadRequest
from experiments.workloads.frozen import freeze

WORKLOAD = flags.DEFINE_string("workload", None, "Workload spec; experiments/workloads/__init__.py explains them.")
OUT = flags.DEFINE_string("out", None, "File to write.", allow_override=True)
FORMAT = flags.DEFINE_enum("format", "folio", ["folio", "vllm", "sglang", "mooncake"], "What to write.")
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 32000, "Token ids are drawn below this; at most the vocabulary of the models to serve.", lower_bound=1
)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Directory with the tokenizer.json that turns ids into text.")
flags.declare_key_flag("overwrite")


def required_tokenizer() -> Tokenizer:
    """The tokenizer of --tokenizer.

    Raises:
      ConfigError: it was not given, or has no tokenizer.json, or the library is missing.
    """
    directory = TOKENIZER.value
    if directory is None:
        raise ConfigError(f"--format={FORMAT.value} holds text: give --tokenizer, a directory with a {FILE}")
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        there = (Path(directory) / FILE).exists()
        raise ConfigError(f"--tokenizer={directory} needs {f'the tokenizers library: {INSTALL}' if there else FILE}")
    return tokenizer


def exported(requests: list[WorkloadRequest], vocab_size: int) -> Export:
    """The requests in the format of --format, which is not ours.

    Raises:
      ConfigError: as `required_tokenizer`, where the format holds text.
    """
    if FORMAT.value == "vllm":
        return workload_exports.vllm(requests, vocab_size, required_tokenizer())
    return {"sglang": workload_exports.sglang, "mooncake": workload_exports.mooncake}[FORMAT.value](
        requests, vocab_size
    )


def main() -> int:
    """The program."""
    if not WORKLOAD.value or not OUT.value:
        raise ConfigError(f"--{'out' if WORKLOAD.value else 'workload'} is missing")
    path, spec, vocab_size = Path(OUT.value), WORKLOAD.value, VOCAB_SIZE.value
    if path.exists() and not common_flags.OVERWRITE.value:
        raise ConfigError(f"--out={path} is there already; name another, or --overwrite")
    requests = workloads.build(spec)
    lost: dict[str, int] = {}
    if FORMAT.value == "folio":
        text, digest = freeze(requests, spec, workloads.seed_of(spec), vocab_size)
    else:
        export = exported(requests, vocab_size)
        text, digest = export.text, export.workload_hash
        lost = workload_exports.left_out(requests, export, vocab_size)
    write_whole(path, text)
    for name, count in lost.items():
        print(f"left out: {name}, of {count} of {len(requests)} requests")
    print(f"{len(requests)} requests, sha256 {digest}, in {path}")
    line = {"bench": "workload", "workload": spec, "format": FORMAT.value, "out": str(path), "vocab_size": vocab_size}
    print(json.dumps(line | {"num_requests": len(requests), "left_out": lost, "workload_hash": digest}))
    return 0


if __name__ == "__main__":
    common_flags.run_main(main, engine=False)
